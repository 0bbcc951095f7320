"""Trains what a recipe says and leaves a run folder: `accelerate launch -m mnist_dist.train --recipe resnet18.yaml`.

`fit` is the loop; `train` wires its parts; `main` reads the command line.
"""

from __future__ import annotations

from mnist_dist.cli import answer_early, is_main_process, parser_of, run_command

if __name__ == "__main__":
    answer_early("train")  # before the imports below load torch

import sys
import time
import types
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from rich.table import Table

from mnist_dist.data import Images
from mnist_dist.distributed.collectives import run_on_all_ranks
from mnist_dist.distributed.devices import choose_threads
from mnist_dist.distributed.launcher import check_size, launched_world
from mnist_dist.distributed.signals import PREEMPTED, Interrupts
from mnist_dist.distributed.watchdog import Watchdog
from mnist_dist.engine.evaluation import Interrupted
from mnist_dist.engine.files import write_text
from mnist_dist.engine.schedules import set_rates
from mnist_dist.models import build_model, count_parameters
from mnist_dist.recipe.file import bundled_recipes, recipe_notes
from mnist_dist.recipe.loading import load_recipe
from mnist_dist.recipe.reference import explain
from mnist_dist.recipe.schema import Recipe
from mnist_dist.run.build import build_components, check_world, load_data
from mnist_dist.run.checkpointing import Checkpointer
from mnist_dist.run.components import Progress, TrainingComponents
from mnist_dist.run.folder import RunFolder
from mnist_dist.run.model_setup import build_module
from mnist_dist.run.model_summary import summarize_model
from mnist_dist.run.pretrained import load_initial_weights, load_teachers
from mnist_dist.run.provenance import git_commit, versions
from mnist_dist.run.resume import adopt, find_checkpoint, has_checkpoint, holds_checkpoint, load_newest
from mnist_dist.run.summary import close_trackers, open_trackers, summarize, write_outputs
from mnist_dist.run.tables import table_console
from mnist_dist.tracking import WandbTracker, find_tracker

# --- the loop -----------------------------------------------------------------------------------------------------


def fit(
    recipe: Recipe, components: TrainingComponents, held_out: Images, checkpointer: Checkpointer, progress: Progress
) -> bool:
    """The story of a run, from `progress` to its last step. False if it was asked to stop before; then it has saved."""
    accelerator, batches, update, meter = (
        components.accelerator,
        components.batches,
        components.update,
        components.meter,
    )
    plan = batches.plan(progress.step // batches.steps_per_epoch, accelerator.device)
    watchdog = Watchdog(accelerator, recipe.engine.hang_seconds, update.clock, checkpointer.mark_failed)
    with Interrupts(accelerator) as interrupts, watchdog:

        def asked_to_stop() -> bool:
            watchdog.beat(progress.step)
            return interrupts.stop_requested()

        while True:
            # Evaluate every image once; keep the best weights.
            if components.evaluation_is_due(progress, recipe.eval_every):
                try:
                    evaluation = components.evaluate(held_out, recipe.eval_batch_size, asked_to_stop)
                except Interrupted:
                    checkpointer.save()
                    return False
                if progress.note(evaluation, meter.read_epoch(), components.epoch(progress)):
                    checkpointer.save_best()
                accelerator.log({"step": progress.step, "epoch": components.epoch(progress), **progress.last})
                checkpointer.log_evaluation(evaluation)
                components.schedule.observe(evaluation.loss)
                meter.resume()

            # Stop at the end, or early where the recipe asks for it.
            patience = recipe.early_stopping.patience or sys.maxsize
            if progress.step >= components.total_steps or progress.evaluations_without_gain >= patience:
                return True

            # One update: this process's rows of the global batch, the learning rate of this step.
            epoch, index = divmod(progress.step, batches.steps_per_epoch)
            if epoch != plan.epoch:
                plan = batches.plan(epoch, accelerator.device)
            set_rates(update.optimizer, components.schedule, progress.step)
            update(plan, index, progress.step)
            progress.step += 1

            # Log; between two of these lines nothing waits for the device.
            logged = progress.step % recipe.log_every == 0 or components.evaluation_is_due(progress, recipe.eval_every)
            if logged:
                rates = {
                    "train/lr": components.schedule.lr_at(progress.step - 1),
                    "train/grad_norm": update.grad_norm(),
                }
                accelerator.log({"step": progress.step, "epoch": components.epoch(progress), **meter.read(), **rates})
                interrupts.set_interval(meter.seconds_per_step)

            # Save where it is time; stop where any process was asked to.
            asked = asked_to_stop()
            if asked or checkpointer.is_due(logged):
                checkpointer.save()
            if asked:
                return False


# --- wiring -------------------------------------------------------------------------------------------------------


def train(
    recipe: Recipe,
    run_dir: str | Path | None = None,
    *,
    resume: str = "auto",
    allow_recipe_change: bool = False,
    world_size: int | None = None,
) -> dict[str, Any]:
    """Trains a recipe on whatever world the launcher made, and returns the summary that it writes.

    Deterministic algorithms and the choice of kernels are the whole process's: they stay as the recipe set them.

    Args:
        recipe: from `load_recipe`.
        run_dir: a new folder, or one whose run goes on; None for runs/<recipe>/<date-time>.
        resume: "auto" to go on with the run that `run_dir` holds, "never" to refuse to, or the path of a run folder or
            checkpoint from which a new one begins.
        allow_recipe_change: go on although the recipe is not the one that the run began with.
        world_size: how many processes there should be; None for what the launcher was asked for, where that is known.

    Returns:
        What summary.json holds. Of a run that was asked to stop before its end only `status` (preempted) and `step`.

    Raises:
        RecipeError: before anything is trained or written, for whatever the user can put right.
        RunError: the run cannot go on: a gradient that is not finite, a full disk. What was saved stays whole.
    """
    started, code = time.perf_counter(), {"versions": versions(), "git_commit": git_commit()}
    state = launched_world()
    check_size(state, world_size)
    choose_threads(state)
    precision = check_world(recipe, state)
    recipe = recipe.model_copy(update={"mixed_precision": precision})  # a resume under another launcher sees the change
    dataset = load_data(recipe, state)
    module, notes = run_on_all_ranks(state, lambda: build_module(recipe, dataset, state.num_processes)), []
    teachers = run_on_all_ranks(state, lambda: load_teachers(recipe, dataset.train))
    # A checkpoint has all the weights: what the run once began from may be gone by then.
    goes_on = has_checkpoint(run_dir, resume, state)
    if not goes_on:
        notes = run_on_all_ranks(state, lambda: load_initial_weights(recipe, module))
    folder = _open_folder(recipe, run_dir, state, resume, allow_recipe_change)
    with folder.failed_on_error(state.is_main_process):
        if state.is_main_process:
            write_text(folder.model_summary, summarize_model(module) + "\n")
        checkpoint, problems = load_newest(folder, state)
        if goes_on and not checkpoint:  # all of them were damaged
            notes = run_on_all_ranks(state, lambda: load_initial_weights(recipe, module))
        components = build_components(recipe, precision, dataset.train, module, teachers)
        progress = Progress(**checkpoint.get("progress", {}))
        with Checkpointer(folder, recipe, components, progress) as checkpointer:
            if checkpoint:
                components.load_state_dict(checkpoint["parts"])
            console = open_trackers(recipe, components, dataset, folder, checkpoint)
            if console:
                for note in [*problems, *notes, *components.notes]:
                    console.message(note)
                if components.captured:
                    components.captured.notify = console.message
            components.accelerator.wait_for_everyone()  # W&B's start on rank 0 is no part of the others' first step
            components.meter.resume()
            seconds = {"setup_seconds": round(time.perf_counter() - started, 3)}
            checkpointer.start(checkpoint.get("train_seconds", 0.0))
            finished = fit(recipe, components, dataset.held_out.to(state.device), checkpointer, progress)
            if not finished:
                if console:
                    console.message(
                        f"asked to stop: saved after step {progress.step:,}; the same command goes on from there"
                    )
                    folder.set_status("preempted")
                if wandb := find_tracker(components.accelerator, WandbTracker):
                    wandb.preempt(PREEMPTED)
                _close(components)
                return {"status": "preempted", "step": progress.step}
            seconds["train_seconds"] = checkpointer.train_seconds()
            checkpointer.save_last()
            # Without a validation part this repeats the last evaluation, for its probabilities; with one, the test set
            # is used here for the first time.
            test = components.evaluate(dataset.test.to(state.device), recipe.eval_batch_size)
            summary = summarize(recipe, components, progress, test if dataset.has_validation else None) | seconds | code
            if console:
                write_outputs(folder, recipe, components, dataset, test, summary, console)
            _close(components)
    return summary


def _close(components: TrainingComponents) -> None:
    """Lets the trackers finish. Not end_training, which ends the process group too: train may be called again."""
    close_trackers(components)
    components.accelerator.wait_for_everyone()


def _open_folder(
    recipe: Recipe, run_dir: str | Path | None, state: PartialState, resume: str, allow_recipe_change: bool
) -> RunFolder:
    """Rank 0 makes or opens the folder; all learn which it is."""

    def on_main() -> RunFolder | None:
        if not state.is_main_process:
            return None
        # The same command again, after it was killed: the folder's own are further on, and the source may be gone.
        named = resume not in ("auto", "never") and not holds_checkpoint(run_dir)
        source = find_checkpoint(resume, recipe, allow_recipe_change) if named else None
        folder = RunFolder.open(run_dir, recipe, resume, allow_recipe_change)
        if source:
            adopt(folder, *source, recipe.checkpoint.keep)
        return folder

    opened = run_on_all_ranks(state, on_main)
    return RunFolder(Path(broadcast_object_list([str(opened.path) if opened else None])[0]))


# --- the command line ---------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """The door: exit code 0 when done, 1 where it broke off, 2 for bad input, 75 when asked to stop (run me again)."""
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
        parser.error("--recipe NAME is needed; --list-recipes shows the bundled ones")
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
    )
    launched_world().destroy_process_group()
    return PREEMPTED if result.get("status") == "preempted" else 0


def list_recipes() -> None:
    """Prints name, model, parameters and the document's claim of every bundled recipe."""
    table = Table("recipe", "model", "parameters", "claim", box=None)
    for name, path in bundled_recipes().items():
        model = load_recipe(path).model
        with torch.device("meta"):
            parameters = count_parameters(build_model(model.name, **model.keywords))
        table.add_row(name, model.name, f"{parameters:,}", recipe_notes(path).get("claim", ""))
    table_console().print(table)


class _CallableModule(types.ModuleType):
    """`mnist_dist.train` names this module and, for `from mnist_dist import train`, its function: be both."""

    __call__ = staticmethod(train)


sys.modules[__name__].__class__ = _CallableModule

if __name__ == "__main__":
    sys.exit(run_command(main))
