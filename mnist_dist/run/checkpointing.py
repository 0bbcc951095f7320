"""What a run saves, when, and how it comes back after it was killed."""

from __future__ import annotations

import errno
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from mnist_dist.engine.checkpoint import (
    list_checkpoints,
    load_checkpoint,
    load_weights,
    newest_checkpoint,
    save_checkpoint,
)
from mnist_dist.engine.evaluation import Evaluation
from mnist_dist.engine.train_step import NotFinite
from mnist_dist.errors import Problem, RecipeError, RunError
from mnist_dist.recipe.schema import Recipe, load_recipe
from mnist_dist.run.build import Progress, TrainingComponents
from mnist_dist.run.folder import RunFolder, refuse_changes
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
                state["best"] = _content(self._folder.best)
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


def find_checkpoint(source: str, recipe: Recipe, allow_recipe_change: bool) -> tuple[RunFolder, dict[str, Any]]:
    """The run folder that a checkpoint lies in, and its state.

    Args:
        source: a checkpoint, or a run folder, whose newest valid checkpoint it is.

    Raises:
        RecipeError: there is no valid checkpoint, or its recipe is another one.
    """

    def refuse(message: str) -> RecipeError:
        return RecipeError([Problem("command line: --resume", "", message)])

    path = Path(source)
    candidates = [path] if path.name.startswith("step-") else list_checkpoints(path / "checkpoints")[::-1]
    problems = []
    for candidate in candidates:
        try:
            state = load_checkpoint(candidate)
            break
        except ValueError as error:
            problems.append(str(error))
    else:
        raise refuse("\n".join(problems) or f"{path} holds no checkpoint; name a run folder or its checkpoints/step-N")
    origin = RunFolder(candidate.absolute().parent.parent)
    if origin.recipe.is_file() and (changes := refuse_changes(load_recipe(origin.recipe), recipe, allow_recipe_change)):
        raise refuse(f"{candidate} is of another recipe:\n{changes}")
    return origin, state


def has_checkpoint(run_dir: str | Path | None, resume: str, state: PartialState) -> bool:
    """Whether the run will go on from a checkpoint, whole or damaged, as rank 0 sees it; asks all processes."""
    found = resume not in ("auto", "never") or (state.is_main_process and holds_checkpoint(run_dir))
    return broadcast_object_list([found])[0]


def holds_checkpoint(run_dir: str | Path | None) -> bool:
    """Whether one, whole or damaged, lies in this run folder."""
    with suppress(OSError):  # that the folder cannot be used is said when it is opened
        return run_dir is not None and bool(list_checkpoints(RunFolder(Path(run_dir)).checkpoints))
    return False


def adopt(folder: RunFolder, origin: RunFolder, state: dict[str, Any], keep: int) -> None:
    """Puts another run's checkpoint and its metrics up to there into a fresh folder, which goes on as its own run."""
    if origin.metrics.is_file():
        folder.metrics.write_bytes(origin.metrics.read_bytes()[: state.get("metrics_bytes", 0)])
    state = {key: value for key, value in state.items() if key != "wandb_id"}
    save_checkpoint(folder.checkpoints, state["progress"]["step"], state, keep=keep)


def load_newest(folder: RunFolder, state: PartialState) -> tuple[dict[str, Any], list[str]]:
    """The newest valid checkpoint ({} where there is none), equal on all processes; and what is wrong with others."""
    found: list[Any] = [None]
    if state.is_main_process:
        checkpoint, problems = newest_checkpoint(folder.checkpoints)
        if checkpoint and "best" in checkpoint:
            problems += _put_back(checkpoint.pop("best"), folder.best)
        found = [(checkpoint, problems)]
    checkpoint, problems = broadcast_object_list(found)[0]
    return checkpoint or {}, problems


def _content(path: Path) -> torch.Tensor:
    """A file's bytes, uint8."""
    return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)


def _put_back(content: torch.Tensor, best: Path) -> list[str]:
    """Makes the best weights those that a checkpoint knows of; says so if they were damaged or gone."""
    try:
        load_weights(best)
        problems = []
    except (OSError, ValueError) as error:
        problems = [f"{error}; put back from the checkpoint"]
    if problems or not torch.equal(_content(best), content):
        staged = best.with_name(best.name + ".tmp")
        staged.write_bytes(content.numpy().tobytes())
        staged.replace(best)
    return problems
