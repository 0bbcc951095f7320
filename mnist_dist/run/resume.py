"""Opens the run folder, and finds and loads the checkpoint that a run resumes from."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from mnist_dist.data import Images
from mnist_dist.distributed.collectives import run_on_all_ranks
from mnist_dist.distributed.signals import Interrupts
from mnist_dist.engine.checkpoint import (
    list_checkpoints,
    load_checkpoint,
    load_weights,
    newest_checkpoint,
    remove,
    save_checkpoint,
)
from mnist_dist.engine.files import write_atomically
from mnist_dist.errors import Kind, Problem, RecipeError, SafeStream
from mnist_dist.recipe.changes import describe_changes, refuse_changes
from mnist_dist.recipe.loading import load_recipe
from mnist_dist.recipe.schema import Recipe
from mnist_dist.run.folder import RunFolder, unwritable
from mnist_dist.run.lock import RunLock
from mnist_dist.run.plan import Plan, compare_data, converted, refuse_length
from mnist_dist.run.trackers import refuse_missing_trackers

# --- the run folder -----------------------------------------------------------------------------------------------


@contextmanager
def open_folder(
    recipe: Recipe,
    run_dir: str | Path | None,
    state: PartialState,
    resume: str,
    allow_recipe_change: bool,
    num_samples: int,
    interrupts: Interrupts,
) -> Iterator[RunFolder]:
    """Creates or opens the run folder on rank 0 and yields it on every rank. Collective: call on every rank.

    Inside the context rank 0 holds the lock of the folder, and an exception sets the status to `failed`. If `resume`
    names a checkpoint or another run, its checkpoint is copied into the new folder.

    Args:
        num_samples: the number of training images.
        interrupts: the stop requests. A request ends the process while it watches the lock of another machine.

    Raises:
        RecipeError: the folder cannot be used, or there is no checkpoint to resume from.
    """
    with ExitStack() as held:

        def open_on_main() -> RunFolder | None:
            if not state.is_main_process:
                return None
            refuse_missing_trackers(recipe)
            # When the same command runs again after a kill, the folder's own checkpoints are newer than the source,
            # and the source may be gone.
            starts_from_source = resume not in ("auto", "never") and not holds_checkpoint(run_dir)
            source = find_checkpoint(resume, recipe, allow_recipe_change) if starts_from_source else None
            folder = RunFolder.create(run_dir, recipe)
            # Before the lock: nothing may be written into a folder that holds something else.
            folder.refuse_content(recipe, resume, allow_recipe_change)
            refuse_lengths(recipe, num_samples, folder, source[1] if source else None)
            try:
                lock = held.enter_context(RunLock(folder.path, interrupts.exit_before_start))
            except OSError as error:
                raise unwritable(error, run_dir) from error
            opened = RunFolder.open(folder.path, recipe, resume, allow_recipe_change)
            if source:
                adopt(folder, *source, recipe.checkpoint.keep)
            return replace(opened, end_if_lost=lock.end_if_lost)

        opened = run_on_all_ranks(state, open_on_main)
        path = broadcast_object_list([str(opened.path) if opened else None])[0]
        folder = opened or RunFolder(Path(path))
        with folder.failed_on_error(state.is_main_process):
            yield folder


def refuse_lengths(recipe: Recipe, num_samples: int, folder: RunFolder, source: dict[str, Any] | None) -> None:
    """Checks the length of the run against the checkpoint that it will resume from, if there is one.

    Args:
        num_samples: the number of training images.
        folder: the run folder.
        source: the state of another run's checkpoint that the run starts from.

    Raises:
        RecipeError: no step is left, or the steps already made would have had other learning rates.
    """
    if source:
        return refuse_length(recipe, num_samples, source)
    if not folder.recipe.is_file() or not (
        folder.is_done or describe_changes(load_recipe(folder.recipe, import_code=False), recipe)
    ):
        return None
    for path in reversed(list_checkpoints(folder.checkpoints)):
        try:
            checkpoint = load_checkpoint(path)
        except ValueError:  # damaged: `load_newest` reports it
            continue
        return refuse_length(recipe, num_samples, checkpoint, str(folder.path) * folder.is_done)
    return None


def finished_results(
    recipe: Recipe, run_dir: str | Path | None, state: PartialState, resume: str
) -> dict[str, Any] | None:
    """Returns the summary of the run in `run_dir` and prints a line, if that run has finished with this recipe.

    Collective: call on every rank.

    Returns:
        The values of summary.json; None if there is something to train or to refuse.
    """

    def read() -> dict[str, Any] | None:
        if run_dir is None or resume == "never" or not state.is_main_process:
            return None
        folder = RunFolder(Path(run_dir))
        results = folder.results
        if results is None or folder.links():
            return None
        if describe_changes(load_recipe(folder.recipe, import_code=False), recipe):
            return None
        split, last, best = (results.get(f"eval.{key}", 0.0) for key in ("split", "last.accuracy", "best.accuracy"))
        line = f"already done: {split} accuracy {last:.2f} % at the last epoch, best {best:.2f} %; run folder {run_dir}"
        print(line, file=SafeStream(sys.stdout))  # a full disk does not make this command a failure
        return results

    results = run_on_all_ranks(state, read)
    return broadcast_object_list([results])[0]


def has_checkpoint(run_dir: str | Path | None, resume: str, state: PartialState) -> bool:
    """Returns whether the run will start from a checkpoint, valid or damaged. Collective: call on every rank."""
    found = resume not in ("auto", "never") or (state.is_main_process and holds_checkpoint(run_dir))
    return broadcast_object_list([found])[0]


def holds_checkpoint(run_dir: str | Path | None) -> bool:
    """Returns whether a run folder holds a checkpoint, valid or damaged."""
    with suppress(OSError):  # a folder that cannot be read is reported when it is opened
        return run_dir is not None and bool(list_checkpoints(RunFolder(Path(run_dir)).checkpoints))
    return False


# --- a checkpoint of another run ----------------------------------------------------------------------------------


def find_checkpoint(source: str, recipe: Recipe, allow_recipe_change: bool) -> tuple[RunFolder, dict[str, Any]]:
    """Finds the checkpoint that a new run starts from.

    Args:
        source: a checkpoint, or a run folder, whose newest valid checkpoint is taken.
        recipe: the recipe of the new run.
        allow_recipe_change: accept a recipe that changes the result.

    Returns:
        The run folder that the checkpoint lies in, and the checkpoint's state.

    Raises:
        RecipeError: there is no valid checkpoint, or it belongs to another recipe.
    """

    def refusal(message: str, kind: Kind) -> RecipeError:
        return RecipeError([Problem("command line", "--resume", message, kind)])

    path = Path(source)
    named = [path] if path.name.startswith("step-") else list_checkpoints(path / "checkpoints")[::-1]
    candidates = [each for each in named if each.exists()]
    if not candidates:
        raise refusal(f"{path} holds no checkpoint; name a run folder or its checkpoints/step-N", "missing")
    problems = []
    for candidate in candidates:
        try:
            state = load_checkpoint(candidate)
            _check_position(candidate, state)
            break
        except ValueError as error:
            problems.append(str(error))
    else:
        raise refusal("\n".join(problems), "damaged")
    origin = RunFolder(candidate.absolute().parent.parent)
    if origin.recipe.is_file():
        given = load_recipe(origin.recipe, import_code=False)
        way = "give these keys the values that they had"
        if changes := refuse_changes(given, recipe, allow_recipe_change, other_way=way):
            raise refusal(f"{candidate} belongs to a run of another recipe:\n{changes}", "conflict")
    return origin, state


def _check_position(path: Path, state: dict[str, Any]) -> None:
    """Checks the values of a checkpoint that become part of a path and a position in a file.

    Raises:
        ValueError: one of the values is not a whole number from 0. The checkpoint may come from a stranger.
    """
    progress = state.get("progress") if isinstance(state, dict) else None
    numbers = [progress.get("step") if isinstance(progress, dict) else None, state.get("metrics_bytes", 0)]
    if any(type(each) is not int or each < 0 for each in numbers):
        raise ValueError(f"{path} is damaged: its step or its metrics_bytes is not a valid number")


def adopt(folder: RunFolder, origin: RunFolder, state: dict[str, Any], keep: int) -> None:
    """Copies another run's checkpoint with its best weights, and its metrics up to that step, into a new folder."""
    if origin.metrics.is_file() and not origin.leaves(origin.metrics):
        write_atomically(folder.metrics, origin.metrics.read_bytes()[: state.get("metrics_bytes", 0)])
    if "best" in state:
        write_atomically(folder.best, state["best"].numpy().tobytes())
    state = {key: value for key, value in state.items() if key != "wandb_id"}  # the new run is a new W&B run
    save_checkpoint(folder.checkpoints, state["progress"]["step"], state, keep=keep)


# --- the checkpoint of this run -----------------------------------------------------------------------------------


def load_newest(
    folder: RunFolder, state: PartialState, recipe: Recipe, data: Images, allow_recipe_change: bool
) -> tuple[dict[str, Any], list[str]]:
    """Loads the newest valid checkpoint and restores its best weights. Collective: call on every rank.

    Args:
        recipe: the recipe of the run that resumes. A checkpoint of another plan is replaced by a converted one.
        data: the training images of the run that resumes.
        allow_recipe_change: see `compare_data`.

    Returns:
        The checkpoint's state, equal on all ranks, empty if there is none; and messages: damaged files, other data.

    Raises:
        RecipeError: the classes of the data have changed.
    """

    def load_on_main() -> tuple[dict[str, Any], list[str]] | None:
        if not state.is_main_process:
            return None
        checkpoint, problems = newest_checkpoint(folder.checkpoints)
        if checkpoint:
            # Before the conversion: a refused run changes nothing.
            problems += compare_data(recipe, data, checkpoint, allow_recipe_change)
            checkpoint, message = _convert(folder.checkpoints, checkpoint, Plan.of(recipe, len(data)))
            problems += [message] if message else []
        if checkpoint and "best" in checkpoint:
            problems += _restore_best(checkpoint.pop("best"), folder.best)
        return checkpoint or {}, problems

    checkpoint, problems = broadcast_object_list([run_on_all_ranks(state, load_on_main)])[0]
    return checkpoint, problems


def _convert(folder: Path, checkpoint: dict[str, Any], plan: Plan) -> tuple[dict[str, Any], str]:
    """Converts a checkpoint to the plan, on disk too: old checkpoints with higher step numbers would look newer.

    The original checkpoint is removed last, so a process that is killed on the way leaves what the next one needs.
    """
    state, message = converted(checkpoint, plan)
    source, target = (folder / f"step-{each['progress']['step']}" for each in (checkpoint, state))
    if message and target != source:
        others = [path for path in list_checkpoints(folder) if path != source]
        for path in others:
            remove(path)
        save_checkpoint(folder, state["progress"]["step"], state, keep=sys.maxsize)
        remove(source)
    return state, message


def components_state(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Returns the state of the training components that a checkpoint holds."""
    # Earlier versions wrote "parts". A run that one of them started must resume.
    return checkpoint["components" if "components" in checkpoint else "parts"]


def file_bytes(path: Path) -> torch.Tensor:
    """Returns the content of a file as a uint8 tensor, which a checkpoint can hold."""
    return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)


def _restore_best(content: torch.Tensor, best: Path) -> list[str]:
    """Writes the checkpoint's best weights if the file differs; returns a message if the file is damaged or missing."""
    try:
        load_weights(best)
        problems = []
    except (OSError, ValueError) as error:
        problems = [f"{error}; restored from the checkpoint"]
    if problems or not torch.equal(file_bytes(best), content):
        write_atomically(best, content.numpy().tobytes())
    return problems
