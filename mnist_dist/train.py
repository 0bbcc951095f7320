"""Trains a recipe and writes a run folder: `accelerate launch -m mnist_dist.train --recipe resnet18`.

`fit` is the training loop, `train` builds what the loop needs, `main` is the command line.
"""

from __future__ import annotations

from mnist_dist.cli import answer_early, parser_of, run_command
from mnist_dist.distributed.signals import PREEMPTED, Interrupts, exit_on_signals

if __name__ == "__main__":
    exit_on_signals()  # before the imports below load torch
    answer_early("train")

import sys
import time
import types
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.table import Table
from torch import nn

from mnist_dist.data import Images
from mnist_dist.data.sources import SHAPES
from mnist_dist.distributed.collectives import run_on_all_ranks, wait_for_all_ranks
from mnist_dist.distributed.devices import share_cores
from mnist_dist.distributed.launcher import check_size, end_process, launched_world
from mnist_dist.distributed.watchdog import Watchdog
from mnist_dist.engine.evaluation import Interrupted
from mnist_dist.engine.files import expand_path, write_atomically
from mnist_dist.engine.schedules import set_rates
from mnist_dist.errors import Problem, RecipeError, is_main_process
from mnist_dist.models import build_model, count_parameters
from mnist_dist.recipe.file import bundled_recipes, recipe_notes
from mnist_dist.recipe.loading import load_recipe
from mnist_dist.recipe.reference import explain
from mnist_dist.recipe.schema import Recipe
from mnist_dist.run.build import build_components, check_fit, check_world
from mnist_dist.run.checkpointing import Checkpointer
from mnist_dist.run.components import Progress, TrainingComponents
from mnist_dist.run.data import load_data
from mnist_dist.run.earlier_runs import load_initial_weights, load_teachers
from mnist_dist.run.folder import RunFolder
from mnist_dist.run.log_lines import LogLines
from mnist_dist.run.model_setup import prepare_model
from mnist_dist.run.model_summary import summarize_model
from mnist_dist.run.provenance import git_commit, versions
from mnist_dist.run.resume import components_state, finished_results, has_checkpoint, load_newest, open_folder
from mnist_dist.run.summary import finish_run, open_trackers, show_notes, stop_run
from mnist_dist.run.text_output import table_console

# --- the loop -----------------------------------------------------------------------------------------------------


def fit(
    recipe: Recipe,
    components: TrainingComponents,
    held_out: Images,
    checkpointer: Checkpointer,
    progress: Progress,
    interrupts: Interrupts | None = None,
) -> bool:
    """Trains from `progress` to the last step. Returns False if a signal stopped it earlier, after a checkpoint."""
    accelerator, batches, update = components.accelerator, components.batches, components.update
    lines, plan = LogLines(components), batches.plan(progress.step // batches.steps_per_epoch)
    watchdog = Watchdog(accelerator, recipe.engine.hang_seconds, update.clock, checkpointer.mark_failed)
    with interrupts or Interrupts(accelerator) as interrupts, watchdog:

        def asked_to_stop() -> bool:
            watchdog.beat(progress.step)
            return interrupts.stop_requested(checkpointer.has_failed)

        while True:
            # Evaluate every image once; keep the best weights.
            if components.evaluation_is_due(progress, recipe.eval_every):
                try:
                    evaluation = components.evaluate(held_out, recipe.eval_batch_size, asked_to_stop)
                except Interrupted:
                    lines.finish()
                    checkpointer.save(wait=True)
                    return False
                lines.finish()  # after the evaluation: a GPU gets its work before the host waits for the last steps
                if progress.note(evaluation, components.meter.read_epoch(), components.epoch(progress)):
                    checkpointer.save_best()
                accelerator.log({"step": progress.step, "epoch": components.epoch(progress), **progress.last})
                checkpointer.log_evaluation(evaluation)
                components.schedule.observe(evaluation.loss)
                components.meter.resume()

            # Stop after the last step, or early if the recipe asks for it.
            patience = recipe.early_stopping.patience or sys.maxsize
            if progress.step >= components.total_steps or progress.evaluations_without_gain >= patience:
                return True

            # One update: this process's rows of the global batch, the learning rate of this step.
            epoch, index = divmod(progress.step, batches.steps_per_epoch)
            plan = plan if plan.epoch == epoch else batches.plan(epoch)
            set_rates(update.optimizer, components.schedule, progress.step)
            update(plan, index, progress.step)
            progress.step += 1

            # Log. A GPU is not waited for: its figures are written one log line late.
            logged = progress.step % recipe.log_every == 0 or components.evaluation_is_due(progress, recipe.eval_every)
            if logged:
                lines.add(progress)
                interrupts.set_interval(components.meter.seconds_per_step)

            # Save if a checkpoint is due; save and stop if any process received a signal.
            asked = asked_to_stop()
            if asked or checkpointer.is_due(logged):
                lines.finish()
                checkpointer.save(wait=asked)
            if asked:
                return False


# --- wiring -------------------------------------------------------------------------------------------------------


def train(
    recipe: Recipe,
    run_dir: str | Path | None = None,
    *,
    resume: str = "auto",
    allow_recipe_change: bool = False,
    world_size: int | range | None = None,
    allow_code: Iterable[str] = (),
) -> dict[str, Any]:
    """Trains a recipe in a run folder. Collective: call on every rank.

    Args:
        run_dir: a new folder, or the folder of a run to resume; None for runs/<recipe>/<date-time>.
        resume: "auto": resume the run in `run_dir`; "never": refuse such a folder; else a run or checkpoint to start.
        allow_recipe_change: resume although the recipe has changed.
        world_size: the accepted numbers of processes; None for the number in the launcher's options, if it is known.
        allow_code: modules from which the networks of `distill.from` may be imported; see `load_run`.

    Returns:
        The values of summary.json, also of a run that was done before; after a signal only `status` and `step`.

    Raises:
        RecipeError: the user made a mistake; nothing was trained or written.
        RunError: the run cannot continue: a gradient is not finite, or the disk is full. Saved checkpoints are valid.
    """
    run_dir, resume = None if run_dir is None else expand_path(run_dir), str(expand_path(resume))
    started, code = time.perf_counter(), {"versions": versions(), "git_commit": git_commit()}
    state = _join_world(world_size)
    precision = check_world(recipe, state)
    recipe = recipe.model_copy(update={"mixed_precision": precision})  # a resume under another launcher sees the change
    if results := finished_results(recipe, run_dir, state, resume):
        return results
    dataset = load_data(recipe, state, allow_code)
    check_fit(recipe, dataset.train)
    prepared = run_on_all_ranks(state, lambda: prepare_model(recipe, dataset, state.num_processes, state.device))
    recipe, module = prepared.recipe, prepared.module
    teachers = run_on_all_ranks(state, lambda: load_teachers(recipe, dataset.train, allow_code))
    resumes = has_checkpoint(run_dir, resume, state)  # a checkpoint holds all weights; model.init_from may be gone
    notes = [] if resumes else run_on_all_ranks(state, lambda: load_initial_weights(recipe, module))
    interrupts, images = Interrupts(state), len(dataset.train)
    with interrupts, open_folder(recipe, run_dir, state, resume, allow_recipe_change, images, interrupts) as folder:
        _write_model_summary(folder, module, dataset.train.shape, state)
        checkpoint, problems = load_newest(folder, state, recipe, dataset.train, allow_recipe_change)
        if resumes and not checkpoint:  # every checkpoint was damaged: the run starts again
            notes = run_on_all_ranks(state, lambda: load_initial_weights(recipe, module))
        components = build_components(recipe, precision, dataset.train, module, teachers)  # sets determinism globally
        progress = Progress(**checkpoint.get("progress", {}))
        with closing(components), Checkpointer(folder, recipe, components, progress) as checkpointer:
            if checkpoint:
                components.load_state_dict(components_state(checkpoint))
            console = open_trackers(recipe, components, dataset, folder, checkpoint)
            show_notes(console, components, [*problems, *prepared.notes, *notes])
            wait_for_all_ranks()  # rank 0 starts W&B; the first step must not include that time
            components.meter.resume()
            seconds = {"setup_seconds": round(time.perf_counter() - started, 3)}
            checkpointer.start(checkpoint.get("train_seconds", 0.0))
            if not fit(recipe, components, components.place(dataset.held_out), checkpointer, progress, interrupts):
                return stop_run(folder, components, progress, console)
            seconds |= checkpointer.save_last()
            return finish_run(folder, recipe, components, progress, dataset, console, seconds | code, interrupts)


def _write_model_summary(folder: RunFolder, module: nn.Module, shape: tuple[int, ...], state: PartialState) -> None:
    if state.is_main_process:
        write_atomically(folder.model_summary, summarize_model(module, input_shape=shape) + "\n")


def _join_world(world_size: int | range | None) -> PartialState:
    state = launched_world()
    check_size(state, world_size)
    share_cores(state)
    return state


# --- the command line ---------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Runs the command. Returns exit code 0, or 75 if a signal stopped the run: the same command resumes it."""
    parser = parser_of("train")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.list_recipes:
        if is_main_process():
            list_recipes()
        return 0
    if arguments.explain is not None:
        if is_main_process():
            print(explain(arguments.explain))
        return 0
    if arguments.recipe is None:
        message = "name a recipe; --list-recipes prints the bundled ones"
        raise RecipeError([Problem("command line", "--recipe", message, "missing")])
    recipe = load_recipe(arguments.recipe, *arguments.overrides)
    if arguments.print_recipe:
        if is_main_process():
            print(recipe.to_yaml(), end="")
        return 0
    result = train(
        recipe,
        arguments.run_dir,
        resume=arguments.resume,
        allow_recipe_change=arguments.allow_recipe_change,
        world_size=arguments.world_size,
        allow_code=arguments.allow_code,
    )
    return PREEMPTED if result.get("status") == "preempted" else 0


def list_recipes() -> None:
    """Prints the name, model, number of parameters and claimed accuracy of every bundled recipe."""
    table = Table("recipe", "model", "parameters", "claim", box=None)
    for name, path in bundled_recipes().items():
        recipe = load_recipe(path)
        model, (channels, height, width) = recipe.model, SHAPES.get(recipe.data.dataset, SHAPES["mnist"])
        with torch.device("meta"):
            module = build_model(model.name, in_channels=channels, image_size=(height, width), **model.keywords)
        table.add_row(name, model.name, f"{count_parameters(module):,}", recipe_notes(path).get("claim", ""))
    table_console().print(table)


class _CallableModule(types.ModuleType):
    """Makes this module callable like its function `train`: after `from mnist_dist import train` both uses work."""

    __call__ = staticmethod(train)


sys.modules[__name__].__class__ = _CallableModule

if __name__ == "__main__":
    end_process(run_command(main))
