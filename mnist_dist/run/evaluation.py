"""Evaluates the network of a run folder and reports the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from mnist_dist.data import Images, describe_shape
from mnist_dist.distributed.devices import choose_threads, supports_precision
from mnist_dist.distributed.launcher import launched_world
from mnist_dist.engine.evaluation import Evaluation, Mirrored
from mnist_dist.engine.evaluation import evaluate as evaluate_module
from mnist_dist.engine.files import write_atomically
from mnist_dist.errors import Problem, RecipeError
from mnist_dist.recipe.loading import load_recipe
from mnist_dist.recipe.schema import Recipe
from mnist_dist.run.data import load_data
from mnist_dist.run.kernels import set_determinism, set_kernels
from mnist_dist.run.model_trial import copy_of, to_device
from mnist_dist.run.reader import Run

CALIBRATION_BINS = 15
"""Bins of equal width, as in Guo et al., "On Calibration of Modern Neural Networks", ICML 2017."""


def load_evaluation_data(run: Run, *overrides: str, split: str = "test") -> tuple[Recipe, Images]:
    """Returns a run's recipe with `overrides` applied, and the images of one of its splits.

    Collective: call on every rank.

    Args:
        overrides: recipe keys, e.g. `data.dataset=kmnist`.
        split: "test" or "validation".

    Raises:
        RecipeError: the data cannot be read, the run has no validation images, or the data has another number of
            classes than the network.
    """
    recipe = load_recipe(run.folder.recipe, *overrides, import_code=False)
    dataset = load_data(recipe, launched_world(), run.allow_code)
    if split == "validation" and not dataset.has_validation:
        message = "this run has no validation images (data.validation is 0); use --split test"
        raise RecipeError([Problem("command line", "--split", message, "conflict")])
    data, classes = dataset.held_out if split == "validation" else dataset.test, run.about["classes"]
    if len(classes) != len(data.classes):
        message = f"{recipe.data.dataset} has {len(data.classes)} classes, but the network has {len(classes)}"
        raise RecipeError([Problem("command line", "data.dataset", message, "conflict")])
    check_shape(recipe, data, run)
    return recipe, data


def check_shape(recipe: Recipe, data: Images, run: Run) -> None:
    """Raises RecipeError if the images do not have the shape that the run's network takes."""
    if data.shape != run.shape:
        message = f"{recipe.data.dataset} has images of {describe_shape(data.shape)}, but the network takes "
        message += f"{describe_shape(run.shape)}"
        raise RecipeError([Problem("command line", "data.dataset", message, "conflict")])


def evaluate_run(run: Run, recipe: Recipe, data: Images, *, mirrored: bool = False) -> Evaluation:
    """Evaluates a run's network on `data`, in the batches of the recipe and in `evaluation_precision`.

    Collective: call on every rank.

    Args:
        mirrored: evaluate on the images mirrored from left to right.
    """
    choose_threads(launched_world())
    set_determinism(recipe.deterministic)
    set_kernels(recipe)
    AcceleratorState._reset_state()  # one process, e.g. a notebook, may evaluate runs of different precisions
    accelerator = Accelerator(mixed_precision=evaluation_precision(recipe))
    # Every data set is normalised with the statistics of the training set.
    images = Images(data.images, data.labels, data.classes, run.about["mean"], run.about["std"]).to(accelerator.device)
    # A copy, because the caller may still use the run's own network on the CPU.
    with copy_of(run.model) as copied:
        module = to_device(copied, accelerator.device, channels_last=recipe.engine.channels_last)
        module = Mirrored(module) if mirrored else module
        return evaluate_module(accelerator, module, images, batch_size=recipe.eval_batch_size)


def evaluation_precision(recipe: Recipe) -> str:
    """Returns the precision that a network of the recipe is evaluated in: the recipe's, or "no" (fp32).

    It is fp32 on a device that cannot compute in the recipe's precision; see `precision_notes`.
    """
    precision = recipe.mixed_precision or "no"
    return precision if supports_precision(launched_world().device, precision) else "no"


def precision_notes(*recipes: Recipe) -> list[str]:
    """Returns a note for each precision of the recipes that this device replaces by fp32."""
    device = launched_world().device.type
    replaced = {each.mixed_precision for each in recipes if evaluation_precision(each) == "no"} - {"no", None}
    return [
        f"evaluated in fp32 instead of {name}, because a {device} device cannot compute in {name}; the figures may "
        "differ from those of the training"
        for name in sorted(map(str, replaced))
    ]


def report(evaluation: Evaluation, labels: Tensor, classes: tuple[str, ...]) -> dict[str, Any]:
    """Returns an evaluation as plain values.

    Args:
        labels: int64 (N,), on the CPU.

    Returns:
        `accuracy` (percent), `loss` (mean cross entropy), `images` (their number), `calibration_error` (0 to 1),
        `classes` (for each its `images`, `correct` and `accuracy`; None without images), `confusion` (rows: true class,
        columns: predicted class).
    """
    counts, hits = evaluation.confusion.sum(dim=1).tolist(), evaluation.confusion.diagonal().tolist()
    return {
        "accuracy": evaluation.accuracy,
        "loss": evaluation.loss,
        "images": len(labels),
        "calibration_error": calibration_error(evaluation.probabilities, labels),
        "classes": {
            name: {"images": count, "correct": hit, "accuracy": 100 * hit / count if count else None}
            for name, count, hit in zip(classes, counts, hits, strict=True)
        },
        "confusion": evaluation.confusion.tolist(),
    }


def calibration_error(probabilities: Tensor, labels: Tensor) -> float:
    """Returns the expected calibration error: the mean difference of confidence and accuracy, over bins of confidence.

    Args:
        probabilities: float32 (N, classes).
        labels: int64 (N,).

    Returns:
        0 (calibrated) to 1. Each bin counts by its number of images (Guo et al., see `CALIBRATION_BINS`).
    """
    confidence, predictions = probabilities.double().max(dim=1)
    correct = (predictions == labels).double()
    bins = (confidence * CALIBRATION_BINS).ceil().long().sub(1).clamp(0, CALIBRATION_BINS - 1)
    gaps = torch.zeros(CALIBRATION_BINS, dtype=torch.float64).index_add(0, bins, correct - confidence)
    return float(gaps.abs().sum() / len(labels))


def write_report(path: Path, result: dict[str, Any]) -> None:
    """Writes a report as JSON to the file that `--json` names.

    Raises:
        RecipeError: the file cannot be written.
    """
    try:
        write_atomically(path, json.dumps(result, indent=2) + "\n")
    except OSError as error:
        message = f"{path} cannot be written: {error.strerror}"
        raise RecipeError([Problem("command line", "--json", message, "unwritable")]) from error
