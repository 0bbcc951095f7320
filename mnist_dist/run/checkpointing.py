"""What a run saves, when, and how it comes back after it was killed."""

from __future__ import annotations

import errno
import time
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from mnist_dist.engine.checkpoint import (
    list_checkpoints,
    save_checkpoint,
)
from mnist_dist.engine.evaluation import Evaluation
from mnist_dist.engine.train_step import NotFinite
from mnist_dist.errors import RunError
from mnist_dist.recipe.schema import Recipe
from mnist_dist.run.components import Progress, TrainingComponents
from mnist_dist.run.folder import RunFolder
from mnist_dist.run.resume import file_bytes
from mnist_dist.tracking import JSONLTracker, WandbTracker, find_tracker


class Checkpointer:
    """Saves a run's weights and checkpoints, knows its time, and tells of its failure. All processes call it alike."""

    def __init__(self, folder: RunFolder, recipe: Recipe, components: TrainingComponents, progress: Progress):
        self._folder, self._recipe, self._components, self._progress = folder, recipe, components, progress
        self.start(0.0)

    def start(self, seconds_before: float) -> None:
        """Starts the clock of the training, which goes on from where the checkpoint's stood."""
        self._began = time.perf_counter() - seconds_before
        self._saved_at = self._components.meter.train_seconds

    def train_seconds(self) -> float:
        """How long the loop took for the steps so far, evaluations included; what a killed process did again, once."""
        return round(time.perf_counter() - self._began, 3)

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """Of a run that broke off: ends its trackers, and tells what the user can do.

        Raises:
            RunError: in the place of an error that can be told in a few words.
        """
        if error is None:
            return
        message = self.describe_failure(error)
        with suppress(OSError):
            self._end_trackers(message or f"{type(error).__name__}: {error}" if isinstance(error, Exception) else None)
        if message:
            raise RunError(message) from error

    def save_best(self) -> None:
        self._components.save_weights(self._folder.best, self._recipe)

    def save_last(self) -> None:
        self._components.save_weights(self._folder.last, self._recipe)

    def log_evaluation(self, evaluation: Evaluation) -> None:
        """Gives W&B what of an evaluation is more than its two figures."""
        tensors = self._components.tensors() if self._recipe.tracking.wandb.histograms else {}
        classes = self._components.update.data.classes
        if wandb := find_tracker(self._components.accelerator, WandbTracker):
            wandb.log_evaluation(evaluation.confusion, classes, tensors, step=self._progress.step)

    def is_due(self, logged: bool) -> bool:
        """After every `every_steps` updates; by `every_minutes` at log lines, where all processes know the time."""
        rule, seconds = self._recipe.checkpoint, self._components.meter.train_seconds - self._saved_at
        by_steps = rule.every_steps is not None and self._progress.step % rule.every_steps == 0
        return by_steps or (logged and rule.every_minutes is not None and seconds >= 60 * rule.every_minutes)

    def save(self) -> None:
        """Publishes `checkpoints/step-N`: everything from which the run goes on as if nothing had happened.

        Raises:
            NotFinite: instead, where a step before had a gradient that was not.
        """
        self._components.update.check()
        state: dict[str, Any] = {"parts": self._components.state_dict(), "progress": asdict(self._progress)}
        self._saved_at = self._components.meter.train_seconds
        state["train_seconds"] = self.train_seconds()
        if metrics := find_tracker(self._components.accelerator, JSONLTracker):
            state["metrics_bytes"] = metrics.bytes_written()
        if wandb := find_tracker(self._components.accelerator, WandbTracker):
            state["wandb_id"] = wandb.run_id
        if self._components.accelerator.is_main_process:
            # Before the first evaluation what stands there is of a later moment, from before a kill.
            if self._progress.evaluated_at and self._folder.best.is_file():
                state["best"] = file_bytes(self._folder.best)
            save_checkpoint(self._folder.checkpoints, self._progress.step, state, keep=self._recipe.checkpoint.keep)

    def mark_failed(self) -> None:
        """For a run that ends by force: the status, and nothing that could wait for anybody."""
        self._folder.set_status("failed")

    def _end_trackers(self, failed_of: str | None) -> None:
        """Has W&B tell the user of a failure, where it is one; a person's Ctrl-C is none."""
        for tracker in self._components.accelerator.trackers:
            if not isinstance(tracker, WandbTracker):
                tracker.finish()  # a terminal would stay without its cursor
            elif failed_of is not None:
                tracker.fail(f"{self._recipe.name} failed", failed_of)

    def describe_failure(self, error: BaseException) -> str | None:
        """What the user can do about a run that broke off, and what is left; None where only a traceback helps."""
        if isinstance(error, NotFinite):  # on all processes alike
            lines = self._describe_nonfinite(error.step)
            self._progress.step = error.step
            self.save()
        elif isinstance(error, OSError) and error.errno in UNWRITABLE:
            lines = [f"{error.filename or self._folder.path} cannot be written: {error.strerror}"]
        else:
            return None
        saved = list_checkpoints(self._folder.checkpoints)
        left = (
            f"the last checkpoint is {saved[-1]}; the same command goes on from it"
            if saved
            else "nothing was saved yet"
        )
        return "\n  ".join([*lines, left])

    def _describe_nonfinite(self, step: int) -> list[str]:
        """Where a gradient that is not finite comes from."""
        epoch, index = divmod(step, self._components.batches.steps_per_epoch)
        lines = [f"the gradient of step {step} (epoch {epoch}, batch {index}) is not finite; the update was not made"]
        offending_samples = self._components.update.offending_samples(step)
        for rank, samples in offending_samples:
            listed = ", ".join(map(str, samples[:10])) + (f" and {len(samples) - 10} more" if samples[10:] else "")
            lines.append(f"rank {rank}: the loss of training samples {listed} is not finite")
        if not offending_samples:
            lines.append("every sample alone has a finite loss: only the batch as a whole has not, or its gradient")
        return [*lines, "try a lower optimizer.lr, clip_grad_norm=1 or on_nonfinite=skip"]


UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)
