"""Runs `python -m mnist_dist.train`, writes down the phase of the run, and can stop at a chosen point.

The trainer contains no code for tests. This module wraps its functions. Two environment variables control it:

FAULTS_NOTES  a path; process p of rank r appends a line to `<path>.<r>.<p>` at each start and end of a phase:
              nanoseconds, "+" or "-", the phase, the step
FAULTS_HOLD   "<step> <point>": at the first such point after that many updates, rank 0 notes "held" and waits until
              it is killed
"""

from __future__ import annotations

from mnist_dist.distributed.signals import exit_on_signals

if __name__ == "__main__":
    exit_on_signals()  # as mnist_dist.train does before it imports torch

import functools
import importlib
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from mnist_dist.cli import run_command
from mnist_dist.engine import checkpoint, files
from mnist_dist.engine.train_step import TrainStep
from mnist_dist.engine.writer import Writer
from mnist_dist.run.checkpointing import Checkpointer
from mnist_dist.run.components import Progress, TrainingComponents
from mnist_dist.run.folder import RunFolder
from mnist_dist.tracking import JSONLTracker

train = importlib.import_module("mnist_dist.train")  # `from mnist_dist import train` gives the function


class Point(NamedTuple):
    """A moment in the work with a file: before a function is called for the file, or with half of the work done."""

    phase: str
    """The phase of the main thread, or "writing" for the thread that writes checkpoints and weights."""
    function: str
    """The name of a function that `main` wraps with `Victim.gate`."""
    file: str
    """A pattern of the name of the file or folder that the function works on."""
    half: bool = False


POINTS = {
    "recipe.yaml half written": Point("start", "write_flushed", r"recipe\.yaml\.tmp", half=True),
    "before recipe.yaml has its name": Point("start", "rename_flushed", r"recipe\.yaml"),
    "before STATUS has its name": Point("start", "rename_flushed", "STATUS"),
    "half a line of metrics.jsonl": Point("step", "log", r"metrics\.jsonl", half=True),
    "before the state is written": Point("writing", "write_flushed", r"state\.pt"),
    "state half written": Point("writing", "write_flushed", r"state\.pt", half=True),
    "before the manifest": Point("writing", "write_flushed", r"manifest\.json"),
    "manifest half written": Point("writing", "write_flushed", r"manifest\.json", half=True),
    "before the rename": Point("writing", "rename_flushed", r"step-\d+"),
    "after the rename, before old ones go": Point("writing", "rmtree", r"step-\d+"),
    "an old one half gone": Point("writing", "rmtree", r"step-\d+", half=True),
    "best.safetensors half written": Point("writing", "write_flushed", r"best\.safetensors\.tmp", half=True),
    "before best.safetensors has its name": Point("writing", "rename_flushed", r"best\.safetensors"),
    "last.safetensors half written": Point("writing", "write_flushed", r"last\.safetensors\.tmp", half=True),
    "before last.safetensors has its name": Point("writing", "rename_flushed", r"last\.safetensors"),
    "before the summary has its name": Point("ending", "rename_flushed", r"summary\.json"),
    "before STATUS is done": Point("ending", "rename_flushed", "STATUS"),
}


class Victim:
    """The phase of this process, and the point at which it stops.

    The thread that writes files has one phase, "writing", at the same time as a phase of the main thread.
    """

    def __init__(self) -> None:
        rank = os.environ.get("RANK", "0")
        path = f"{os.environ['FAULTS_NOTES']}.{rank}.{os.getpid()}"
        self._notes = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self._step, self._phases = 0, ["start"]
        hold = os.environ.get("FAULTS_HOLD") if rank == "0" else None
        self._hold_step, self._hold = (int(hold.split(" ", 1)[0]), hold.split(" ", 1)[1]) if hold else (0, None)
        self._note("+", "start")

    def _note(self, sign: str, phase: str) -> None:
        # One write is one line. The kernel has the line when the call returns, so SIGKILL cannot undo it.
        os.write(self._notes, f"{time.monotonic_ns()} {sign} {phase} {self._step}\n".encode())

    def enter(self, phase: str) -> None:
        self._phases.append(phase)
        self._note("+", phase)

    def leave(self) -> None:
        self._note("-", self._phases.pop())

    @property
    def _current(self) -> list[str]:
        """The phases of the calling thread."""
        return self._phases if threading.current_thread() is threading.main_thread() else ["writing"]

    def count(self, step: int) -> None:
        """Notes the number of updates made."""
        self._step = step

    def during(self, phase: str, owner: type, name: str) -> None:
        """Notes the start and end of each call of a method as a phase of the main thread, or as "writing"."""
        real = getattr(owner, name)

        @functools.wraps(real)
        def noted(*args: Any, **keywords: Any) -> Any:
            if phase == "writing":
                self._note("+", phase)
            else:
                self.enter(phase)
            try:
                return real(*args, **keywords)
            finally:
                if phase == "writing":
                    self._note("-", phase)
                else:
                    self.leave()

        setattr(owner, name, noted)

    def gate(self, owner: Any, name: str, path_of: Callable[..., Any]) -> None:
        """Wraps a function: a call of it for the file of the chosen point stops.

        Args:
            owner: the module or class that holds the function.
            name: the function's name.
            path_of: returns the path of the file from the function's arguments.
        """
        real = getattr(owner, name)

        @functools.wraps(real)
        def gated(*args: Any, **keywords: Any) -> Any:
            point, path = POINTS.get(self._hold or ""), path_of(*args)
            if point and point.function == name and isinstance(path, str | Path):
                due = point.phase in self._current and self._step >= self._hold_step
                if due and re.fullmatch(point.file, Path(path).name):
                    if point.half:
                        self._do_half(functools.partial(real, *args, **keywords), Path(path), appends=name == "log")
                    self._note("+", "held")
                    while True:
                        time.sleep(60)
            return real(*args, **keywords)

        setattr(owner, name, gated)

    @staticmethod
    def _do_half(call: Callable[[], Any], path: Path, appends: bool) -> None:
        if path.is_dir():  # to be removed
            next(path.iterdir()).unlink()
            return
        before = path.stat().st_size if appends else 0
        call()
        os.truncate(path, (before + path.stat().st_size) // 2)


def main() -> int:
    victim = Victim()  # the phase is "start"
    for module in (files, checkpoint):  # each module has its own name for the function
        victim.gate(module, "write_flushed", lambda path, *rest: path)
        victim.gate(module, "rename_flushed", lambda source, target: target)
    victim.gate(shutil, "rmtree", lambda path, *rest: path)
    victim.gate(JSONLTracker, "log", lambda tracker, *rest: tracker.path)
    victim.during("step", TrainStep, "__call__")
    victim.during("evaluation", TrainingComponents, "evaluate")
    for name in ("save", "save_best", "save_last"):
        victim.during("saving", Checkpointer, name)
    victim.during("writing", Writer, "_run")

    # The training loop ends the phase "start" and comes before "ending". "exit" starts when STATUS is done.
    fit, update, set_status = train.fit, TrainStep.__call__, RunFolder.set_status

    def fitted(*args: Any) -> bool:
        victim.count(next(each.step for each in args if isinstance(each, Progress)))
        victim.leave()
        victim.enter("step")
        try:
            return fit(*args)
        finally:
            victim.leave()
            victim.enter("ending")

    def updated(self: TrainStep, plan: Any, index: int, step: int) -> None:
        update(self, plan, index, step)
        victim.count(step + 1)

    def status_set(self: RunFolder, word: str) -> None:
        set_status(self, word)
        if word == "done":
            victim.leave()
            victim.enter("exit")

    train.fit, TrainStep.__call__, RunFolder.set_status = fitted, updated, status_set
    return run_command(train.main)


if __name__ == "__main__":
    sys.exit(main())
