"""The reference trainings: small networks whose losses on a healthy machine are part of this package."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from mnist_dist.data import Batches, Dataset, load_dataset
from mnist_dist.distributed.devices import synchronize
from mnist_dist.engine.optimizers import build_optimizer
from mnist_dist.engine.schedules import set_rates
from mnist_dist.recipe.loading import load_recipe
from mnist_dist.recipe.schema import Recipe
from mnist_dist.run.build import build_components
from mnist_dist.run.kernels import set_kernels
from mnist_dist.run.model_setup import build_module
from mnist_dist.run.model_trial import to_device

FILE = Path(__file__).with_name("reference_losses.json")
STEPS = 20
EARLY_STEPS = 5


@dataclass(frozen=True)
class Reference:
    """A reference training, with the relative deviations of its losses that are allowed.

    Other processors, kernels and world sizes add in another order, and later steps amplify the difference.
    """

    changes: tuple[str, ...] = ()
    """Overrides of the recipe lenet5."""
    precision: str = "no"
    early_tolerance: float = 1e-5
    """For the first `EARLY_STEPS`."""
    tolerance: float = 1e-3


BATCH_NORM = (
    *("model.name=mnistnet", "model.width=8", "model.hidden=8", "model.dropout=0"),
    "optimizer={name: sgd, lr: 0.005}",
)

REFERENCES = {
    # Measured with 1 to 4 processes, other kernels, float64, and weights changed by up to 1e-6: the first five losses
    # agree to 3e-7. Later a ReLU can fall to the other side of zero, which Adam amplifies, to 3e-4 at most. The faults
    # to be found exceed the early tolerance: TF32 (5e-5), a learning rate that is wrong by 0.1 % (3e-5), one wrong
    # pixel in every batch (2e-5), one weight that is wrong by 0.01 (2e-4).
    "lenet5": Reference(),
    # With other kernels, another memory layout, and weights changed by 1e-6, losses agree to 7e-6 in the first five
    # steps and to 4e-5 later. Adam, or ten times the learning rate, amplifies that to 4e-4 within five steps.
    "batch norm": Reference(BATCH_NORM, early_tolerance=1e-4, tolerance=1e-3),
    # With other kernels and weights changed by 1e-7, losses agree to 6e-4 in the first five steps and to 2.2e-3 later.
    "bf16": Reference(precision="bf16", early_tolerance=5e-3, tolerance=2e-2),
}


def reference_losses(name: str) -> list[float]:
    """Returns the losses of a reference training, a key of `REFERENCES`."""
    return json.loads(FILE.read_text(encoding="utf-8"))["losses"][name]


def build_reference(name: str, capture: str = "off") -> tuple[Recipe, Dataset, nn.Module]:
    """Returns recipe, data and network of a reference training with seed 0."""
    reference = REFERENCES[name]
    overrides = ("seed=0", "batch_size=128", "epochs=1", f"max_steps={STEPS}", "engine.tf32=off")
    settings = (f"mixed_precision={reference.precision}", f"engine.capture={capture}", "tracking.wandb.mode=disabled")
    recipe = load_recipe("lenet5", *overrides, *settings, "data.dataset=synthetic", *reference.changes)
    set_kernels(recipe)  # TF32 keeps ten bits of the mantissa and would hide faults as small as its rounding
    data = load_dataset("synthetic")
    return recipe, data, build_module(recipe, data)


def train_alone(device: torch.device, name: str = "lenet5") -> dict[str, Any]:
    """Trains complete batches in a plain loop on this rank.

    Returns:
        `losses`, the median `seconds` of a step and those of the `fastest` step.
    """
    recipe, dataset, module = build_reference(name)
    data, augmentation = dataset.train.to(device), recipe.data.augment.build()
    to_device(module, device, channels_last=True)
    rate = recipe.optimizer.lr or 0.0  # constant within an epoch
    optimizer = build_optimizer(module, recipe.optimizer.name, lr=rate, **recipe.optimizer.keywords)
    batches = Batches(len(data), recipe.batch_size, recipe.seed, augmentation=augmentation)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=recipe.mixed_precision == "bf16")
    plan, losses, seconds = batches.plan(0), [], []
    for step in range(STEPS):
        started = time.perf_counter()
        rows = batches.rows(plan, step).to(device)
        changes = batches.changes(plan.epoch, rows)
        images = data.images[rows] if changes is None else augmentation.apply(data.images[rows], changes)
        with autocast:
            logits = module(data.normalize(images))
        loss = F.cross_entropy(logits.float(), data.labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return {"losses": losses, "seconds": statistics.median(seconds), "fastest": min(seconds)}


def train_distributed(device: torch.device, capture: str = "off") -> dict[str, Any]:
    """Trains lenet5 with the trainer's own update, each batch split over all ranks. Collective: call on every rank.

    Args:
        capture: value of the recipe key engine.capture.

    Returns:
        `losses`, the SHA-256 of the final `weights`, and the `obstacle` to a capture that was asked for. If there is
        one before the first step, nothing is trained and the losses are empty.
    """
    recipe, data, module = build_reference("lenet5", capture)
    components = build_components(recipe, "no", data.train, module)
    if capture != "off" and components.captured is None:
        obstacle = next((note for note in components.notes if note.startswith("engine.capture")), "")
        return {"losses": [], "weights": "", "obstacle": obstacle.partition("eagerly: ")[2]}
    failures: list[str] = []
    if components.captured is not None:
        components.captured.notify = failures.append
    plan, losses = components.batches.plan(0), []
    for step in range(STEPS):
        set_rates(components.update.optimizer, components.schedule, step)
        components.update(plan, step, step)
        losses.append(components.meter.read()["train/loss"])
    weights = b"".join(parameter.detach().cpu().numpy().tobytes() for parameter in components.module.parameters())
    return {"losses": losses, "weights": hashlib.sha256(weights).hexdigest(), "obstacle": "; ".join(failures)}
