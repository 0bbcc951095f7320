"""SIGTERM, SIGINT and SIGUSR1 as a flag that all processes agree on at a step boundary; never work in a handler."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

PREEMPTED = 75
"""Exit code of a run that saved and stopped because it was asked to: run me again (EX_TEMPFAIL of sysexits.h)."""

ECHO_SECONDS = 2.0
"""A signal this soon after the first is the same request once more: Ctrl-C reaches a process from the terminal and, a
moment later, from its launcher."""

AGREE_SECONDS = 0.5
"""Processes ask one another about signals about this often."""


class Interrupts:
    """While entered, a first signal asks the run to stop at a step boundary; a second ends the process at once."""

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self._asked = False
        self._asked_at = 0.0
        self._questions = 0
        self._every = 1
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():  # another thread can set no handler
            self._before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
            _die_with_launcher()
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            # A dying launcher may say so several times, once for each of its threads, while we write the last words.
            echo = self._asked and number == LAUNCHER_DIED and _has_launcher()
            signal.signal(number, signal.SIG_IGN if echo else handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self._asked:
            self._asked, self._asked_at = True, time.monotonic()
        elif number != LAUNCHER_DIED and time.monotonic() - self._asked_at > ECHO_SECONDS:
            os._exit(128 + number)

    def pace(self, seconds_per_step: float) -> None:
        """Sets how often the others are asked, from a step's duration, the same number on all processes."""
        self._every = max(1, int(AGREE_SECONDS / max(seconds_per_step, 1e-6)))

    def agreed(self) -> bool:
        """Whether any process was asked to stop; all processes call this equally often and get the same answer."""
        if self._accelerator.num_processes == 1:
            return self._asked
        self._questions += 1
        if self._questions % self._every:
            return False
        asked = torch.tensor(int(self._asked), device=self._accelerator.device)
        return bool(self._accelerator.reduce(asked, reduction="sum"))


LAUNCHER_DIED = signal.SIGUSR1
"""Not SIGTERM: this signal never counts as a second one."""


def _has_launcher() -> bool:
    return bool({"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys())


def _die_with_launcher() -> None:
    """Turns the launcher's death into a signal: `accelerate launch` forwards none to a single process.

    Only under a launcher: a plain `python -m` may well outlive the shell that started it.
    """
    if sys.platform == "linux" and _has_launcher():
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of linux/prctl.h
        ctypes.CDLL(None).prctl(set_parent_death_signal, LAUNCHER_DIED)
