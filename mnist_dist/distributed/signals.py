"""Turns SIGTERM, SIGINT, SIGUSR1 and SIGHUP into a stop request that all ranks see at the same step.

Imports torch only when ranks exchange a request, because a command calls `exit_on_signals` before it imports torch.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState

NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP", "SIGBREAK")
"""SIGHUP comes when the terminal or the SSH connection closes. Of the last three, Windows has SIGBREAK only."""

SIGNALS: tuple[signal.Signals, ...] = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))

PREEMPTED = 75
"""Exit code of a run that saved a checkpoint and stopped on request, or stopped before it began.

The same command resumes or starts the run. The code is EX_TEMPFAIL of sysexits.h.
"""

ECHO_SECONDS = 2.0
"""A signal within this time after the first one counts as the same request: the terminal sends Ctrl-C to each process,
and a moment later the launcher forwards it."""

AGREE_SECONDS = 0.5
"""Approximate interval at which the ranks exchange their stop requests."""

LAUNCHER_DIED = getattr(signal, "SIGUSR1", None)
"""Signal that the kernel sends when the launcher dies. It differs from SIGTERM because it never counts as a second
request."""


def handled_signals() -> list[signal.Signals]:
    """Returns the signals that request a stop. `nohup` ignores SIGHUP, and then this process does too."""
    return [each for each in SIGNALS if each.name != "SIGHUP" or signal.getsignal(each) is not signal.SIG_IGN]


def exit_on_signals() -> None:
    """Makes a signal end this process at once with exit code 75, until `Interrupts` handles signals.

    For a command that has not yet opened its run folder: there is nothing to save.
    """
    for number in handled_signals():
        signal.signal(number, _exit_preempted)
    _request_signal_when_launcher_dies()


def _exit_preempted(number: int, frame: FrameType | None) -> None:
    if os.environ.get("RANK", "0") == "0":
        os.write(2, b"mnist_dist: stop requested before the run began. Rerun the same command to start it.\n")
    os._exit(PREEMPTED)


class Interrupts:
    """Handles signals inside the context: the first one requests a stop, a second one ends the process at once.

    The handlers only set a flag. The training loop reads it with `stop_requested` between two steps. Contexts of the
    same object may be nested: the outermost one installs and removes the handlers.
    """

    def __init__(self, world: Accelerator | PartialState):
        self._world = world
        self._requested = False
        self._requested_at = 0.0
        self._calls = 0
        self._interval = 1
        self._depth = 0
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        self._depth += 1
        if self._depth == 1 and threading.current_thread() is threading.main_thread():  # only it can set handlers
            self._previous_handlers = {number: signal.signal(number, self._on_signal) for number in handled_signals()}
            _request_signal_when_launcher_dies()
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self._depth -= 1
        if self._depth:
            return
        for number, handler in self._previous_handlers.items():
            # If the launcher dies, the kernel may send one signal for each of the launcher's threads. They must not
            # end this process while it still writes its last files.
            echo = self._requested and number == LAUNCHER_DIED and _has_launcher()
            # The run has ended: the command only has to exit with the code for its status.
            ended = handler is _exit_preempted and error is None
            signal.signal(number, signal.SIG_IGN if echo or ended else handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self._requested:
            self._requested, self._requested_at = True, time.monotonic()
        elif number != LAUNCHER_DIED and time.monotonic() - self._requested_at > ECHO_SECONDS:
            os._exit(128 + number)

    def set_interval(self, seconds_per_step: float) -> None:
        """Sets the number of steps between two exchanges of stop requests.

        Args:
            seconds_per_step: duration of a training step; must be the same number on every rank. 0 (not
                known yet) keeps the interval.
        """
        if seconds_per_step:
            self._interval = max(1, int(AGREE_SECONDS / max(seconds_per_step, 1e-6)))

    def stop_requested(self, must_stop: bool = False) -> bool:
        """Returns whether any rank has received a stop request or must stop; the same value on every rank.

        Collective: call on every rank, equally often. Only one call in each interval communicates. The other calls
        return False.

        Args:
            must_stop: whether this rank must stop, for another reason than a signal.
        """
        requested_here = self._requested or must_stop
        if self._world.num_processes == 1:
            return requested_here
        self._calls += 1
        if self._calls % self._interval:
            return False
        import torch
        from accelerate.utils import reduce

        requested = torch.tensor(int(requested_here), device=self._world.device)
        return bool(reduce(requested, reduction="sum"))

    @property
    def requested_here(self) -> bool:
        """Whether this rank has received a stop request, which the other ranks may not know yet."""
        return self._requested

    def exit_before_start(self) -> None:
        """Ends the process if this rank has received a stop request. Call it before the run folder is opened.

        Raises:
            KeyboardInterrupt: the process is a Python program that called `train`.
        """
        if self._requested and self._previous_handlers.get(signal.SIGTERM) is _exit_preempted:
            _exit_preempted(signal.SIGTERM, None)
        if self._requested:
            raise KeyboardInterrupt


def _has_launcher() -> bool:
    return bool({"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys())


def _request_signal_when_launcher_dies() -> None:
    """Asks the kernel for a signal when the launcher dies: `accelerate launch` forwards no signal to a single process.

    Does nothing without a launcher: a plain `python -m` may outlive the shell that started it.
    """
    if sys.platform == "linux" and _has_launcher():
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of linux/prctl.h
        ctypes.CDLL(None).prctl(set_parent_death_signal, LAUNCHER_DIED)
