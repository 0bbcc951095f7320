"""What a run consists of: its training components and its progress."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import nn

from mnist_dist.data import Batches, Images
from mnist_dist.distributed.fsdp import shard_model_state, shard_optimizer_state, unshard, unsharded_parameters
from mnist_dist.engine.checkpoint import save_weights
from mnist_dist.engine.evaluation import Evaluation, evaluate
from mnist_dist.engine.metrics import Meter
from mnist_dist.engine.schedules import Schedule
from mnist_dist.engine.train_step import Update
from mnist_dist.recipe.schema import Recipe


@dataclass(frozen=True)
class TrainingComponents:
    """What a run is made of once the recipe has been built."""

    accelerator: Accelerator
    batches: Batches
    schedule: Schedule
    update: Update
    module: nn.Module
    """The bare network."""
    eval_model: nn.Module
    """The network that is evaluated and saved: the averaged weights where the recipe keeps them."""
    meter: Meter
    total_steps: int
    notes: list[str]
    """What the user should know of how it was built."""

    def epoch(self, progress: Progress) -> float:
        """Epochs done, with the fraction."""
        return round(progress.step / self.batches.steps_per_epoch, 6)

    def evaluation_is_due(self, progress: Progress, eval_every: int) -> bool:
        """At the end of every `eval_every` epochs and after the last step, once."""
        epochs, rest = divmod(progress.step, self.batches.steps_per_epoch)
        due = progress.step >= self.total_steps or (rest == 0 and epochs % eval_every == 0)
        return due and progress.step != progress.evaluated_at

    def evaluate(self, data: Images, batch_size: int, interrupted: Callable[[], bool] = lambda: False) -> Evaluation:
        # Each process gathered batch norm's statistics from its own rows; rank 0's are the run's.
        if self.accelerator.num_processes > 1:
            broadcast(list(self.eval_model.buffers()))
        with unsharded_parameters(self.eval_model):
            return evaluate(self.accelerator, self.eval_model, data, batch_size=batch_size, interrupted=interrupted)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The trained weights, and the gradients of the last step, by name; asks all processes."""
        named = dict(self.module.named_parameters())
        gradients = {f"gradients/{name}": each.grad for name, each in named.items() if each.grad is not None}
        return unshard({f"weights/{name}": each.detach() for name, each in named.items()} | gradients)

    def state_dict(self) -> dict[str, Any]:
        """All that the next update depends on; asks all processes. No random state: there is none."""
        scaler = self.accelerator.scaler
        return {
            "model": unshard(self.module.state_dict()),
            "optimizer": unshard(self.update.optimizer.state_dict()),
            "average": self.update.average.state_dict() if self.update.average else None,
            "scaler": scaler.state_dict() if scaler else None,
            "schedule": self.schedule.state_dict(),
            "meter": self.meter.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up where `state_dict` was taken, at this world size or another."""
        optimizer = self.update.optimizer
        self.module.load_state_dict(shard_model_state(state["model"], self.module))
        optimizer.load_state_dict(shard_optimizer_state(state["optimizer"], optimizer))
        if self.update.average and state["average"]:
            self.update.average.load_state_dict(state["average"])
        elif self.update.average:  # the recipe has it since: it begins here
            self.update.average.module.load_state_dict(state["model"])
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.schedule.load_state_dict(state["schedule"])
        self.meter.load_state_dict(state["meter"])

    def save_weights(self, path: Path, recipe: Recipe) -> None:
        """Saves the judged weights, with what rebuilds and feeds the network, on rank 0; asks all processes."""
        weights = unshard(self.eval_model.state_dict())
        if self.accelerator.is_main_process:
            data = self.update.data
            about = {"recipe": recipe.name, "model": recipe.model.name, "keywords": recipe.model.keywords}
            save_weights(path, weights, about | {"classes": data.classes, "mean": data.mean, "std": data.std})


@dataclass
class Progress:
    """Where a run stands; everything else follows from the step."""

    step: int = 0
    evaluated_at: int = 0
    """The step after which the last evaluation was made."""
    best_accuracy: float = -1.0
    best_epoch: float = 0.0
    evaluations_without_gain: int = 0
    last: dict[str, float] = field(default_factory=dict)
    """Figures of the last evaluation and of the training since the one before."""

    def note(self, evaluation: Evaluation, training: dict[str, float], epoch: float) -> bool:
        """Takes down an evaluation after `step`; whether its accuracy is the best so far."""
        self.last = {**training, "eval/loss": evaluation.loss, "eval/accuracy": evaluation.accuracy}
        self.evaluated_at = self.step
        self.evaluations_without_gain += 1
        if evaluation.accuracy <= self.best_accuracy:
            return False
        self.best_accuracy, self.best_epoch, self.evaluations_without_gain = evaluation.accuracy, epoch, 0
        return True
