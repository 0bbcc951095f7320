"""Shows in a progress bar the figures of the training, and what it waits for if it has not moved for a while."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

from rich.progress import ProgressColumn, Task
from rich.table import Column
from rich.text import Text

QUIET_SECONDS = 10.0
"""After a longer time without a step, the figures are replaced: they are old."""

ACTIVITIES = {
    "mnist_dist.data.loader": "images",
    "mnist_dist.distributed.collectives": "other ranks",
    "mnist_dist.distributed.gradients": "other ranks' gradients",
    "mnist_dist.distributed.logical_shards": "other ranks' gradients",
    "mnist_dist.distributed.signals": "other ranks",
    "mnist_dist.engine.checkpoint": "a checkpoint",
    "mnist_dist.engine.cuda_graph": "a training step",
    "mnist_dist.engine.evaluation": "an evaluation",
    "mnist_dist.engine.metrics": "figures of all ranks",
    "mnist_dist.engine.train_step": "a training step",
    "mnist_dist.engine.writer": "the disk",
    "mnist_dist.plots": "the pictures",
    "mnist_dist.run.checkpointing": "a checkpoint",
    "mnist_dist.run.summary": "the results of the run",
    "mnist_dist.tracking.others": "the other trackers",
    "mnist_dist.tracking.wandb": "W&B",
}
"""Module or package whose code the training executes -> what the user waits for."""


class Standstill:
    """Measures how long the training has not made a step. Created in the thread that trains, asked by other threads.

    Args:
        steps: returns the number of steps made so far.
        clock: returns the time in seconds.
    """

    def __init__(self, steps: Callable[[], int], clock: Callable[[], float]):
        self._training, self._steps, self._clock = threading.get_ident(), steps, clock
        self._moved = steps(), clock()
        """The number of steps when it changed last, and that time."""

    def seconds(self) -> float:
        """Returns the seconds since the last call that found a new step."""
        steps, now = self._steps(), self._clock()
        if steps != self._moved[0]:
            self._moved = steps, now
        return now - self._moved[1]

    def cause(self) -> str:
        """Returns what the training waits for."""
        return activity(self._training)


class FiguresColumn(ProgressColumn):
    """Shows `figures` of the bar, or what the training waits for if it has made no step for `QUIET_SECONDS`.

    The bar is drawn by a thread of its own, so it shows what happens also while the training hangs.
    """

    def __init__(self, standstill: Standstill) -> None:
        super().__init__(Column(no_wrap=True))
        self._standstill = standstill

    def render(self, task: Task) -> Text:
        """Returns the text of the column."""
        quiet = self._standstill.seconds()
        if quiet <= QUIET_SECONDS:
            return Text(task.fields["figures"])
        return Text(f"{quiet:.0f} s: waiting for {self._standstill.cause()}")


def activity(thread: int) -> str:
    """Returns what a thread is doing: the innermost module of `ACTIVITIES`, or of its packages, on its stack."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if found := ACTIVITIES.get(module) or ACTIVITIES.get(module.rpartition(".")[0]):
            return found
        frame = frame.f_back
    return "the next step"
