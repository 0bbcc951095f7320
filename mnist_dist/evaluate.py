"""A run folder -> accuracy, loss, classes, confusions, calibration: `python -m mnist_dist.evaluate runs/simple_cnn/…`.

With the run's own data the numbers are those of its last evaluation, to the image: same code, batches, precision.
"""

from __future__ import annotations

from mnist_dist.cli import answer_early, parse, run_command

if __name__ == "__main__":
    answer_early("evaluate")  # before the imports below load torch

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from rich.table import Table
from torch import Tensor

from mnist_dist.data import Images
from mnist_dist.distributed.launcher import choose_threads, launched_world
from mnist_dist.engine.evaluation import Evaluation
from mnist_dist.engine.evaluation import evaluate as judge
from mnist_dist.errors import Problem, RecipeError
from mnist_dist.recipe.schema import Recipe, load_recipe
from mnist_dist.run.build import load_data, set_determinism, set_kernels, to_device
from mnist_dist.run.folder import Run, open_run
from mnist_dist.run.tables import table_console

BINS = 15
"""Of equal width, as in Guo et al., "On Calibration of Modern Neural Networks", ICML 2017."""


def evaluate(run: Run, *overrides: str, split: str = "test") -> dict[str, Any]:
    """Judges a run's network on its own data, or on other data that `overrides` name.

    Args:
        overrides: recipe keys, e.g. `data.dataset=kmnist`.
        split: "test", or "validation" for the images that the recipe held out.

    Returns:
        `accuracy` (percent), `loss`, `images`, `calibration_error` (0 to 1), `classes` (for each its `images`,
        `correct` and `accuracy`), `confusion` (rows: truth, columns: prediction), `weights`, `split`, `dataset`.

    Raises:
        RecipeError: no such data, or data of another number of classes.
        OSError, ValueError: no whole weights there.
    """
    recipe, data = read_data(run, *overrides, split=split)
    return report(evaluate_run(run, recipe, data), data.labels, data.classes) | {
        "dataset": recipe.data.dataset,
        "split": split,
        "weights": run.weights,
    }


def read_data(run: Run, *overrides: str, split: str = "test") -> tuple[Recipe, Images]:
    """The run's recipe with `overrides`, and the images that it is to be judged on; the rest is as for `evaluate`."""
    recipe = load_recipe(run.folder.recipe, *overrides)
    dataset = load_data(recipe, launched_world())
    if split == "validation" and not dataset.has_validation:
        raise RecipeError([Problem("command line", "--split", "this run held no validation images out")])
    data, classes = dataset.held_out if split == "validation" else dataset.test, run.about["classes"]
    if len(classes) != len(data.classes):
        what = f"{recipe.data.dataset} has {len(data.classes)} classes, the network {len(classes)}"
        raise RecipeError([Problem("command line", "data.dataset", what)])
    return recipe, data


def evaluate_run(run: Run, recipe: Recipe, data: Images) -> Evaluation:
    """The network's evaluation in the recipe's precision and batches."""
    choose_threads(launched_world())
    set_determinism(recipe.deterministic)
    set_kernels(recipe)
    AcceleratorState._reset_state()  # a notebook may evaluate runs of two precisions
    accelerator = Accelerator(mixed_precision=recipe.mixed_precision or "no")
    # A copy: the run's own stays on the CPU for whoever asks it next.
    module = to_device(copy.deepcopy(run.model), accelerator.device, channels_last=recipe.engine.channels_last)
    # Normalised as the network was trained, also on other data.
    images = Images(data.images, data.labels, data.classes, run.about["mean"], run.about["std"]).to(accelerator.device)
    return judge(accelerator, module, images, batch_size=recipe.eval_batch_size)


def report(found: Evaluation, labels: Tensor, classes: tuple[str, ...]) -> dict[str, Any]:
    """An evaluation in plain values, class by class."""
    counts, hits = found.confusion.sum(dim=1).tolist(), found.confusion.diagonal().tolist()
    return {
        "accuracy": found.accuracy,
        "loss": found.loss,
        "images": len(labels),
        "calibration_error": calibration_error(found.probabilities, labels),
        "classes": {
            name: {"images": count, "correct": hit, "accuracy": 100 * hit / count if count else None}
            for name, count, hit in zip(classes, counts, hits, strict=True)
        },
        "confusion": found.confusion.tolist(),
    }


def calibration_error(probabilities: Tensor, labels: Tensor) -> float:
    """Expected calibration error: how far confidence is from accuracy, averaged over bins of confidence.

    Args:
        probabilities: float32 (N, classes). labels: int64 (N,).
    """
    confidence, predictions = probabilities.double().max(dim=1)
    correct = (predictions == labels).double()
    bins = (confidence * BINS).ceil().long().sub(1).clamp(0, BINS - 1)
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add(0, bins, correct - confidence)
    return float(gaps.abs().sum() / len(labels))


def write_report(path: Path | None, result: dict[str, Any]) -> None:
    """Writes the report as JSON, where a file was named.

    Raises:
        RecipeError: it cannot be written.
    """
    try:
        if path:
            path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise RecipeError(
            [Problem("command line: --json", "", f"{path} cannot be written: {error.strerror}")]
        ) from error


def show(result: dict[str, Any], classes: list[str]) -> None:
    """The report as two tables."""
    console = table_console()
    console.print(
        f"{result['accuracy']:.2f} % of {result['images']:,} images ({result['dataset']}, {result['split']}), "
        f"loss {result['loss']:.4f}, calibration error {result['calibration_error']:.4f}, {result['weights']} weights",
        highlight=False,
    )
    table = Table("class", "accuracy", "images", *classes, box=None, title="rows: truth, columns: prediction")
    for (name, each), row in zip(result["classes"].items(), result["confusion"], strict=True):
        accuracy = "" if each["accuracy"] is None else f"{each['accuracy']:.2f} %"
        table.add_row(name, accuracy, str(each["images"]), *(str(count) if count else "·" for count in row))
    console.print(table)


def main(argv: list[str] | None = None) -> int:
    """The door: exit code 0, or 2 for a folder or data that cannot be judged."""
    arguments = parse("evaluate", argv)
    run = open_run(arguments.run, arguments.weights)
    data = [f"data.dataset={arguments.data}"] if arguments.data else []
    result = evaluate(run, *data, *arguments.overrides, split=arguments.split)
    if launched_world().is_main_process:
        write_report(arguments.json, result)
        show(result, list(result["classes"]))
    launched_world().destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
