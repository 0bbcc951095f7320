"""Decides when an elastic run saves a checkpoint: so often that a lost machine costs a few seconds of training."""

from __future__ import annotations

from accelerate.utils import broadcast_object_list

LARGEST_SHARE = 0.1
"""Largest share of the time that the saves may take."""


class ElasticSaves:
    """Converts the seconds between two checkpoints to steps. All ranks decide alike.

    Args:
        seconds: the seconds of training between two checkpoints; None: never due.
    """

    def __init__(self, seconds: float | None):
        self._seconds, self._pause = seconds, 0.0

    def are_due(self, steps: int, seconds_per_step: float) -> bool:
        """Returns whether to save now.

        Args:
            steps: the number of steps since the last checkpoint, or since the start of this process.
            seconds_per_step: the duration of a step; 0 before the first log line. Until then a checkpoint is due after
                1, 2, 4, … steps, because a step may take any time.
        """
        if self._seconds is None or steps <= 0:
            return False
        if not seconds_per_step:
            return steps & (steps - 1) == 0
        return (steps + 1) * seconds_per_step > max(self._seconds, self._pause / LARGEST_SHARE)

    def note(self, pause: float) -> None:
        """Notes for how many seconds a save paused the training on rank 0. Collective: call on every rank."""
        if self._seconds is not None:
            self._pause = broadcast_object_list([pause])[0]
