"""Evaluating the network of a run folder."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from mnist_dist.data import Images
from mnist_dist.distributed.devices import choose_threads
from mnist_dist.distributed.launcher import launched_world
from mnist_dist.engine.evaluation import Evaluation
from mnist_dist.engine.evaluation import evaluate as judge
from mnist_dist.errors import Problem, RecipeError
from mnist_dist.recipe.loading import load_recipe
from mnist_dist.recipe.schema import Recipe
from mnist_dist.run.build import load_data
from mnist_dist.run.kernels import set_determinism, set_kernels
from mnist_dist.run.model_setup import to_device
from mnist_dist.run.reader import Run

BINS = 15
"""Of equal width, as in Guo et al., "On Calibration of Modern Neural Networks", ICML 2017."""


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
