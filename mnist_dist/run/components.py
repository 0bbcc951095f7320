"""The training components of a run, and its progress."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import nn

from mnist_dist.data import Batches, Images
from mnist_dist.data.geometry import Geometry, describe_geometry, measure_geometry
from mnist_dist.data.sources import SHAPES
from mnist_dist.data.store import Place
from mnist_dist.distributed.fsdp import shard_model_state, shard_optimizer_state, unshard, unsharded_parameters
from mnist_dist.engine.cuda_graph import CapturedStep
from mnist_dist.engine.evaluation import Evaluation, evaluate
from mnist_dist.engine.metrics import Meter
from mnist_dist.engine.optimizers import add_missing_state
from mnist_dist.engine.schedules import Schedule
from mnist_dist.engine.train_step import TrainStep
from mnist_dist.recipe.schema import Recipe


@dataclass(frozen=True)
class TrainingComponents:
    """Everything that the training loop uses, built from a recipe by `mnist_dist.run.build`."""

    accelerator: Accelerator
    batches: Batches
    schedule: Schedule
    update: TrainStep | CapturedStep
    """Makes one update: `update(plan, index, step)`."""
    module: nn.Module
    """The bare network."""
    eval_model: nn.Module
    """The network that is evaluated and saved. It has the averaged weights if the recipe asks for them."""
    meter: Meter
    images_place: Place
    """Where the training images lie."""
    total_steps: int
    notes: list[str]
    """Notes for the user on how the recipe was built."""

    @property
    def captured(self) -> CapturedStep | None:
        """The update, if it replays a CUDA graph; None if all steps run eagerly."""
        return self.update if isinstance(self.update, CapturedStep) else None

    def close(self) -> None:
        """Frees what the process group would wait for. Call it after the last update."""
        if self.captured:
            self.captured.close()

    def epoch(self, progress: Progress) -> float:
        """Returns the number of epochs done, with the fraction."""
        return round(progress.step / self.batches.steps_per_epoch, 6)

    def evaluation_is_due(self, progress: Progress, eval_every: int) -> bool:
        """Returns whether to evaluate now: after every `eval_every` epochs and after the last step, once each."""
        epochs, rest = divmod(progress.step, self.batches.steps_per_epoch)
        due = progress.step >= self.total_steps or (rest == 0 and epochs % eval_every == 0)
        return due and progress.step != progress.evaluated_at

    def evaluate(self, data: Images, batch_size: int, interrupted: Callable[[], bool] = lambda: False) -> Evaluation:
        """Evaluates `eval_model` on `data`. Collective: call on every rank.

        Raises:
            Interrupted: `interrupted` returned True.
        """
        # Each process computed batch norm statistics from its own rows. The run uses those of rank 0.
        if self.accelerator.num_processes > 1:
            broadcast(list(self.eval_model.buffers()))
        with unsharded_parameters(self.eval_model):
            return evaluate(self.accelerator, self.eval_model, data, batch_size=batch_size, interrupted=interrupted)

    def place(self, data: Images) -> Images:
        """Returns images for evaluations: on the device if the training images are there, else on the CPU."""
        return data.to(self.accelerator.device) if self.images_place == "device" else data

    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns the trained weights and the gradients of the last step, by name. Collective: call on every rank."""
        named = dict(self.module.named_parameters())
        gradients = {f"gradients/{name}": each.grad for name, each in named.items() if each.grad is not None}
        return unshard({f"weights/{name}": each.detach() for name, each in named.items()} | gradients)

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that the next update depends on. With FSDP2 it has sharded tensors.

        There is no random state: all random numbers follow from the seed and the step.
        """
        scaler = self.accelerator.scaler
        return {
            "model": self.module.state_dict(),
            "optimizer": self.update.optimizer.state_dict(),
            "average": self.update.average.state_dict() if self.update.average else None,
            "scaler": scaler.state_dict() if scaler else None,
            "schedule": self.schedule.state_dict(),
            "meter": self.meter.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the unsharded values of what `state_dict` returned, at the same or another number of processes."""
        optimizer = self.update.optimizer
        self.module.load_state_dict(shard_model_state(state["model"], self.module))
        optimizer.load_state_dict(shard_optimizer_state(state["optimizer"], optimizer))
        # With a scaler, Accelerate wraps the optimizer.
        add_missing_state(getattr(optimizer, "optimizer", optimizer))
        if self.update.average and state["average"]:
            self.update.average.load_state_dict(state["average"])
        elif self.update.average:  # the checkpoint's recipe had no averaged weights: averaging starts here
            self.update.average.module.load_state_dict(state["model"])
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.schedule.load_state_dict(state["schedule"])
        self.meter.load_state_dict(state["meter"])

    def describe_weights(self, recipe: Recipe) -> dict[str, Any]:
        """Returns what is needed to rebuild the network from its weights and to prepare images for it."""
        data = self.update.data
        about = {"recipe": recipe.name, "model": recipe.model.name, "keywords": recipe.model.keywords}
        known = {"classes": data.classes, "shape": data.shape, "mean": data.mean, "std": data.std}
        return about | known | {"geometry": describe_geometry(training_geometry(recipe, data))}


@dataclass
class Progress:
    """How far a run has come. Order, augmentation and learning rate follow from the step."""

    step: int = 0
    evaluated_at: int = 0
    """The step after which the network was last evaluated."""
    best_accuracy: float = -1.0
    best_epoch: float = 0.0
    evaluations_without_gain: int = 0
    last: dict[str, float] = field(default_factory=dict)
    """Figures of the last evaluation, and of the training between the last two evaluations."""

    def note(self, evaluation: Evaluation, training: dict[str, float], epoch: float) -> bool:
        """Stores an evaluation made after `step`; returns whether its accuracy is the best so far."""
        self.last = {**training, "eval/loss": evaluation.loss, "eval/accuracy": evaluation.accuracy}
        self.evaluated_at = self.step
        self.evaluations_without_gain += 1
        if evaluation.accuracy <= self.best_accuracy:
            return False
        self.best_accuracy, self.best_epoch, self.evaluations_without_gain = evaluation.accuracy, epoch, 0
        return True


def training_geometry(recipe: Recipe, data: Images) -> Geometry:
    """Returns the geometry of a recipe's training images."""
    published = recipe.data.dataset in SHAPES and data.shape[0] == 1
    return measure_geometry(data.images, None if published else recipe.data.resize)
