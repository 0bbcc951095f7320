"""Evaluates the network of a run folder and reports the result."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from mnist_dist.data import Dataset, Images, describe_shape
from mnist_dist.data.form import Form, fit_images
from mnist_dist.data.sources import OWN, SHAPES
from mnist_dist.data.store import fits_on_device
from mnist_dist.distributed.devices import share_cores, supports_precision
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
from mnist_dist.run.plan import identify_data
from mnist_dist.run.reader import Run
from mnist_dist.run.text_output import listed

CALIBRATION_BINS = 15
"""Bins of equal width, as in Guo et al., "On Calibration of Modern Neural Networks", ICML 2017."""

Split = Literal["test", "validation", "all"]
"""Which images of a data set are evaluated; "all" also means the training images."""


def load_evaluation_data(run: Run, *overrides: str, split: Split = "test") -> tuple[Recipe, Images, list[str]]:
    """Returns a run's recipe with `overrides` applied, the images of one of its splits, and notes for the user.

    Collective: call on every rank.

    Args:
        overrides: recipe keys, e.g. `data.dataset=kmnist`.

    Raises:
        RecipeError: the data cannot be read, the run has no validation images, or the network does not know the data's
            classes or the shape of its images.
    """
    recipe = load_recipe(run.folder.recipe, *overrides, import_code=False)
    dataset = load_data(recipe, launched_world(), run.allow_code)
    if split == "validation" and not dataset.has_validation:
        message = "this run has no validation images (data.validation is 0); use --split test"
        raise RecipeError([Problem("command line", "--split", message, "conflict")])
    data, notes = fit_to_network(recipe, _select(dataset, split), run)
    notes += _data_notes(run, recipe, dataset, len(data), overrides)
    return recipe, data, notes


def _data_notes(run: Run, recipe: Recipe, dataset: Dataset, evaluated: int, overrides: Sequence[str]) -> list[str]:
    """Returns a note if only a part of other images was evaluated, or if the run's own training images have changed."""
    if any(word.startswith(("data.dataset=", "data.root=")) for word in overrides):
        total = sum(map(len, _parts(dataset)))
        if recipe.data.dataset in OWN and evaluated < total:
            return [f"{evaluated:,} of the {total:,} images were evaluated; --split all evaluates all of them"]
        return []
    known = run.about.get("data")  # earlier versions stored none
    if any(word.startswith("data.") for word in overrides) or known in (None, identify_data(dataset.train)["digest"]):
        return []
    message = (
        "the training images or their labels have changed since the training: the network may have been trained on"
    )
    return [f"{message} some of the images that were evaluated now"]


def _parts(dataset: Dataset) -> list[Images]:
    return [dataset.train, dataset.test, *([dataset.held_out] if dataset.has_validation else [])]


def _select(dataset: Dataset, split: Split) -> Images:
    if split != "all":
        return dataset.held_out if split == "validation" else dataset.test
    images, labels = (torch.cat([getattr(part, name) for part in _parts(dataset)]) for name in ("images", "labels"))
    return replace(dataset.test, images=images, labels=labels)


def fit_to_network(recipe: Recipe, data: Images, run: Run) -> tuple[Images, list[str]]:
    """Returns images with the network's classes and channels, and notes for the user.

    Classes are compared by name; published data sets also by position, as many data sets share the shape of MNIST.

    Raises:
        RecipeError: the network does not know a class, or takes images of another size.
    """
    known, name, notes = tuple(run.about["classes"]), recipe.data.dataset, []
    if unknown := [each for each in data.classes if each not in known]:
        if name not in SHAPES or len(known) != len(data.classes):
            message = f"{name} has {len(data.classes)} classes, and the network does not know {listed(unknown)}; "
            raise _conflict(f"{message}it knows {len(known)}: {listed(known)}")
        notes.append(f"the classes of {name} have other names than the network's: they were compared by position")
    else:
        positions = torch.tensor([known.index(each) for each in data.classes], device=data.labels.device)
        data = replace(data, labels=positions[data.labels], classes=known)
    if name not in SHAPES and data.shape[1:] == run.shape[1:]:  # `predict` converts the user's own pictures, too
        data = replace(data, images=fit_images(data.images, Form(channels=run.shape[0])))
    if data.shape != run.shape:
        channels, height, width = run.shape
        message = f"{name} has images of {describe_shape(data.shape)}, but the network takes "
        message += f"{describe_shape(run.shape)}; add data.image_size=[{height},{width}] data.channels={channels}"
        raise _conflict(message)
    return data, notes


def _conflict(message: str) -> RecipeError:
    return RecipeError([Problem("command line", "data.dataset", message, "conflict")])


def evaluate_run(run: Run, recipe: Recipe, data: Images, *, mirrored: bool = False) -> Evaluation:
    """Evaluates a run's network on `data`, in the batches of the recipe and in `evaluation_precision`.

    Collective: call on every rank.

    Args:
        mirrored: evaluate on the images mirrored from left to right.
    """
    share_cores(launched_world())
    set_determinism(recipe.deterministic)
    set_kernels(recipe)
    AcceleratorState._reset_state()  # one process, e.g. a notebook, may evaluate runs of different precisions
    accelerator = Accelerator(mixed_precision=evaluation_precision(recipe))
    # Every data set is normalised with the statistics of the training set.
    images = Images(data.images, data.labels, data.classes, run.about["mean"], run.about["std"])
    if fits_on_device(data.images, recipe.data.place, accelerator.device):
        images = images.to(accelerator.device)  # else batch by batch
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
        `accuracy` (percent), `loss` (mean cross entropy), `images` (their number), `calibration_error` (0 to 1), the
        values of `class_averages`, `classes` (for each its `images`, `correct` and `accuracy`; None without images),
        `confusion` (rows: true class, columns: predicted class).
    """
    counts, hits = evaluation.confusion.sum(dim=1).tolist(), evaluation.confusion.diagonal().tolist()
    return {
        "accuracy": evaluation.accuracy,
        "loss": evaluation.loss,
        "images": len(labels),
        "calibration_error": calibration_error(evaluation.probabilities, labels),
        **class_averages(evaluation.probabilities, labels),
        "classes": {
            name: {"images": count, "correct": hit, "accuracy": 100 * hit / count if count else None}
            for name, count, hit in zip(classes, counts, hits, strict=True)
        },
        "confusion": evaluation.confusion.tolist(),
    }


def class_averages(probabilities: Tensor, labels: Tensor) -> dict[str, float | None]:
    """Returns figures in which each class counts the same, however many images it has. Computed by scikit-learn.

    Args:
        probabilities: float32 (N, classes).
        labels: int64 (N,).

    Returns:
        `balanced_accuracy` (percent): the mean of the classes' accuracies. `macro_f1` (0 to 1): the mean of their F1
        scores. `auroc` (0 to 1): the mean of their areas under the ROC curve, each class against all others; None if
        all images are of one class or a probability is not finite. Classes without images have no part in the means,
        except that a predicted one has the F1 score 0. All are None without scikit-learn; see `class_average_notes`.
    """
    try:
        from sklearn import metrics
    except ImportError:
        return dict.fromkeys(("balanced_accuracy", "macro_f1", "auroc"))
    truth, predictions = labels.numpy(), probabilities.argmax(dim=1).numpy()
    recalls = metrics.recall_score(truth, predictions, labels=labels.unique().numpy(), average="macro", zero_division=0)
    areas = []
    if probabilities.isfinite().all():
        present = [each for each in labels.unique().tolist() if (labels != each).any()]
        areas = [metrics.roc_auc_score(truth == each, probabilities[:, each].numpy()) for each in present]
    return {
        "balanced_accuracy": 100 * float(recalls),
        "macro_f1": float(metrics.f1_score(truth, predictions, average="macro", zero_division=0)),
        "auroc": float(sum(areas) / len(areas)) if areas else None,
    }


def describe_averages(result: dict[str, Any]) -> dict[str, str]:
    """Returns the figures of `class_averages` in a report as text, by their names; without those that are None."""
    forms = {"balanced_accuracy": "{:.2f} %", "macro_f1": "{:.4f}", "auroc": "{:.4f}"}
    names = {"balanced_accuracy": "balanced accuracy", "macro_f1": "macro F1", "auroc": "AUROC"}
    return {names[key]: form.format(result[key]) for key, form in forms.items() if result[key] is not None}


def class_average_notes() -> list[str]:
    """Returns a note if the library for `class_averages` is missing."""
    if find_spec("sklearn"):
        return []
    return ['balanced accuracy, macro F1 and AUROC need scikit-learn: pip install -e ".[demo]"']


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
