"""The least time to a given accuracy, over many seeds: `mnist-dist benchmark --time-to-accuracy RECIPE --seeds 30`.

A seed's clock covers the network's initialisation, all of the training and the test pass. Reading the data, compiling,
and recording a graph are done once, on random labels, and reported beside. The reference is the network of
github.com/tuomaso/train_mnist_fast, written from its description and run in turn with ours on the same machine.
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

from mnist_dist.benchmark.baselines import BenchmarkSetup
from mnist_dist.data import Images
from mnist_dist.engine.train_step import NotFinite
from mnist_dist.errors import Problem, RecipeError, RunError
from mnist_dist.models import count_parameters
from mnist_dist.recipe.file import note_measured
from mnist_dist.recipe.schema import Recipe
from mnist_dist.run.build import build_components
from mnist_dist.run.components import Progress, TrainingComponents
from mnist_dist.run.model_setup import build_module
from mnist_dist.train import fit

SAVES_NOTHING: Any = SimpleNamespace(
    best=lambda: None,
    show=lambda evaluation: None,
    checkpoint=lambda: None,
    is_due=lambda logged: False,
    on_timeout=lambda: None,
)
"""In the place of a run's `Checkpointer`: the reference saves nothing either."""

BEGIN_WITH_ZEROS = ("adam", "adamw", "radam", "adamax", "adadelta", "rmsprop", "sgd")
"""SGD without dampening."""


def measure(recipe: Recipe, seeds: int) -> dict[str, Any]:
    """Trains seeds 0, 1, … of a recipe and of the reference in turn; returns accuracies (percent) and seconds of each.

    Raises:
        RecipeError: the world is of several processes, or an optimizer's state does not begin with zeros.
        RunError: the training broke off.
    """
    task = BenchmarkSetup.prepare(recipe)
    if task.state.num_processes > 1:
        raise RecipeError([Problem("command line", "--time-to-accuracy", "a record is of one process")])
    if recipe.optimizer.name not in BEGIN_WITH_ZEROS or recipe.optimizer.keywords.get("dampening"):
        what = f"each seed begins with the state filled with zeros, as {', '.join(BEGIN_WITH_ZEROS)} begin"
        raise RecipeError([recipe.problem("optimizer.name", what)])
    dataset, device = task.dataset, task.state.device
    train, test = dataset.train.to(device), dataset.test.to(device)
    components = build_components(recipe, task.precision, train, build_module(recipe, dataset))
    ours: list[tuple[float, float]] = []
    theirs: list[tuple[float, float]] = []
    schedule = components.schedule.state_dict()
    preparation = _warm_up(components, recipe, train, test, dataset.train.classes)
    _reference(train, test, seed=0, steps=10)
    for seed in range(seeds):
        task.wait()
        components.schedule.load_state_dict(schedule)
        ours.append(_ours(components, recipe.model_copy(update={"seed": seed}), dataset, test))
        task.wait()
        theirs.append(_reference(train, test, seed))
    captured = components.captured
    return task.about() | {
        "parameters": count_parameters(components.module),
        "epochs": recipe.epochs,
        "seeds": seeds,
        "preparation_seconds": preparation,
        "capture_seconds": captured.seconds if captured else None,
        "ours": _figures(ours),
        "reference": _figures(theirs),
        "reference_time_to_ours": statistics.median(b[1] / a[1] for a, b in zip(ours, theirs, strict=True)),
    }


def _figures(runs: list[tuple[float, float]]) -> dict[str, Any]:
    accuracies, seconds = zip(*runs, strict=True)
    deviation = statistics.stdev if len(runs) > 1 else lambda values: 0.0
    return {
        "accuracy": {"mean": statistics.mean(accuracies), "sd": deviation(accuracies), "each": accuracies},
        "seconds": {"mean": statistics.mean(seconds), "sd": deviation(seconds), "each": seconds},
    }


def _warm_up(
    components: TrainingComponents, recipe: Recipe, train: Images, test: Images, classes: tuple[str, ...]
) -> float:
    """A few steps and a test pass on random labels: kernels are chosen, compiled, recorded. Returns its seconds."""
    started = time.perf_counter()
    right = train.labels.clone()
    train.labels.random_(len(classes))
    assert components.update.data.labels.data_ptr() == train.labels.data_ptr()
    _fit(recipe, replace(components, total_steps=min(10, components.total_steps)), test, Progress())
    train.labels.copy_(right)
    return time.perf_counter() - started


def _ours(components: TrainingComponents, recipe: Recipe, dataset: Any, test: Images) -> tuple[float, float]:
    """Accuracy in percent and seconds of one seed. The tensors keep their places, which a recorded step knows."""
    started = time.perf_counter()
    components.module.load_state_dict(build_module(recipe, dataset).state_dict())
    for state in components.update.optimizer.state.values():
        for value in state.values():
            value.zero_()
    if components.update.average:
        components.update.average.module.load_state_dict(components.module.state_dict())
        components.update.average.n_averaged.zero_()
    components.update.batches = replace(components.batches, seed=recipe.seed)
    progress = Progress()
    _fit(recipe, replace(components, batches=components.update.batches), test, progress)
    return progress.last["eval/accuracy"], time.perf_counter() - started


def _fit(recipe: Recipe, components: TrainingComponents, test: Images, progress: Progress) -> None:
    """Trains to the last step.

    Raises:
        RunError: it broke off, or was asked to stop.
    """
    try:
        finished = fit(recipe, components, test, SAVES_NOTHING, progress)
    except NotFinite as error:
        raise RunError(f"the gradient of step {error.step} of seed {recipe.seed} is not finite") from error
    if not finished:
        raise RunError("asked to stop while measuring")


def _reference(train: Images, test: Images, seed: int, steps: int | None = None) -> tuple[float, float]:
    """Accuracy in percent and seconds: one epoch in fp32 from tensors on the device, Adam with OneCycle."""
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
    order = torch.randperm(len(labels), device=device)
    for step in range(min(steps or total, total)):
        rows: Tensor = order[step * batch_size : (step + 1) * batch_size]
        optimizer.zero_grad()
        F.cross_entropy(network(images[rows]), labels[rows]).backward()
        optimizer.step()
        schedule.step()
    network.eval()
    with torch.no_grad():
        found = torch.cat([network(test.normalize(part)).argmax(dim=1) for part in test.images.split(2000)])
    accuracy = 100 * float((found == test.labels).double().mean())
    return accuracy, time.perf_counter() - started


def summary_lines(result: dict[str, Any]) -> list[str]:
    """What was found, in two lines of text and one about what was not clocked."""
    lines = []
    for name in ("ours", "reference"):
        accuracy, seconds = result[name]["accuracy"], result[name]["seconds"]
        told = f"{result['recipe']}, {result['parameters']:,} parameters" if name == "ours" else "reference network"
        lines.append(
            f"{told}: {accuracy['mean']:.3f} ± {accuracy['sd']:.3f} % in {seconds['mean']:.3f} ± {seconds['sd']:.3f} s "
            f"(n = {result['seeds']}, last epoch)"
        )
    captured = result["capture_seconds"]
    lines.append(
        f"the reference takes {result['reference_time_to_ours']:.2f} times as long (median of pairs) on "
        f"{result['device']}; not clocked: {result['preparation_seconds']:.2f} s of preparation"
        + (f", {captured:.2f} s of them the recording of the graph" if captured else "")
    )
    return lines


def to_markdown(result: dict[str, Any], command: str) -> str:
    """The same as a section of a Markdown file, with what is needed to make it again."""
    precision = {"no": "fp32"}.get(result["mixed_precision"], result["mixed_precision"])
    head = f"\n### {result['recipe']}, {result['epochs']} epoch(s), {precision}, {result['device']}\n\n"
    commit = str(result["git_commit"])[:12]
    made = f"`{command}`, {result['date']}, torch {result['versions']['torch']}, commit {commit}.\n\n"
    return head + made + "\n".join(f"- {line}" for line in summary_lines(result)) + "\n"


def note_in_recipe(path: Path, result: dict[str, Any]) -> None:
    """Writes the figures into the `# measured:` line of the recipe's file."""
    accuracy, seconds = result["ours"]["accuracy"], result["ours"]["seconds"]
    measured = (
        f"{accuracy['mean']:.2f} ± {accuracy['sd']:.2f} % in {seconds['mean']:.2f} ± {seconds['sd']:.2f} s "
        f"(n = {result['seeds']}, {result['device']}; the reference {result['reference']['seconds']['mean']:.2f} s)"
    )
    note_measured(path, measured)


def print_lines(result: dict[str, Any]) -> None:
    console = Console(soft_wrap=True, highlight=False)
    for line in summary_lines(result):
        console.print(line)
