"""Counts the kernels, host syncs and host-to-device copies of a training step, without a GPU.

PyTorch's fake tensors have a device, a dtype and a shape, but no content. The trainer's step and the bare step run on
fake CUDA tensors while every operation is counted. The trainer's step is the one that `run.build` builds.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, replace
from datetime import datetime, timezone
from itertools import product
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from rich.table import Table
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from mnist_dist.benchmark.baselines import BenchmarkSetup, plain_step
from mnist_dist.benchmark.fake_gpu import GPU, FakeAccelerator, OperationCounter, Operations, fake_gpu
from mnist_dist.data import Dataset, Images
from mnist_dist.data.sources import SHAPES
from mnist_dist.engine.train_step import TrainStep
from mnist_dist.models import build_model
from mnist_dist.recipe.schema import Recipe
from mnist_dist.run.build import build_components
from mnist_dist.run.model_trial import to_device
from mnist_dist.run.provenance import git_commit, versions
from mnist_dist.run.text_output import markdown_table, table_console

WORLD_SIZES = (1, 2)
LARGEST_EXTRA = {"step": 12, "augmentation": 8, "average": 3}
"""Kernels that the trainer's step may launch in addition to those of the bare step: always, and further ones with
augmentation and with averaged weights."""
HEADINGS = (
    "recipe", "processes", "bare step", "mnist_dist", "more", "allowed", "syncs per step", "copies per epoch", "limits",
)  # fmt: skip
EXPLANATION = (
    "Kernels that a step launches on a GPU, counted on fake tensors in fp32. An operation on a list of tensors counts "
    "once. The reduction over several processes is counted in neither step. The only copy of an epoch is its order."
)
SAMPLES = 20_000
"""Samples of an epoch. The trainer prepares about this many small images at once on a GPU."""

# --- the two steps ------------------------------------------------------------------------------------------------


class _Setup(BenchmarkSetup):
    def module(self) -> nn.Module:
        # Built without the fake mode: `Module.to` can make real parameters fake, but cannot move fake ones.
        with unset_fake_temporarily():
            module = _module(self.recipe)
        return to_device(module, GPU, channels_last=self.recipe.engine.channels_last)


def _module(recipe: Recipe) -> nn.Module:
    channels, height, width = _shape(recipe)
    size = (height, width)
    return build_model(recipe.model.name, in_channels=channels, image_size=size, **recipe.model.keywords).train()


def _shape(recipe: Recipe) -> tuple[int, int, int]:
    """Returns the shape of an image. The shape of a user's own images is not known here, so MNIST's is used."""
    return SHAPES.get(recipe.data.dataset, SHAPES["mnist"])


def _images(recipe: Recipe) -> Images:
    """Returns images without content."""
    shape = _shape(recipe)
    images, labels = torch.zeros(SAMPLES, *shape, dtype=torch.uint8), torch.zeros(SAMPLES, dtype=torch.int64)
    statistics = (0.1,) * shape[0], (0.3,) * shape[0]
    return Images(images, labels, tuple("0123456789"), *statistics)


def count_bare_step(recipe: Recipe, world_size: int) -> OperationCounter:
    """Counts one bare step on a process's share of the batch, without the reduction over the processes."""
    with fake_gpu():
        data = _images(recipe)
        state: Any = SimpleNamespace(device=GPU, num_processes=1)
        setup = _Setup(recipe, "no", Dataset(data, data, data), state)
        step = plain_step(setup, is_limit=True)
        share = recipe.batch_size // world_size
        images = torch.zeros(share, *data.shape, device=GPU)
        labels = torch.zeros(share, dtype=torch.int64, device=GPU)
        with OperationCounter():
            step(images, labels)  # allocates the optimizer's state
        with OperationCounter() as counter:
            step(images, labels)
    return counter


def count_trainer_step(recipe: Recipe, world_size: int) -> tuple[Operations, OperationCounter, bool]:
    """Counts the trainer's steps.

    Returns:
        The launches and syncs per step, as the mean over an epoch, with the copies per epoch; the counter of one step
        without the loading of its batch; and whether the device undoes or skips a bad step, without the host.
    """
    module = _module(recipe)
    # There is no process group, so the reduction over the processes is left out, as in the bare step.
    with fake_gpu(), patch("mnist_dist.run.build.FlatGradients", lambda *arguments: None):
        accelerator: Any = FakeAccelerator(world_size)
        with OperationCounter():  # building may read values, which fake tensors do not have
            step = build_components(recipe, "no", _images(recipe), module, accelerator=accelerator).update
            assert isinstance(step, TrainStep)
            step.seeds_itself = False  # the seed is set on the host
            plan = step.batches.plan(0)
            step.compute(step.load(plan, 0), 0)  # allocates the optimizer's state
        steps, plan = step.batches.steps_per_epoch, step.batches.plan(1)
        with OperationCounter() as loading:
            batches = [step.load(plan, index) for index in range(steps)]
        with OperationCounter() as counter:
            step.compute(batches[0], 1)
    epoch = loading.found + counter.found.times(steps)
    return replace(epoch.per(steps), copies=epoch.copies), counter, step.guard_is_on_device


# --- results ------------------------------------------------------------------------------------------------------


def count(recipe: Recipe, world_size: int) -> dict[str, Any]:
    """Returns the operations of the bare step and of the trainer's step, as plain values.

    The recipe is counted in fp32, without teachers, compilation, capture and logical shards, with its images on the
    device.
    """
    engine = recipe.engine.model_copy(update={"capture": "off"})
    data = recipe.data.model_copy(update={"place": "device"})
    changes = {"engine": engine, "data": data, "compile": False, "mixed_precision": "no", "logical_shards": None}
    counted = recipe.model_copy(update=changes)
    bare = count_bare_step(counted, world_size)
    trainer, step, guard_is_on_device = count_trainer_step(counted, world_size)
    extra = {"step": True, "augmentation": not recipe.data.augment.build().is_identity, "average": recipe.ema_decay}
    return {
        "recipe": recipe.name,
        "world_size": world_size,
        "batch_size": recipe.batch_size,
        "optimizer": recipe.optimizer.name,
        "bare_step": asdict(bare.found),
        "mnist_dist": asdict(trainer),
        "launches_allowed": bare.found.launches + sum(LARGEST_EXTRA[key] for key, used in extra.items() if used),
        "syncs_allowed": 0 if guard_is_on_device else 1,
        "more": _names(step.names, bare.names),
        "less": _names(bare.names, step.names),
    }


def _names(ours: list[str], others: list[str]) -> dict[str, int]:
    return {name.removeprefix("aten::"): number for name, number in (Counter(ours) - Counter(others)).items()}


def is_within_limits(result: dict[str, Any]) -> bool:
    """Returns whether a trainer's step keeps the limits of launches and syncs, and an epoch copies only its order."""
    ours = result["mnist_dist"]
    fits = ours["launches"] <= result["launches_allowed"] and ours["syncs"] <= result["syncs_allowed"]
    return fits and ours["copies"] <= 1


def measure(recipes: list[Recipe]) -> dict[str, Any]:
    """Counts the operations of recipes at each world size; returns plain values."""
    results = [count(recipe, world_size) for recipe, world_size in product(recipes, WORLD_SIZES)]
    about = {"date": datetime.now(timezone.utc).date().isoformat(), "versions": versions(), "git_commit": git_commit()}
    return {"operations": results, **about}


def table_of(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """Returns the counts as rows of text; the first row holds the column headings."""
    rows: list[tuple[str, ...]] = [HEADINGS]
    for each in result["operations"]:
        bare, ours = each["bare_step"], each["mnist_dist"]
        launches = [f"{number:,.10g}" for number in (bare["launches"], ours["launches"], each["launches_allowed"])]
        more = f"{ours['launches'] - bare['launches']:+,.10g}"
        waits = [f"{number:.10g}" for number in (ours["syncs"], ours["copies"])]
        verdict = "met" if is_within_limits(each) else "not met"
        rows.append((each["recipe"], str(each["world_size"]), *launches[:2], more, launches[2], *waits, verdict))
    return rows


def to_markdown(result: dict[str, Any], command: str) -> str:
    """Returns a section of a Markdown file: the table, the command that repeats it, and versions."""
    origin = f"{result['date']}, torch {result['versions']['torch']}, commit {str(result['git_commit'])[:12]}"
    lines = ["\n### Operations of a training step\n", f"`{command}`, {origin}.", EXPLANATION + "\n"]
    return "\n".join([*lines, markdown_table(table_of(result))]) + "\n"


def print_table(result: dict[str, Any]) -> None:
    """Prints the counts."""
    headings, *rows = table_of(result)
    table = Table(*headings, box=None, title="operations of a training step")
    for row in rows:
        table.add_row(*row)
    console = table_console()
    console.print(table)
    console.print(EXPLANATION, highlight=False)
