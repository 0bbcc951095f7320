"""Measures the time to a given accuracy over many seeds: `mnist-dist benchmark --time-to-accuracy RECIPE --seeds 30`.

The time of a seed covers the initialisation of the network, the complete training, and the test pass. The data is read,
the network compiled and the CUDA graph captured once, before the first seed. This preparation is reported separately.
It trains on random labels, so the network learns nothing about the data.

The reference is the network of github.com/tuomaso/train_mnist_fast, reimplemented from its description. Recipe and
reference train in turn on the same machine.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from mnist_dist.benchmark.baselines import BenchmarkSetup, training_step
from mnist_dist.data import Dataset, Images, describe_shape
from mnist_dist.data.images import SHAPE
from mnist_dist.engine.precision import PRECISION_NAMES
from mnist_dist.engine.train_step import NotFinite
from mnist_dist.errors import MeasurementStopped, Problem, RecipeError, RunError
from mnist_dist.models import count_parameters
from mnist_dist.recipe.file import note_measured
from mnist_dist.recipe.schema import Recipe
from mnist_dist.run.build import build_components
from mnist_dist.run.components import Progress, TrainingComponents
from mnist_dist.run.model_setup import build_module

# Commands do not import commands. This import is the one exception: the benchmark times the training loop itself.
from mnist_dist.train import fit

NO_CHECKPOINTS: Any = SimpleNamespace(
    save=lambda wait: None,
    save_best=lambda: None,
    log_evaluation=lambda evaluation: None,
    is_due=lambda logged: False,
    mark_failed=lambda: None,
    has_failed=False,
)
"""Replaces a run's `Checkpointer`, because the reference saves nothing either."""

ZERO_INITIAL_STATE = ("adam", "adamw", "radam", "adamax", "adadelta", "rmsprop", "sgd")
"""Optimizers whose state starts with zeros; SGD only without dampening."""

Run = tuple[float, float]
"""Accuracy in percent and seconds of one seed."""

# --- measuring ----------------------------------------------------------------------------------------------------


def measure(recipe: Recipe, seeds: int) -> dict[str, Any]:
    """Trains the seeds 0, 1, … of a recipe and of the reference in turn.

    Returns:
        Plain values: for `ours` and `reference`, accuracy (percent) and seconds with mean, sd and each seed's value.

    Raises:
        RecipeError: there are several processes, the images do not have the shape of MNIST's, or the optimizer's state
            does not start with zeros.
        RunError: the training failed or was stopped.
    """
    setup = BenchmarkSetup.prepare(recipe)
    _check(setup, recipe)
    dataset, device = setup.dataset, setup.state.device
    train, test = dataset.train.to(device), dataset.test.to(device)
    components = build_components(recipe, setup.precision, train, build_module(recipe, dataset))
    initial_schedule = components.schedule.state_dict()
    preparation = _warm_up(components, recipe, train, test, dataset.train.classes)
    _train_reference(train, test, seed=0, steps=10)
    ours: list[Run] = []
    reference: list[Run] = []
    for seed in range(seeds):
        setup.synchronize()
        components.schedule.load_state_dict(initial_schedule)
        ours.append(_train_seed(components, recipe.model_copy(update={"seed": seed}), dataset, test))
        setup.synchronize()
        reference.append(_train_reference(train, test, seed))
    captured = components.captured
    return setup.about() | {
        "parameters": count_parameters(components.module),
        "epochs": round(components.epoch(Progress(step=components.total_steps)), 2),
        "seeds": seeds,
        "preparation_seconds": preparation,
        "capture_seconds": captured.seconds if captured else None,
        "ours": _statistics(ours),
        "reference": _statistics(reference),
        "reference_time_to_ours": statistics.median(b[1] / a[1] for a, b in zip(ours, reference, strict=True)),
    }


def _check(setup: BenchmarkSetup, recipe: Recipe) -> None:
    if setup.state.num_processes > 1:
        size = setup.state.num_processes
        message = f"time to accuracy is measured in one process, but {size} are running; start it without a launcher"
        raise RecipeError([Problem("the launcher", "--time-to-accuracy", message, "unsupported")])
    if (shape := setup.dataset.train.shape) != SHAPE:
        message = f"the reference network takes {describe_shape(SHAPE)}, but the images have {describe_shape(shape)}"
        raise RecipeError([recipe.problem("data.dataset", message, "unsupported")])
    if recipe.optimizer.name not in ZERO_INITIAL_STATE or recipe.optimizer.keywords.get("dampening"):
        message = (
            "each seed resets the optimizer's state to zeros, but this optimizer's state does not start with zeros; "
            f"use one of {', '.join(ZERO_INITIAL_STATE)} (sgd without dampening)"
        )
        raise RecipeError([recipe.problem("optimizer.name", message, "unsupported")])


def _statistics(runs: list[Run]) -> dict[str, Any]:
    accuracies, seconds = zip(*runs, strict=True)
    deviation = statistics.stdev if len(runs) > 1 else lambda values: 0.0
    return {
        "accuracy": {"mean": statistics.mean(accuracies), "sd": deviation(accuracies), "each": accuracies},
        "seconds": {"mean": statistics.mean(seconds), "sd": deviation(seconds), "each": seconds},
    }


def _warm_up(
    components: TrainingComponents, recipe: Recipe, train: Images, test: Images, classes: tuple[str, ...]
) -> float:
    """Trains an epoch on random labels and tests; returns the seconds.

    The epoch chooses kernels, compiles and captures, for the short last batch too. From random labels the network
    learns nothing about the data.
    """
    started = time.perf_counter()
    labels = train.labels.clone()
    train.labels.random_(len(classes))
    assert components.update.data.labels.data_ptr() == train.labels.data_ptr(), "the update has its own labels"
    steps = min(components.batches.steps_per_epoch, components.total_steps)
    _fit(recipe, replace(components, total_steps=steps), test, Progress())
    train.labels.copy_(labels)
    return time.perf_counter() - started


def _train_seed(components: TrainingComponents, recipe: Recipe, dataset: Dataset, test: Images) -> Run:
    """Trains one seed of the recipe. All tensors are reset in place, because a captured step uses their memory."""
    started = time.perf_counter()
    components.module.load_state_dict(build_module(recipe, dataset).state_dict())
    for state in components.update.optimizer.state.values():
        for value in state.values():
            value.zero_()
    if components.update.average:
        components.update.average.module.load_state_dict(components.module.state_dict())
        components.update.average.restart()
    components.update.batches = replace(components.batches, seed=recipe.seed)
    progress = Progress()
    _fit(recipe, replace(components, batches=components.update.batches), test, progress)
    return progress.last["eval/accuracy"], time.perf_counter() - started


def _fit(recipe: Recipe, components: TrainingComponents, test: Images, progress: Progress) -> None:
    """Trains to the last step.

    Raises:
        RunError: a gradient is not finite, or a signal stopped the training.
    """
    try:
        finished = fit(recipe, components, test, NO_CHECKPOINTS, progress)
    except NotFinite as error:
        message = f"the gradient of step {error.step} of seed {recipe.seed} is not finite; try a lower learning rate"
        raise RunError(message) from error
    if not finished:
        raise MeasurementStopped


def _train_reference(train: Images, test: Images, seed: int, steps: int | None = None) -> Run:
    """Trains the reference: one epoch in fp32 from tensors on the device, Adam with OneCycle.

    Args:
        steps: stop after this many steps; None for the complete epoch.
    """
    device, batch_size = train.images.device, 256
    started = time.perf_counter()
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Conv2d(1, 24, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(24, 32, 3), nn.MaxPool2d(2), nn.ReLU(),
        nn.Flatten(), nn.Linear(800, 256), nn.ReLU(), nn.Linear(256, len(train.classes)),
    ).to(device)  # fmt: skip
    images, labels = train.normalize(train.images), train.labels
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2, betas=(0.7, 0.9))
    total = max(1, len(labels) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=total)
    update = training_step(optimizer, lambda images, labels: F.cross_entropy(network(images), labels))
    order = torch.randperm(len(labels), device=device)
    for step in range(min(steps or total, total)):
        rows: Tensor = order[step * batch_size : (step + 1) * batch_size]
        update(images[rows], labels[rows])
        schedule.step()
    network.eval()
    with torch.no_grad():
        predictions = torch.cat([network(test.normalize(part)).argmax(dim=1) for part in test.images.split(2000)])
    accuracy = 100 * int((predictions == test.labels).sum()) / len(test.labels)
    return accuracy, time.perf_counter() - started


# --- the report ---------------------------------------------------------------------------------------------------


def summary_lines(result: dict[str, Any]) -> list[str]:
    """Returns three lines of text: the recipe, the reference, and the ratio of their times."""
    ours = "ours", f"{result['recipe']}, {result['parameters']:,} parameters", result["epochs"]
    reference = "reference", "reference network", 1
    lines = []
    for key, name, epochs in ours, reference:
        accuracy, seconds = result[key]["accuracy"], result[key]["seconds"]
        lines.append(
            f"{name}: {accuracy['mean']:.3f} ± {accuracy['sd']:.3f} % in {seconds['mean']:.3f} ± {seconds['sd']:.3f} s "
            f"(n = {result['seeds']}, after {epochs:g} epoch(s))"
        )
    captured = result["capture_seconds"]
    lines.append(
        f"the reference takes {result['reference_time_to_ours']:.2f} times as long (median of pairs) on "
        f"{result['device']}; not included: {result['preparation_seconds']:.2f} s of preparation"
        + (f", of which capture took {captured:.2f} s" if captured else "")
    )
    return lines


def print_lines(result: dict[str, Any]) -> None:
    """Prints `summary_lines`."""
    console = Console(soft_wrap=True, highlight=False)
    for line in summary_lines(result):
        console.print(line)


def to_markdown(result: dict[str, Any], command: str) -> str:
    """Returns a section of a Markdown file: the summary, the command that repeats it, and versions."""
    precision = PRECISION_NAMES[result["mixed_precision"]]
    heading = f"\n### {result['recipe']}, {result['epochs']:g} epoch(s), {precision}, {result['device']}\n\n"
    commit = str(result["git_commit"])[:12]
    origin = f"`{command}`, {result['date']}, torch {result['versions']['torch']}, commit {commit}.\n\n"
    return heading + origin + "\n".join(f"- {line}" for line in summary_lines(result)) + "\n"


def note_in_recipe(path: Path, result: dict[str, Any]) -> None:
    """Writes the result into the line `# measured:` of the recipe's head comment."""
    accuracy, seconds = result["ours"]["accuracy"], result["ours"]["seconds"]
    measured = (
        f"{accuracy['mean']:.2f} ± {accuracy['sd']:.2f} % in {seconds['mean']:.2f} ± {seconds['sd']:.2f} s "
        f"(n = {result['seeds']}, {result['device']}; the reference {result['reference']['seconds']['mean']:.2f} s)"
    )
    note_measured(path, measured)
