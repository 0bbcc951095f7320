"""The command `profile`: measures where the time of a training step goes.

`accelerate launch -m mnist_dist.profile --recipe simple_cnn` trains some steps, first without and then with PyTorch's
profiler. It prints the share of each phase of the step for each rank, the longest operations, the memory and advice,
and writes a trace per rank and a picture of the timelines.
"""

from __future__ import annotations

from mnist_dist.cli import answer_early, parse, run_command

if __name__ == "__main__":
    answer_early("profile")  # before the imports below load torch

import io
import json
import os
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

# torch reads it at its import. Otherwise the memory profiler warns about tensors that are older than itself.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from mnist_dist.data import Dataset
from mnist_dist.distributed.collectives import run_on_all_ranks
from mnist_dist.distributed.devices import device_name, share_cores
from mnist_dist.distributed.launcher import check_size, end_process, launched_world
from mnist_dist.engine.files import write_atomically
from mnist_dist.errors import Problem, RecipeError
from mnist_dist.profile.measurement import Profile, measure
from mnist_dist.profile.phases import PHASES
from mnist_dist.profile.report import print_report
from mnist_dist.recipe.loading import load_recipe
from mnist_dist.recipe.schema import Recipe
from mnist_dist.run.build import build_components, check_world
from mnist_dist.run.components import TrainingComponents
from mnist_dist.run.data import load_data
from mnist_dist.run.earlier_runs import load_initial_weights, load_teachers
from mnist_dist.run.folder import RunFolder, unwritable
from mnist_dist.run.model_setup import prepare_model
from mnist_dist.run.provenance import git_commit, versions
from mnist_dist.run.summary import close_trackers, open_trackers
from mnist_dist.run.text_output import printable, table_console
from mnist_dist.run.timed_training import ENDLESS, TimedTraining
from mnist_dist.tracking import WandbTracker, find_tracker

# Commands do not import commands, except for the training loop, which this command measures.
from mnist_dist.train import fit


@dataclass(frozen=True)
class ProfileFolder(RunFolder):
    """The files of a profile. A scratch folder receives the files that a run writes and a profile does not keep."""

    scratch: Path

    recipe = property(lambda self: self.path / "profiled_recipe.yaml")  # recipe.yaml marks a run folder
    figures = property(lambda self: self.path / "profile.json")
    tables = property(lambda self: self.path / "profile.txt")
    picture = property(lambda self: self.path / "timelines.png")
    metrics = property(lambda self: self.scratch / "metrics.jsonl")
    console = property(lambda self: self.scratch / "console.log")
    world = property(lambda self: self.scratch / "world.jsonl")
    best = property(lambda self: self.scratch / "best.safetensors")
    last = property(lambda self: self.scratch / "last.safetensors")
    status = property(lambda self: self.scratch / "STATUS")
    checkpoints = property(lambda self: self.scratch / "checkpoints")

    def trace(self, rank: int) -> Path:
        """Returns the file of a rank's trace, which Perfetto and chrome://tracing open."""
        return self.path / f"trace_rank{rank}.json.gz"

    @property
    def files(self) -> list[Path]:
        """The files of the profile on this machine."""
        return [self.figures, self.tables, self.picture, *sorted(self.path.glob("trace_rank*.json.gz"))]


def profile(
    recipe: Recipe,
    steps: int = 20,
    run_dir: Path | None = None,
    *,
    world_size: int | None = None,
    allow_code: Iterable[str] = (),
) -> Profile:
    """Profiles the training of a recipe. Collective: call on every rank.

    Args:
        recipe: a recipe that was loaded with the overrides `ENDLESS`.
        steps: number of steps that are timed without the profiler, and again with it.
        run_dir: the files go to its folder `profile`; None for runs/<recipe>/<date-time>.
        world_size: the expected number of processes; None for the number in the launcher's options, if it is known.
        allow_code: modules from which the networks of `distill.from` may be imported.

    Raises:
        RecipeError: the user made a mistake; nothing was trained.
        RunError: the training failed or was stopped.
    """
    state = launched_world()
    check_size(state, world_size)
    share_cores(state)
    recipe = recipe.model_copy(update={"mixed_precision": check_world(recipe, state)})
    dataset = load_data(recipe, state, allow_code)
    components, recipe = _build(recipe, dataset, state, allow_code)
    with tempfile.TemporaryDirectory() as scratch:
        folder = _open_folder(recipe, run_dir, state, Path(scratch))
        open_trackers(recipe, components, dataset, folder, {}, quiet=True)
        training = TimedTraining(fit, recipe, components, dataset.test[slice(1)], folder)
        try:
            measured = measure(components, training.run, steps, Path(scratch), folder.trace(state.process_index))
            run_on_all_ranks(state, lambda: _report(measured, recipe, folder, components))
        finally:
            close_trackers(components)
    return measured


def _build(
    recipe: Recipe, dataset: Dataset, state: PartialState, allow_code: Iterable[str]
) -> tuple[TrainingComponents, Recipe]:
    """Builds the training as the command `train` does, with eager steps."""
    prepared = run_on_all_ranks(state, lambda: prepare_model(recipe, dataset, state.num_processes, state.device))
    teachers = run_on_all_ranks(state, lambda: load_teachers(recipe, dataset.train, allow_code))
    run_on_all_ranks(state, lambda: load_initial_weights(prepared.recipe, prepared.module))
    engine = prepared.recipe.engine.model_copy(update={"capture": "off"})
    eager = prepared.recipe.model_copy(update={"engine": engine})
    precision = str(recipe.mixed_precision)
    return build_components(eager, precision, dataset.train, prepared.module, teachers), eager


def _open_folder(recipe: Recipe, run_dir: Path | None, state: PartialState, scratch: Path) -> ProfileFolder:
    """Creates the folder of the profile and writes the recipe into it. Collective: call on every rank."""

    def create() -> str:
        if not state.is_main_process:
            return ""
        parent = RunFolder.create(run_dir, recipe)
        folder = ProfileFolder(parent.path.absolute() / "profile", scratch)
        if parent.leaves(folder.path):
            message = f"{folder.path} is a link to a folder outside the run folder; name another folder"
            raise RecipeError([Problem("command line", "--run-dir", message, "unsupported")])
        if folder.figures.exists():
            message = f"{folder.path} holds a profile, which is never overwritten; name another folder"
            raise RecipeError([Problem("command line", "--run-dir", message, "exists")])
        try:
            folder.path.mkdir(exist_ok=True)
            write_atomically(folder.recipe, recipe.to_yaml())
        except OSError as error:
            raise unwritable(error, run_dir) from error
        return str(folder.path)

    path = Path(broadcast_object_list([run_on_all_ranks(state, create)])[0])
    path.mkdir(parents=True, exist_ok=True)  # on another machine without a common file system
    return ProfileFolder(path, scratch)


def _report(measured: Profile, recipe: Recipe, folder: ProfileFolder, components: TrainingComponents) -> None:
    """Prints the tables and writes all files but the traces, on rank 0."""
    if not components.accelerator.is_main_process:
        return
    from mnist_dist.plots.timeline import plot_timelines  # here, because importing matplotlib takes time

    device, world_size = device_name(components.accelerator.device), len(measured.ranks)
    processes = "1 process" if world_size == 1 else f"{world_size} processes"
    title = f"{recipe.name}, batch {recipe.batch_size}, {processes}, {device}"
    content = {"title": title, "phases": PHASES, "versions": versions(), "git_commit": git_commit(), **asdict(measured)}
    write_atomically(folder.figures, json.dumps(content) + "\n")
    rows = {f"rank {rank.rank}": rank for rank in measured.ranks}
    segments = {name: rank.segments for name, rank in rows.items()}
    starts = {name: rank.step_starts for name, rank in rows.items()}
    plot_timelines(segments, starts, folder.picture, phases=PHASES, title=title)
    text = io.StringIO()
    for console in (table_console(), table_console(file=text)):
        console.print(title, highlight=False, style="bold")
        if components.accelerator.device.type == "cuda":
            console.print("eager steps: a captured CUDA graph (engine.capture) hides the phases", highlight=False)
        print_report(measured, recipe, console)
    write_atomically(folder.tables, text.getvalue())
    if wandb := find_tracker(components.accelerator, WandbTracker):
        wandb.log_profile(folder.files)
    print(f"profile: {printable(folder.path)}; open a trace at https://ui.perfetto.dev")


# --- the command line ---------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit code: 0 done, 1 the training failed, 2 bad input."""
    arguments = parse("profile", argv)
    if arguments.steps < 1:
        message = f"expected at least 1, got {arguments.steps}"
        raise RecipeError([Problem("command line", "--steps", message, "range")])
    endless = [f"{key}={value}" for key, value in ENDLESS.items()]
    recipe = load_recipe(arguments.recipe, *arguments.overrides, *endless)
    if recipe.tracking.wandb.job_type is None:
        recipe = load_recipe(arguments.recipe, *arguments.overrides, *endless, "tracking.wandb.job_type=profile")
    profile(
        recipe,
        arguments.steps,
        arguments.run_dir,
        world_size=arguments.world_size,
        allow_code=arguments.allow_code,
    )
    return 0


if __name__ == "__main__":
    end_process(run_command(main))
