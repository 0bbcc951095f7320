"""Decides when a checkpoint is due, has a thread save checkpoints and weights, and reports why a run failed."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mnist_dist.distributed.collectives import is_lost_connection, run_on_all_ranks
from mnist_dist.distributed.fsdp import is_sharded
from mnist_dist.distributed.signals import PREEMPTED
from mnist_dist.distributed.world_size_option import is_elastic
from mnist_dist.engine.checkpoint import (
    SHARED_DISK,
    list_checkpoints,
    save_checkpoint,
    save_weights,
    stage_checkpoint,
    staged_folder,
)
from mnist_dist.engine.evaluation import Evaluation
from mnist_dist.engine.shards import save_shards, shard_offset, split_shards
from mnist_dist.engine.train_step import NotFinite
from mnist_dist.engine.writer import Writer
from mnist_dist.errors import Problem, RecipeError, RunError
from mnist_dist.recipe.schema import Recipe
from mnist_dist.run.components import Progress, TrainingComponents
from mnist_dist.run.elastic_saves import ElasticSaves
from mnist_dist.run.failures import describe_cause
from mnist_dist.run.folder import RunFolder
from mnist_dist.run.plan import Plan, identify_data
from mnist_dist.run.resume import file_bytes
from mnist_dist.tracking import ConsoleTracker, JSONLTracker, OtherTracker, WandbTracker, find_tracker

STATE, WEIGHTS = "state", "weights"
"""What a run copies to the host: the state of a checkpoint, and the weights that are saved alone."""


class Checkpointer:
    """Saves weights and checkpoints, measures the training time and reports a failure.

    A save copies the values to the host and returns; a thread of rank 0 writes them. A failure of that thread is raised
    by the next save, on all ranks; `has_failed` is then true, and the training loop saves and stops. With FSDP2 the
    threads of all ranks write their shards of a checkpoint; that of rank 0 publishes it when all are written.

    Every method that saves is collective: call it on every rank.
    """

    def __init__(self, folder: RunFolder, recipe: Recipe, components: TrainingComponents, progress: Progress):
        self._folder, self._recipe, self._components, self._progress = folder, recipe, components, progress
        self._state = components.accelerator.state
        self._is_main = components.accelerator.is_main_process
        self._writer = Writer(components.accelerator.device)
        self._data = identify_data(components.update.data)
        self._about = components.describe_weights(recipe) | {"data": self._data["digest"]} if self._is_main else {}
        self._shard_group: Any = None  # the process group of the ranks' threads, if the state is sharded
        if any(is_sharded(parameter) for parameter in components.module.parameters()):
            run_on_all_ranks(self._state, self._check_disk)
            self._shard_group = dist.new_group(backend="gloo")
        self._pauses: list[float] = []
        self._elastic = ElasticSaves(recipe.checkpoint.elastic_seconds if is_elastic() else None)
        self._has_reserved = False
        self.start(0.0)

    # --- time -----------------------------------------------------------------------------------------------------

    def start(self, seconds_before: float) -> None:
        """Starts to measure the training time.

        Args:
            seconds_before: the training time of the checkpoint that the run resumes from.
        """
        self._began = time.perf_counter() - seconds_before
        self._saved_at = self._components.meter.train_seconds
        self._saved_step = self._progress.step  # the step of the checkpoint that the run resumes from, or 0
        self._first_step = self._progress.step

    def train_seconds(self) -> float:
        """Returns the seconds that all steps so far took, evaluations included.

        A killed process may have made steps after its last checkpoint. They count once: in the process that repeats
        them.
        """
        return round(time.perf_counter() - self._began, 3)

    # --- saving ---------------------------------------------------------------------------------------------------

    def save_best(self) -> None:
        """Saves best.safetensors. Collective: call on every rank."""
        with self._pause():
            self._save_weights(self._folder.best)

    def save_last(self) -> dict[str, float]:
        """Saves last.safetensors, and the checkpoint of the last step if there is none. Waits for all files.

        Collective: call on every rank. Without that checkpoint, an interrupted end of the run would repeat training.

        Returns:
            The seconds of the training, of the pauses of the training loop for saves, of the longest pause, and of the
            thread that writes. A resumed run counts the saves of its last process.
        """
        train_seconds = self.train_seconds()
        if self._saved_step != self._progress.step:  # early stopping
            self.save()
        self._save_weights(self._folder.last)
        self.wait()
        seconds = {
            "saving.pause_seconds": sum(self._pauses),
            "saving.longest_pause": max(self._pauses, default=0.0),
            "saving.write_seconds": self._writer.seconds,
        }
        return {"train_seconds": train_seconds} | {key: round(value, 4) for key, value in seconds.items()}

    @property
    def has_failed(self) -> bool:
        """Whether a file could not be written. The next save raises the error."""
        return self._writer.has_failed

    def is_due(self, logged: bool) -> bool:
        """Returns whether the recipe asks for a checkpoint now; the answer is the same on every rank.

        The first call also reserves the memory for the copies.

        Args:
            logged: whether this step wrote a log line. `every_minutes` is checked at log lines only, because only there
                all ranks know the same training time.
        """
        if not self._has_reserved:
            self._reserve_memory()
        rule, seconds = self._recipe.checkpoint, self._components.meter.train_seconds - self._saved_at
        by_steps = rule.every_steps is not None and self._progress.step % rule.every_steps == 0
        # Always after the last step: if the end of the run is interrupted, no training has to be repeated.
        by_steps = by_steps or self._progress.step == self._components.total_steps
        per_step = self._components.meter.seconds_per_step
        since = self._saved_step if per_step else self._first_step
        by_steps = by_steps or self._elastic.are_due(self._progress.step - since, per_step)
        return by_steps or (logged and rule.every_minutes is not None and seconds >= 60 * rule.every_minutes)

    def _reserve_memory(self) -> None:
        """Reserves the memory for the copies of the largest tensors. Call it once the optimizer has its state."""
        module, optimizer = self._components.module, self._components.update.optimizer
        large = {"model": module.state_dict(), "optimizer": optimizer.state_dict()}
        if self._is_main or self._shard_group:
            self._writer.reserve(STATE, self._split({"components": large})[0])
        if self._is_main:
            self._writer.reserve(WEIGHTS, self._components.eval_model.state_dict())
        self._has_reserved = True

    def _split(self, state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, list[int]]]:
        """Returns what this rank copies of a state, its shards separately; and the offsets of the shards."""
        state, shards = split_shards(state)
        local = {name: each.to_local() for name, each in shards.items()}
        offsets = {name: shard_offset(each) for name, each in shards.items()}
        return {"state": state if self._is_main else None, "shards": local}, offsets

    def save(self, wait: bool = False) -> None:
        """Saves `checkpoints/step-N` with everything that the next step depends on. Collective: call on every rank.

        Args:
            wait: return when the checkpoint is published, not when its values are copied.

        Raises:
            NotFinite: an earlier step had a gradient that is not finite; nothing is saved.
            OSError: this or an earlier file cannot be written.
            RunError: a file cannot be written on another rank.
        """
        with self._pause():
            self._components.update.check()
            run_on_all_ranks(self._state, self._prepare_state)
            state: dict[str, Any] = {"components": self._components.state_dict(), "progress": asdict(self._progress)}
            self._saved_at, self._saved_step = self._components.meter.train_seconds, self._progress.step
            state["train_seconds"] = self.train_seconds()
            batches = self._components.batches
            state["plan"] = asdict(Plan(batches.num_samples, batches.batch_size, self._components.total_steps))
            state["data"] = self._data
            if metrics := find_tracker(self._components.accelerator, JSONLTracker):
                state["metrics_bytes"] = metrics.bytes_written()
            if wandb := find_tracker(self._components.accelerator, WandbTracker):
                state["wandb_id"] = wandb.run_id
            value, offsets = self._split(state)
            publish = partial(self._publish, metrics, self._progress.step, offsets)
            self._writer.write(STATE, value, publish if self._is_main or self._shard_group else None)
        self._elastic.note(self._pauses[-1])
        if wait:
            self.wait()

    def _prepare_state(self) -> None:
        """Waits for the earlier state. If the state is sharded, rank 0 creates the folder that all ranks write into.

        A sharded state waits for all earlier files: a thread that has failed would leave those of other ranks waiting.
        """
        self._writer.wait_until_written(*([] if self._shard_group else [STATE]))
        if self._shard_group and self._is_main:
            self._folder.end_if_lost()
            stage_checkpoint(self._folder.checkpoints, self._progress.step)

    def _publish(
        self, metrics: JSONLTracker | None, step: int, offsets: dict[str, list[int]], value: dict[str, Any]
    ) -> None:
        """Writes a checkpoint. Runs in the thread of rank 0, and with a sharded state in the thread of every rank."""
        folder, state, shards = self._folder.checkpoints, value["state"], None
        if self._shard_group:
            shards = save_shards(staged_folder(folder, step), value["shards"], offsets, self._state, self._shard_group)
        if not self._is_main:
            return
        self._folder.end_if_lost()
        if metrics:
            metrics.flush_to_disk()
        # A best.safetensors that exists before the first evaluation is from a killed process and a later step.
        if state["progress"]["evaluated_at"] and self._folder.best.is_file():
            state["best"] = file_bytes(self._folder.best)
        save_checkpoint(folder, step, state, keep=self._recipe.checkpoint.keep, shards=shards)

    def _save_weights(self, path: Path) -> None:
        """Has the thread write the weights of the network that is evaluated. Collective: call on every rank."""
        self.wait(WEIGHTS)
        weights = self._components.eval_model.state_dict()

        def write(copy: dict[str, Any]) -> None:
            self._folder.end_if_lost()
            save_weights(path, copy, self._about)

        self._writer.write(WEIGHTS, weights, write if self._is_main else None)

    def wait(self, *names: str) -> None:
        """Waits for the thread on all ranks, and raises its error on all ranks. Collective: call on every rank."""
        run_on_all_ranks(self._state, lambda: self._writer.wait_until_written(*names))

    def _check_disk(self) -> None:
        """Raises RecipeError on a machine that does not have the run folder."""
        if not self._folder.recipe.is_file():
            message = f"{self._folder.path} does not exist on {socket.gethostname()}: {SHARED_DISK}"
            raise RecipeError([Problem("command line", "--run-dir", message, "missing")])

    @contextmanager
    def _pause(self) -> Iterator[None]:
        """Measures how long the training loop pauses."""
        began = time.perf_counter()
        yield
        self._pauses.append(time.perf_counter() - began)

    def log_evaluation(self, evaluation: Evaluation) -> None:
        """Logs an evaluation's confusion matrix and histograms to W&B. Collective: call on every rank."""
        tensors = self._components.tensors() if self._recipe.tracking.wandb.histograms else {}
        classes = self._components.update.data.classes
        if wandb := find_tracker(self._components.accelerator, WandbTracker):
            wandb.log_evaluation(evaluation.confusion, classes, tensors, step=self._progress.step)

    # --- failures -------------------------------------------------------------------------------------------------

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """Waits for the thread, and ends the trackers of a run that failed.

        Raises:
            RunError: replaces an error for which `describe_failure` has a message.
        """
        if error is None:
            self._writer.close()
            return
        message = self.describe_failure(error)
        self._writer.close()
        cause = message or f"{type(error).__name__}: {error}" if isinstance(error, Exception) else None
        with suppress(OSError):
            self._end_trackers(cause, resumes=is_elastic() and is_lost_connection(error))
        if message:
            raise RunError(message) from error

    def mark_failed(self) -> None:
        """Sets the status to failed. Does not wait for other processes, so the watchdog can call it.

        An elastic run has not failed: torchrun starts its processes again.
        """
        if not is_elastic():
            self._folder.set_status("failed")

    def describe_failure(self, error: BaseException) -> str | None:
        """Returns a message with the cause, a remedy and the last checkpoint; None if only a traceback helps.

        If a gradient is not finite, also saves a checkpoint of the state before that step. All ranks raise this error,
        so all of them save.
        """
        if is_elastic() and is_lost_connection(error):
            rank, size = self._components.accelerator.process_index, self._components.accelerator.num_processes
            where = f"rank {rank} of {size} on {socket.gethostname()} in step {self._progress.step}"
            return f"{where}: another process has ended; the launcher starts all processes again"
        lines = describe_cause(error, self._recipe, self._components, self._progress.step, self._folder.path)
        if lines is None:
            return None
        if isinstance(error, NotFinite):
            self._progress.step = error.step
            self.save(wait=True)
        self._writer.close()  # the thread may still be writing the last checkpoint
        saved = list_checkpoints(self._folder.checkpoints)
        end = "no checkpoint was saved"
        if saved:
            end = f"the last checkpoint is {saved[-1]}. Rerun the same command to resume."
        return "\n  ".join([*lines, end])

    def _end_trackers(self, cause: str | None, resumes: bool) -> None:
        """Ends all trackers. The console's log gets the cause, and W&B sends an alert; Ctrl-C has no cause.

        Args:
            resumes: the run resumes by itself, so W&B sends no alert.
        """
        for tracker in reversed(self._components.accelerator.trackers):  # the console last: others write to it
            if isinstance(tracker, ConsoleTracker) and cause is not None:
                tracker.note(cause)
            if isinstance(tracker, OtherTracker):
                tracker.end("KILLED" if cause is None or resumes else "FAILED")
            elif not isinstance(tracker, WandbTracker):
                tracker.finish()  # otherwise a terminal keeps its cursor hidden
            elif resumes:
                tracker.preempt(PREEMPTED)
            elif cause is not None:
                tracker.fail(f"{self._recipe.name} failed", cause)
