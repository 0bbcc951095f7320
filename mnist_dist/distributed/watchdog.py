"""Detects a run that makes no progress, names the rank that hangs with its stack, and ends all processes.

Without the watchdog the other ranks would wait in a collective for hours.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch.distributed as dist
from accelerate import Accelerator

from mnist_dist.distributed.gradients import GradientClock

PATIENCE_IN_STEPS = 10
"""A step may always take this many times the duration of the longest step so far."""

FIRST_STEPS = 3
"""Number of first steps with a limit `PATIENCE_IN_STEPS` times as long: they choose kernels, compile and allocate."""

LAST_WORDS_SECONDS = 10.0
"""Time for the message and the callback; after it the process ends even if they have not finished."""

COLLECTIVE_FILES = re.compile("distributed_c10d|_fully_shard")
"""Files of PyTorch in which a process waits for other processes."""


class Watchdog:
    """Runs a thread inside the context that compares the time since the last `beat` with a limit.

    Every rank writes a report into the process group's store: its step, its stack, and its position, which grows with
    every beat and with every collective that the rank starts. Without progress, every rank reads all reports: the rank
    with the lowest position is the one that hangs, because all others have started a collective that it has not. On a
    GPU a rank waits for a collective in any call that reads a value, so its stack does not show who waits. Does
    nothing if one process runs.

    Args:
        seconds: the limit. All processes end with exit code 1 when the time since the last beat exceeds both this limit
            and ten times the longest step.
        clock: knows whether this process waits for the gradients of other processes.
        on_timeout: called on the reporting rank before the processes end. They end even if it raises or hangs.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        seconds: float,
        clock: GradientClock,
        on_timeout: Callable[[], None] = lambda: None,
    ):
        self._rank, self._world_size = accelerator.process_index, accelerator.num_processes
        self._seconds, self._clock, self._on_timeout = seconds, clock, on_timeout
        self._period = min(1.0, seconds / 4)
        self._step, self._beats, self._last_beat, self._longest, self._serial = 0, 0, time.monotonic(), 0.0, 0
        self._end = threading.Event()
        self._main = threading.get_ident()

    def __enter__(self) -> Watchdog:
        self._last_beat = time.monotonic()
        if self._world_size > 1:
            store = dist.distributed_c10d._get_default_store()
            self._store = dist.PrefixStore("watchdog", store)
            self._publish()
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()

    def beat(self, step: int) -> None:
        """Notes that the run has reached `step`. Costs microseconds, so it may be called in every step."""
        now = time.monotonic()
        self._longest = max(self._longest, now - self._last_beat)
        self._step, self._beats, self._last_beat = step, self._beats + 1, now

    def _watch(self) -> None:
        while not self._end.wait(self._period):
            with suppress(Exception):  # rank 0 holds the store; if rank 0 has ended, the time limit still applies
                self._publish()
            patience = PATIENCE_IN_STEPS * (self._seconds if self._beats < FIRST_STEPS else self._longest)
            if time.monotonic() - self._last_beat < max(self._seconds, patience):
                continue
            reports = self._collect_in_time()
            if not self._end.is_set() and not any(each["saving"] and each["alive"] for each in reports):
                self._end_processes(reports)

    def _publish(self) -> None:
        self._store.set(str(self._rank), json.dumps(self._report()))

    def _report(self) -> dict[str, Any]:
        self._serial += 1
        frame = sys._current_frames().get(self._main)
        stack = traceback.extract_stack(frame) if frame else traceback.StackSummary()
        return {
            "rank": self._rank,
            "serial": self._serial,
            "step": self._step,
            "position": [self._beats, self._count_collectives(), self._clock.reductions],
            "where": f"{socket.gethostname()}, pid {os.getpid()}",
            "waits": self._clock.is_waiting or any(COLLECTIVE_FILES.search(entry.filename) for entry in stack[-6:]),
            "saving": any(entry.name == "wait_until_written" for entry in stack),
            "stack": "".join(traceback.format_list([entry for entry in stack if "runpy" not in entry.filename])),
        }

    def _collect_in_time(self) -> list[dict[str, Any]]:
        """Returns what `_collect` does; [] if the store cannot be reached: a call over a cut network may never end."""
        found: list[list[dict[str, Any]]] = []

        def collect() -> None:
            with suppress(Exception):
                found.append(self._collect())

        thread = threading.Thread(target=collect, daemon=True)
        thread.start()
        thread.join(2 * self._period + 1 + LAST_WORDS_SECONDS)
        return found[0] if found else []

    def _count_collectives(self) -> int:
        """Returns how many collectives this rank has started, without those inside a replayed CUDA graph."""
        with suppress(RuntimeError):  # a backend without this number
            group: Any = dist.distributed_c10d._get_default_group()  # torch does not declare the method
            return group._get_sequence_number_for_group()
        return 0

    def _collect(self) -> list[dict[str, Any]]:
        """Returns the last report of every rank. A rank is `alive` if its watchdog thread still publishes."""
        before = self._read()
        until = time.monotonic() + 2 * self._period + 1
        # All ranks collect at about the same time: each must continue to publish, or the others consider it frozen.
        while time.monotonic() < until and not self._end.wait(self._period):
            self._publish()
        after = self._read()
        unknown: dict[str, Any] = dict.fromkeys(("serial", "step"), 0) | dict.fromkeys(("waits", "saving"), False)
        unknown |= {"position": [], "where": "no report", "stack": ""}  # no position is lower
        reports = [{"rank": rank} | after.get(rank, unknown) for rank in range(self._world_size)]
        for each in reports:
            earlier = before.get(each["rank"], unknown)["serial"]
            each["alive"] = each["rank"] == self._rank or each["serial"] > earlier
        return reports

    def _read(self) -> dict[int, dict[str, Any]]:
        ranks = [rank for rank in range(self._world_size) if self._store.check([str(rank)])]
        return {rank: json.loads(self._store.get(str(rank))) for rank in ranks}

    def _end_processes(self, reports: list[dict[str, Any]]) -> None:
        """Prints the reports on the lowest rank that is alive, then ends this process. Never returns.

        Args:
            reports: of all ranks; empty if the store cannot be reached.
        """
        if not reports or self._rank == min(each["rank"] for each in reports if each["alive"]):
            # In a thread, so that this process ends even if the callback raises, or hangs on the disk of the run.
            last_words = threading.Thread(target=self._last_words, args=(reports,), daemon=True)
            last_words.start()
            last_words.join(LAST_WORDS_SECONDS)
        else:
            time.sleep(2)  # a launcher ends all processes after the first one; the reporting rank must finish before
        os._exit(1)

    def _last_words(self, reports: list[dict[str, Any]]) -> None:
        seconds = time.monotonic() - self._last_beat
        if reports:
            print(describe(reports, seconds), file=sys.stderr, flush=True)
            self._on_timeout()
        else:  # no report of another rank can be read
            cause = "rank 0 has ended or cannot be reached"
            print(
                f"mnist_dist: rank {self._rank}: no progress for {seconds:.0f} s; {cause}", file=sys.stderr, flush=True
            )


def describe(reports: list[dict[str, Any]], seconds: float) -> str:
    """Returns the message for the user: which ranks hang, where, and which ranks wait for them."""
    hanging = find_hanging(reports)
    lines = [f"mnist_dist: no progress for {seconds:.0f} s; all processes end"]
    if len(hanging) == len(reports) and all(each["alive"] for each in reports):
        lines.append("  no rank is behind the others: a device or the network between the devices may hang")
    for each in hanging:
        state = "hangs" if each["alive"] else "is frozen or has ended"
        lines += [f"  rank {each['rank']} ({each['where']}) {state} in step {each['step']}:", each["stack"].rstrip()]
    waiting = [str(each["rank"]) for each in reports if each not in hanging]
    if waiting:
        lines.append(f"  waiting: rank {', '.join(waiting)}")
    lines.append("run the same command again to resume from the last checkpoint")
    return "\n".join(lines)


def find_hanging(reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the reports of the ranks that hang: those that no longer publish, and those that all others wait for."""
    lowest = min(each["position"] for each in reports)
    behind = [each for each in reports if not each["alive"] or (each["position"] == lowest and not each["waits"])]
    if 0 < len(behind) < len(reports):
        return behind
    return [each for each in reports if not each["alive"] or not each["waits"]] or reports
