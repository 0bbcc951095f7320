"""The lock of a run folder: one process writes a run at a time, on this machine or on another one."""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from mnist_dist.errors import Problem, RecipeError

FILE = "run.lock"

RENEW_SECONDS = 5.0
"""Interval at which the writer renews its lock. A renewal is one `utime` in a thread, whatever the run is doing."""

SILENT_SECONDS = 45.0
"""A lock of another machine that was not renewed for this time is taken over.

Nine renewals: a file server that stalls for half a minute loses nobody the lock. A batch system that requeues a job on
another node takes about as long to start it, and the new attempt waits for the rest: it is not refused.
"""


class RunLock:
    """Holds a run folder for this process inside the context.

    The lock is a file with host, process id and start time. A lock that a dead process of this machine left is taken
    over at once. The process ids of another machine (or container) mean nothing here: its lock is watched until it is
    renewed, which refuses this process, or until it has been silent for `SILENT_SECONDS`.

    Args:
        folder: the run folder; must exist.
        while_waiting: called every second while the lock of another machine is watched; may raise.
    """

    def __init__(self, folder: Path, while_waiting: Callable[[], None] = lambda: None):
        self._path, self._while_waiting = folder / FILE, while_waiting
        self._own = _describe_process() | {"since": datetime.now().astimezone().isoformat(timespec="seconds")}
        self._end = threading.Event()

    def __enter__(self) -> RunLock:
        """Takes the lock.

        Raises:
            RecipeError: another process holds it; names host, process id and time.
            OSError: the folder cannot be written.
        """
        while not self._create():
            content, age = self._observe()
            if content is None:  # removed in this moment
                continue
            if _is_dead_here(content) or (not _is_of_this_machine(content) and self._stays_silent(content, age)):
                self._remove(content)
                continue
            raise _refusal(self._path, content)
        threading.Thread(target=self._renew, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        """Removes the lock, unless another process has taken it over."""
        self._end.set()
        with suppress(OSError):
            self._remove(self._own)

    def _create(self) -> bool:
        """Creates the file if there is none; returns whether it did."""
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(self._own, file)
        return True

    def _observe(self) -> tuple[dict[str, Any] | None, float]:
        """Returns the content of the file, None if it is gone, and its age by the clock of the file system."""
        with tempfile.NamedTemporaryFile(dir=self._path.parent, prefix=".run.lock.") as now:
            try:
                # Opening the file makes a network file system ask its server; `stat` alone may answer from a cache.
                with self._path.open("rb") as file:
                    text, age = file.read(), os.fstat(now.fileno()).st_mtime - os.fstat(file.fileno()).st_mtime
            except FileNotFoundError:
                return None, 0.0
        with suppress(ValueError):
            content = json.loads(text)
            if isinstance(content, dict):
                return content, age
        return {}, age  # a process was killed while it wrote the file

    def _stays_silent(self, content: dict[str, Any], age: float) -> bool:
        """Watches a lock of another machine; returns whether it was not renewed for `SILENT_SECONDS`."""
        if age < SILENT_SECONDS:
            left = SILENT_SECONDS - age
            print(f"mnist_dist: {_holder(content)} may still write {self._path.parent}; watching it for {left:.0f} s")
        while age < SILENT_SECONDS:
            time.sleep(min(1.0, SILENT_SECONDS / 10))
            self._while_waiting()
            before, (found, age) = age, self._observe()
            if found != content:
                return True  # gone, or another one: `__enter__` looks again
            if age < before:
                return False
        return True

    def _remove(self, content: dict[str, Any]) -> None:
        """Removes the lock with this content. Of several processes that find it left over, one succeeds."""
        aside = self._path.with_name(f".{FILE}.{os.getpid()}.{time.time_ns()}")
        try:
            self._path.rename(aside)
        except FileNotFoundError:
            return
        with suppress(ValueError):
            if json.loads(aside.read_bytes() or b"{}") != content:
                with suppress(OSError):
                    os.link(aside, self._path)  # another process took the lock over in this moment
        aside.unlink()

    def _renew(self) -> None:
        """Renews the lock until the context ends; ends the process if another one has taken the lock over."""
        while not self._end.wait(RENEW_SECONDS):
            with suppress(OSError):  # the disk may be away for a while
                os.utime(self._path)
            with suppress(OSError, ValueError):
                found = json.loads(self._path.read_bytes())
                if found != self._own and not self._end.is_set():
                    print(
                        f"mnist_dist: {_holder(found)} took over {self._path.parent}, because this process was silent"
                        f" for {SILENT_SECONDS:.0f} s; this process ends",
                        file=sys.stderr,
                        flush=True,
                    )
                    os._exit(1)


def _describe_process() -> dict[str, Any]:
    """Returns machine, process id and start time of this process. A restarted container is another machine."""
    machine = [socket.gethostname()]
    with suppress(OSError):
        machine.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip())
        machine.append(str(Path("/proc/self/ns/pid").readlink()))
    return {
        "host": machine[0],
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
        "machine": " ".join(machine),
    }


def _is_of_this_machine(content: dict[str, Any]) -> bool:
    return content.get("machine") == _describe_process()["machine"]


def _is_dead_here(content: dict[str, Any]) -> bool:
    """Returns whether a lock is of this machine, and its process has ended. A process id may be used again."""
    if not _is_of_this_machine(content):
        return False
    try:
        process = psutil.Process(content["pid"])
        # psutil's start time moves with the clock of the machine when that is set.
        ended = process.status() == psutil.STATUS_ZOMBIE or abs(process.create_time() - content["started"]) > 10
    except psutil.Error:
        return True
    return ended or content["pid"] == os.getpid()  # an earlier run of this process


def _holder(content: dict[str, Any]) -> str:
    if not content:
        return "an unknown process"
    return f"process {content.get('pid')} on {content.get('host')} (since {content.get('since')})"


def _refusal(path: Path, content: dict[str, Any]) -> RecipeError:
    message = (
        f"{_holder(content)} is writing the run in {path.parent}; wait until it ends, or name another folder\n"
        f"(a process that has ended without removing {FILE} counts for {SILENT_SECONDS:.0f} s on other machines)"
    )
    return RecipeError([Problem("command line", "--run-dir", message, "exists")])
