"""The lock of a run folder: only one process at a time writes a run, on this machine or on another one."""

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

from mnist_dist.distributed.world_size_option import is_elastic
from mnist_dist.engine.files import read_regular
from mnist_dist.errors import Problem, RecipeError

FILE = "run.lock"

RENEW_SECONDS = 5.0
"""Interval at which the writer renews its lock. A thread calls `utime`, independently of what the run is doing."""

SILENT_SECONDS = 45.0
"""A lock of another machine that was not renewed for this time is taken over.

This is the time of nine renewals, so a process keeps its lock when the file server stalls for half a minute. A batch
system that requeues a job on another node takes about as long to start it. The new attempt waits for the rest of the
time and is not refused.
"""

ELASTIC_RENEW_SECONDS, ELASTIC_SILENT_SECONDS = 1.0, 15.0
"""Shorter values for an elastic run, whose other machines continue when the writer's machine is lost. They try to take
over the lock only after the rendezvous has declared that machine lost."""

ELASTIC_WATCH_SECONDS = 60.0
"""If the lock is renewed, a process of an elastic run watches it for this time before it is refused: the writer on a
lost machine needs a while to notice that it is alone."""


MOST_BYTES = 2**16
"""The largest size of a lock file."""


class RunLock:
    """Holds a run folder for this process inside the context.

    The lock is a file with host, process id and start time. A lock left by a dead process of this machine is taken over
    at once. Whether a process of another machine (or container) still runs cannot be seen from here, so this process
    watches its lock: if the lock is renewed, this process is refused; if it is not renewed for the lock's
    `silent_seconds`, it is taken over.

    Args:
        folder: the run folder; must exist.
        while_waiting: called every second while the lock of another machine is watched; may raise.
    """

    def __init__(self, folder: Path, while_waiting: Callable[[], None] = lambda: None):
        self._path, self._while_waiting = folder / FILE, while_waiting
        self._renew_seconds = ELASTIC_RENEW_SECONDS if is_elastic() else RENEW_SECONDS
        self._own = _describe_process() | {
            "since": datetime.now().astimezone().isoformat(timespec="seconds"),
            "silent_seconds": ELASTIC_SILENT_SECONDS if is_elastic() else SILENT_SECONDS,
        }
        self._end = threading.Event()

    def __enter__(self) -> RunLock:
        """Takes the lock.

        Raises:
            RecipeError: another process holds it; the message names host, process id and time.
            OSError: the folder cannot be written.
        """
        while not self._create():
            content, age = self._observe()
            if content is None:  # another process has just removed it
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
        """Creates the lock file; returns False if it exists already."""
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(self._own, file)
        return True

    def _observe(self) -> tuple[dict[str, Any] | None, float]:
        """Returns the content of the lock file, or None if there is no file, and its age by the file system's clock."""
        with tempfile.NamedTemporaryFile(dir=self._path.parent, prefix=".run.lock.") as now:
            try:
                # Opening the file makes a network file system ask its server; `stat` alone may answer from a cache.
                with self._path.open("rb") as file:
                    text = file.read(MOST_BYTES)
                    age = os.fstat(now.fileno()).st_mtime - os.fstat(file.fileno()).st_mtime
            except FileNotFoundError:
                return None, 0.0
        with suppress(ValueError, RecursionError):
            content = json.loads(text)
            if isinstance(content, dict):
                return content, age
        return {}, age  # a process was killed while it wrote the file

    def _stays_silent(self, content: dict[str, Any], age: float) -> bool:
        """Watches a lock of another machine; returns whether it was not renewed for its `silent_seconds`."""
        silent = _silent_seconds(content)
        patient_until = time.monotonic() + (ELASTIC_WATCH_SECONDS if is_elastic() else 0.0)
        if age < silent:
            left = silent - age
            print(f"mnist_dist: {_holder(content)} may still write {self._path.parent}; checking for {left:.0f} s")
        while age < silent:
            time.sleep(min(1.0, silent / 10))
            self._while_waiting()
            before, (found, age) = age, self._observe()
            if found != content:
                return True  # removed or replaced: `__enter__` tries again
            if age < before and time.monotonic() > patient_until:
                return False
        return True

    def _remove(self, content: dict[str, Any]) -> None:
        """Removes the lock if it still has this content. If several processes try this, one of them succeeds."""
        aside = self._path.with_name(f".{FILE}.{os.getpid()}.{time.time_ns()}")
        try:
            self._path.rename(aside)
        except FileNotFoundError:
            return
        with suppress(ValueError, RecursionError):
            if json.loads(aside.read_bytes() or b"{}") != content:
                with suppress(OSError):
                    os.link(aside, self._path)  # another process has just taken the lock over: give it back
        aside.unlink()

    def _renew(self) -> None:
        """Renews the lock until the context ends. Ends this process if another process has taken the lock over."""
        while not self._end.wait(self._renew_seconds):
            with suppress(OSError):  # a network file system may be unreachable for a while
                os.utime(self._path)
            self.end_if_lost()

    def end_if_lost(self) -> None:
        """Ends this process if another process has taken the lock over: it must not write into the folder any more."""
        with suppress(OSError, ValueError, RecursionError):
            found = json.loads(read_regular(self._path, MOST_BYTES))
            if found != self._own and not self._end.is_set():
                print(
                    f"mnist_dist: {_holder(found)} took over {self._path.parent}, because this process did not"
                    f" renew its lock for {_silent_seconds(self._own):.0f} s; this process ends",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(1)


def last_renewal(path: Path) -> tuple[float, bool]:
    """Returns when a lock file was renewed last, in seconds since 1970, and whether its process has ended or is silent.

    Only reads. The file may come from a stranger.

    Raises:
        OSError: there is no such file, or it is not a regular file.
    """
    content, text, renewed = {}, read_regular(path, MOST_BYTES), path.stat().st_mtime
    with suppress(ValueError, RecursionError):
        content = json.loads(text)
    if not isinstance(content, dict):
        content = {}
    has_ended = False
    with suppress(KeyError, TypeError, ValueError, OverflowError):
        has_ended = _is_of_this_machine(content) and _has_ended(content)
    return renewed, has_ended or time.time() - renewed > _silent_seconds(content)


def _describe_process() -> dict[str, Any]:
    """Returns machine, process id and start time of this process. A restarted container counts as another machine."""
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


def _silent_seconds(content: dict[str, Any]) -> float:
    """Returns after how long without a renewal the lock may be taken over. Its writer has chosen the time.

    A damaged lock may name a time without an end.
    """
    seconds = content.get("silent_seconds")
    return seconds if isinstance(seconds, int | float) and 0 < seconds <= SILENT_SECONDS else SILENT_SECONDS


def _is_of_this_machine(content: dict[str, Any]) -> bool:
    return content.get("machine") == _describe_process()["machine"]


def _is_dead_here(content: dict[str, Any]) -> bool:
    """Returns whether the lock belongs to an ended process of this machine, or to an earlier run of this process."""
    return _is_of_this_machine(content) and (_has_ended(content) or content["pid"] == os.getpid())


def _has_ended(content: dict[str, Any]) -> bool:
    """Returns whether a process of this machine has ended.

    The start time is compared too, because the system may have given the process id to another process.
    """
    try:
        process = psutil.Process(content["pid"])
        # 10 s of tolerance: psutil's start time shifts when the clock of the machine is set.
        return process.status() == psutil.STATUS_ZOMBIE or abs(process.create_time() - content["started"]) > 10
    except psutil.Error:
        return True


def _holder(content: dict[str, Any]) -> str:
    if not content:
        return "an unknown process"
    return f"process {content.get('pid')} on {content.get('host')} (since {content.get('since')})"


def _refusal(path: Path, content: dict[str, Any]) -> RecipeError:
    message = (
        f"{_holder(content)} is writing the run in {path.parent}; wait until it ends, or name another folder\n"
        f"(if it has ended without removing {FILE}, other machines can use the folder after "
        f"{_silent_seconds(content):.0f} s)"
    )
    return RecipeError([Problem("command line", "--run-dir", message, "exists")])
