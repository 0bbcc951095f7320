"""Trains what a recipe says and leaves a run folder: `accelerate launch -m mnist_dist.train --recipe resnet18.yaml`.

`fit` is the loop; `train` wires its parts; `main` reads the command line.
"""

from __future__ import annotations

import json
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from rich.console import Console
from rich.table import Table

from mnist_dist.command_line import Parser, is_main_process, run_door
from mnist_dist.data import Batches, Dataset, Images
from mnist_dist.engine.evaluation import Evaluation
from mnist_dist.engine.optim import set_rates
from mnist_dist.models import build_model, count_parameters
from mnist_dist.parts import (
    Parts,
    build_module,
    build_parts,
    check_world,
    device_name,
    launched_world,
    load_data,
    together,
)
from mnist_dist.recipe import Recipe, bundled_recipes, load_recipe, recipe_notes
from mnist_dist.reports.model_summary import summarize_model
from mnist_dist.runs import RunFolder, git_commit, load_run, versions, write_text
from mnist_dist.tracking import ConsoleTracker, JSONLTracker, WandbTracker, resolve_mode

EXAMPLES = """\
examples:
  accelerate launch -m mnist_dist.train --recipe quickstart.yaml
  accelerate launch -m mnist_dist.train --recipe model_v3_onecycle epochs=1 optimizer.lr=0.05 data.root=/data
  python -m mnist_dist.train --recipe my_recipes/wide.yaml mixed_precision=bf16
  python -m mnist_dist.train --recipe ms_ran --print-recipe
"""

# --- the loop -----------------------------------------------------------------------------------------------------


@dataclass
class Progress:
    """Where a run stands; everything else follows from the step."""

    step: int = 0
    best_accuracy: float = -1.0
    best_epoch: float = 0.0
    evaluations_without_gain: int = 0
    last: dict[str, float] = field(default_factory=dict)
    """Figures of the last evaluation and of the training since the one before."""


def fit(recipe: Recipe, parts: Parts, held_out: Images, keep_best: Callable[[], None], progress: Progress) -> None:
    """The story of a run, from `progress` to the last step."""
    accelerator, batches, update = parts.accelerator, parts.batches, parts.update
    plan = batches.plan(progress.step // batches.steps_per_epoch, accelerator.device)
    while progress.step < parts.total_steps:
        epoch, index = divmod(progress.step, batches.steps_per_epoch)
        if epoch != plan.epoch:
            plan = batches.plan(epoch, accelerator.device)

        # One update: this process's rows of the global batch, the learning rate of this step.
        set_rates(update.optimizer, parts.schedule, progress.step)
        update(plan, index, progress.step)
        progress.step += 1
        at_end = progress.step == parts.total_steps
        at_epoch = at_end or index + 1 == batches.steps_per_epoch
        now = {"step": progress.step, "epoch": round(progress.step / batches.steps_per_epoch, 6)}

        # Log; between two of these lines nothing waits for the device.
        if at_epoch or progress.step % recipe.log_every == 0:
            rates = {"train/lr": update.optimizer.param_groups[0]["lr"], "train/grad_norm": update.grad_norm()}
            accelerator.log({**now, **parts.meter.read(), **rates})

        # Evaluate every image once, keep the best weights, stop early where the recipe asks for it.
        if at_end or (at_epoch and (epoch + 1) % recipe.eval_every == 0):
            evaluation = parts.judge(held_out, recipe.eval_batch_size)
            progress.last = {
                **parts.meter.read_epoch(),
                "eval/loss": evaluation.loss,
                "eval/accuracy": evaluation.accuracy,
            }
            accelerator.log({**now, **progress.last})
            parts.schedule.observe(evaluation.loss)
            progress.evaluations_without_gain += 1
            if evaluation.accuracy > progress.best_accuracy:
                progress.best_accuracy, progress.best_epoch = evaluation.accuracy, now["epoch"]
                progress.evaluations_without_gain = 0
                keep_best()
            if progress.evaluations_without_gain == recipe.early_stopping.patience:
                break
            parts.meter.resume()


# --- wiring -------------------------------------------------------------------------------------------------------


def train(recipe: Recipe, run_dir: str | Path | None = None) -> dict[str, Any]:
    """Trains a recipe on whatever world the launcher made, and returns the summary that it writes.

    Args:
        recipe: from `load_recipe`.
        run_dir: a folder that is empty or absent; None for runs/<recipe>/<date-time>.

    Raises:
        RecipeError: before anything is trained or written, for whatever the user can put right.
    """
    started = time.perf_counter()
    state = launched_world()
    precision = check_world(recipe, state)
    dataset = load_data(recipe, state)
    module = together(state, lambda: build_module(recipe, dataset))
    made = together(state, lambda: RunFolder.create(run_dir, recipe) if state.is_main_process else None)
    folder = RunFolder(Path(broadcast_object_list([str(made.path) if made else None])[0]))
    try:
        parts = build_parts(recipe, precision, dataset.train, module)
        console = open_trackers(recipe, parts, dataset, folder)
        progress = Progress()
        parts.meter.resume()
        setup_seconds, begun = time.perf_counter() - started, time.perf_counter()
        fit(
            recipe,
            parts,
            dataset.held_out.to(state.device),
            lambda: parts.keep(folder.best, recipe),
            progress,
        )
        seconds = {"train_seconds": round(time.perf_counter() - begun, 3), "setup_seconds": round(setup_seconds, 3)}
        parts.keep(folder.last, recipe)
        # Without a validation part this repeats the last evaluation, for its probabilities; with one, the test set
        # is used here for the first time.
        test = parts.judge(dataset.test.to(state.device), recipe.eval_batch_size)
        summary = _summarize(recipe, parts, progress, test if dataset.has_validation else None) | seconds
        if state.is_main_process:
            assert console is not None
            _finish(folder, recipe, parts, dataset, test, summary, console)
        parts.accelerator.end_training()
    except BaseException:
        if state.is_main_process:
            folder.set_status("failed")
        raise
    return summary


# --- the run folder -----------------------------------------------------------------------------------------------


def open_trackers(
    recipe: Recipe, parts: Parts, dataset: Dataset, folder: RunFolder, *, quiet: bool = False
) -> ConsoleTracker | None:
    """Console, metrics.jsonl and W&B, on rank 0 alone."""
    if not parts.accelerator.is_main_process:
        return None
    split = "validation" if dataset.has_validation else "test"
    console = ConsoleTracker(parts.total_steps, recipe.epochs, split, folder.console, quiet=quiet)
    wandb = recipe.tracking.wandb
    mode, why = resolve_mode(wandb.mode)
    summary = summarize_model(parts.module)
    write_text(folder.model_summary, summary + "\n")
    console.header(_header(recipe, parts, dataset) | {"wandb": why, "run folder": str(folder.path)})
    trackers: list[Any] = [console, JSONLTracker(folder.metrics)]
    if mode != "disabled":
        init = {"name": recipe.name, "entity": wandb.entity, "group": wandb.group, "tags": wandb.tags}
        trackers.append(WandbTracker(wandb.project, mode=mode, directory=folder.path, say=console.say, **init))
    parts.accelerator.log_with = trackers
    parts.accelerator.init_trackers(wandb.project, config=recipe.model_dump())
    return console


def _header(recipe: Recipe, parts: Parts, dataset: Dataset) -> dict[str, str]:
    accelerator, held_out = parts.accelerator, f"{len(dataset.test):,} test"
    if dataset.has_validation:
        held_out = f"{len(dataset.held_out):,} validation, {held_out}"
    processes = "1 process" if accelerator.num_processes == 1 else f"{accelerator.num_processes} processes"
    return {
        "recipe": recipe.name,
        "model": f"{recipe.model.name}, {count_parameters(parts.module):,} parameters",
        "data": f"{recipe.data.dataset}, {len(dataset.train):,} training, {held_out} images",
        "length": f"{recipe.epochs} epochs of {parts.batches.steps_per_epoch} steps, global batch {recipe.batch_size}",
        "world": f"{processes} on {device_name(accelerator.device)}, precision {accelerator.mixed_precision}",
    }


def _summarize(recipe: Recipe, parts: Parts, progress: Progress, test: Evaluation | None) -> dict[str, Any]:
    full_epochs, rest = divmod(progress.step, parts.batches.steps_per_epoch)
    images = full_epochs * parts.batches.num_samples + rest * recipe.batch_size
    summary = {
        "recipe": recipe.name,
        "model": recipe.model.name,
        "parameters": count_parameters(parts.module),
        "seed": recipe.seed,
        "world_size": parts.accelerator.num_processes,
        "device": device_name(parts.accelerator.device),
        "mixed_precision": parts.accelerator.mixed_precision,
        "epochs": round(progress.step / parts.batches.steps_per_epoch, 6),
        "steps": progress.step,
        "images_per_second": round(images / parts.meter.train_seconds, 1),
        "train.last.loss": progress.last["train/epoch_loss"],
        "train.last.accuracy": progress.last["train/epoch_accuracy"],
        "eval.split": "validation" if test else "test",
        "eval.last.accuracy": progress.last["eval/accuracy"],
        "eval.last.loss": progress.last["eval/loss"],
        "eval.best.accuracy": progress.best_accuracy,
        "eval.best.epoch": progress.best_epoch,
        "versions": versions(),
        "git_commit": git_commit(),
    }
    return summary | ({"test.accuracy": test.accuracy, "test.loss": test.loss} if test else {})


def _finish(
    folder: RunFolder,
    recipe: Recipe,
    parts: Parts,
    dataset: Dataset,
    test: Evaluation,
    summary: dict[str, Any],
    console: ConsoleTracker,
) -> None:
    """Writes the summary and the pictures, on rank 0."""
    from mnist_dist.reports import plots  # matplotlib: not before the first step

    write_text(folder.summary, json.dumps(summary, indent=2) + "\n")
    metrics, classes, title = load_run(folder.path).metrics, dataset.test.classes, recipe.name
    plots.plot_training_history(
        metrics, folder.plots / "training_history.png", title=title, eval_name=summary["eval.split"]
    )
    plots.plot_predictions(
        dataset.test.images,
        dataset.test.labels,
        test.probabilities,
        folder.plots / "predictions.png",
        classes=classes,
        title=title,
    )
    originals, warped = _augmented_samples(parts.batches, dataset.train)
    plots.plot_augmented_samples(originals, warped, folder.plots / "augmented_samples.png", title=title)
    for tracker in parts.accelerator.trackers:
        if isinstance(tracker, WandbTracker):
            tracker.summarize(summary)
    best = f"best {summary['eval.best.accuracy']:.2f} % at epoch {summary['eval.best.epoch']:g}"
    last = f"{summary['eval.split']} accuracy {summary['eval.last.accuracy']:.2f} % at the last epoch"
    console.say(f"done in {summary['train_seconds']:.1f} s: {last}, {best}")
    folder.set_status("done")


def _augmented_samples(batches: Batches, data: Images, count: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    """The first images of epoch 0, as they are and as the first step sees them."""
    plan = batches.plan(0)
    rows = plan.order[:count]
    originals = data.images[rows]
    if plan.warps is None or batches.augmentation is None:
        return originals, originals
    return originals, batches.augmentation.apply(originals.float(), plan.warps[rows])


# --- the command line ---------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """The door: exit code 0 when done, 2 for bad input."""
    parser = Parser("mnist_dist.train", "Trains a recipe and leaves a run folder.", EXAMPLES)
    parser.add_argument("--recipe", metavar="NAME", help="a path, or a bundled recipe's name with or without .yaml")
    parser.add_argument("--run-dir", metavar="DIR", help="an empty or new folder (default: runs/<recipe>/<date-time>)")
    parser.add_argument("--print-recipe", action="store_true", help="print the resolved recipe and exit")
    parser.add_argument("--list-recipes", action="store_true", help="print the bundled recipes and exit")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any recipe key by its dotted name")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.list_recipes:
        if is_main_process():
            list_recipes()
        return 0
    if arguments.recipe is None:
        parser.error("--recipe NAME is needed; --list-recipes shows the bundled ones")
    recipe = load_recipe(arguments.recipe, *arguments.overrides)
    if arguments.print_recipe:
        if is_main_process():
            print(recipe.to_yaml(), end="")
        return 0
    train(recipe, arguments.run_dir)
    return 0


def list_recipes() -> None:
    """Prints name, model, parameters and the document's claim of every bundled recipe."""
    table = Table("recipe", "model", "parameters", "claim", box=None)
    for name, path in bundled_recipes().items():
        model = load_recipe(path).model
        with torch.device("meta"):
            parameters = count_parameters(build_model(model.name, **model.keywords))
        table.add_row(name, model.name, f"{parameters:,}", recipe_notes(path).get("claim", ""))
    console = Console()
    console.print(table) if console.is_terminal else Console(width=160).print(table)


class _CallableModule(types.ModuleType):
    """`mnist_dist.train` names this module and, for `from mnist_dist import train`, its function: be both."""

    __call__ = staticmethod(train)


sys.modules[__name__].__class__ = _CallableModule

if __name__ == "__main__":
    sys.exit(run_door(main))
