"""Shows in a progress bar the figures of the training, and what it waits for if the bar has not moved for a while."""

from __future__ import annotations

import sys
import threading

from rich.progress import ProgressColumn, Task
from rich.table import Column
from rich.text import Text

QUIET_SECONDS = 10.0
"""After a longer time without movement, the figures are replaced: they are old."""

ACTIVITIES = {
    "mnist_dist.data.loader": "images",
    "mnist_dist.distributed.gradients": "gradients of other processes",
    "mnist_dist.distributed.logical_shards": "gradients of other processes",
    "mnist_dist.distributed.signals": "other processes",
    "mnist_dist.engine.checkpoint": "a checkpoint",
    "mnist_dist.engine.evaluation": "an evaluation",
    "mnist_dist.engine.metrics": "figures of other processes",
    "mnist_dist.engine.train_step": "a training step",
    "mnist_dist.tracking.others": "the other trackers",
    "mnist_dist.tracking.wandb": "W&B",
}
"""Module whose code the training executes -> what the user waits for."""


class FiguresColumn(ProgressColumn):
    """Shows `figures` of the bar, or what the training waits for if the bar has not moved for `QUIET_SECONDS`.

    The bar is drawn by a thread of its own, so it shows what happens also while the training hangs.
    """

    def __init__(self) -> None:
        super().__init__(Column(no_wrap=True))
        self._training = threading.get_ident()
        self._moved = 0.0, 0.0
        """How far the bar has come, and when."""

    def render(self, task: Task) -> Text:
        """Returns the text of the column."""
        now = task.get_time()
        if task.completed != self._moved[0]:
            self._moved = task.completed, now
        quiet = now - max(self._moved[1], now if task.start_time is None else task.start_time)
        if quiet <= QUIET_SECONDS:
            return Text(task.fields["figures"])
        return Text(f"{quiet:.0f} s: waiting for {activity(self._training)}")


def activity(thread: int) -> str:
    """Returns what a thread is doing: the innermost module of `ACTIVITIES` on its stack."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if found := ACTIVITIES.get(frame.f_globals.get("__name__", "")):
            return found
        frame = frame.f_back
    return "the next step"
