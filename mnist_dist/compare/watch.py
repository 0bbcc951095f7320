"""What the live page shows of a run: state, speed, figures of each process, checkpoints, starts, last messages."""

from __future__ import annotations

import math
import os
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mnist_dist.engine.checkpoint import list_checkpoints
from mnist_dist.engine.files import check_regular
from mnist_dist.run.folder import RunFolder
from mnist_dist.run.reader import LARGEST, RunReader
from mnist_dist.run.text_output import printable

MOST_RUNS = 12
"""Number of runs that a live page shows in detail: those whose files changed last."""

MESSAGES, MOST_MESSAGE_BYTES = 8, 2**14
"""Lines of console.log that are shown, and the bytes at its end that are read."""

CHECKPOINTS = 4

PROCESSES = 1024
"""A line of a stranger's metrics.jsonl may name more processes; the others are left out."""

SPEED_LINES = 10
"""The time left follows from the median speed of this number of lines."""

SPEED = re.compile(r"process/(\d{1,6})/images_per_second")


def watched(runs: Sequence[RunReader]) -> list[RunReader]:
    """Returns the runs that a live page shows in detail: unfinished ones, and the one whose files changed last."""
    newest = sorted(runs, key=lambda run: run.changed, reverse=True)
    return [run for place, run in enumerate(newest) if place == 0 or not run.is_finished][:MOST_RUNS]


def watch(run: RunReader) -> dict[str, Any]:
    """Returns the values that the live page shows of a run, as types of JSON; None for what is not known.

    A time is in seconds since 1970. The figures are those since the last start of the processes.
    """
    folder, since = run.folder, run.silent_since
    start = run.world[-1] if run.world else {"step": 0}
    lines = [line for line in run.lines if "train/loss" in line and (_number(line, "step") or 0) > start["step"]]
    line = lines[-1] if lines else {}
    evaluations = [line for line in run.lines if _number(line, "eval/accuracy") is not None]
    best = max(evaluations, key=lambda line: line["eval/accuracy"], default={})
    return {
        "state": "silent" if since else run.word,
        "since": round(since, 1) if since else _written(folder, folder.status),
        "logged": _written(folder, folder.metrics) if lines else None,
        **_position(run, run.lines, lines),
        "speed": _number(line, "train/images_per_second"),
        "waiting": _number(line, "train/waiting_percent"),
        "loss": _number(line, "train/loss"),
        "accuracy": _number(evaluations[-1] if evaluations else {}, "eval/accuracy"),
        "processes": _processes(line),
        "checkpoints": _checkpoints(folder),
        "best": [_number(best, "eval/accuracy"), _number(best, "epoch"), _written(folder, folder.best)],
        "starts": run.world[-50:],
        "messages": _messages(folder),
    }


def _position(run: RunReader, lines: list[dict[str, Any]], timed: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns step and epoch of the last line, of the end of the run, and the seconds of training that are left."""
    last: dict[str, Any] = next((line for line in reversed(lines) if _number(line, "step") is not None), {})
    step, epoch = _number(last, "step"), _number(last, "epoch")
    batch, epochs, most = (_number(run.recipe, key) for key in ("batch_size", "epochs", "max_steps"))
    steps = most
    if step and epoch and epochs and math.isfinite(by_epochs := step / epoch * epochs):
        steps = min(round(by_epochs), most or math.inf)
    speeds = [speed for line in timed[-SPEED_LINES:] if (speed := _number(line, "train/images_per_second"))]
    left = None
    if steps and step is not None and batch and speeds:
        left = max(0.0, steps - step) * batch / max(statistics.median(speeds), 1e-9)
    return {"step": step, "steps": steps, "epoch": epoch, "epochs": epochs, "left": left}


def _number(values: Mapping[str, Any], key: str) -> float | None:
    """Returns the finite number under a key; None if there is none."""
    value = values.get(key)
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST:
        return value
    return None  # also for NaN, which is not smaller than any number


def _processes(line: Mapping[str, Any]) -> list[list[float | None]]:
    """Returns rank, images/s and the percentage of the time spent waiting of each process that a line names."""
    ranks = sorted({int(match[1]) for key in line if (match := SPEED.fullmatch(key))})[:PROCESSES]
    keys = ("images_per_second", "waiting_percent")
    return [[rank, *(_number(line, f"process/{rank}/{key}") for key in keys)] for rank in ranks]


def _written(folder: RunFolder, path: Path) -> float | None:
    """Returns when a file or folder of a run was written; None if it is missing or outside the run folder."""
    with suppress(OSError):
        if not folder.leaves(path):
            return round(path.stat().st_mtime, 1)
    return None


def _checkpoints(folder: RunFolder) -> list[list[float | None]]:
    """Returns step and time of the newest checkpoints, newest first."""
    if folder.leaves(folder.checkpoints):
        return []
    newest = list_checkpoints(folder.checkpoints)[: -CHECKPOINTS - 1 : -1]
    return [[int(path.name.removeprefix("step-")), _written(folder, path)] for path in newest]


def _messages(folder: RunFolder) -> list[str]:
    """Returns the last lines of console.log."""
    text = b""
    with suppress(OSError, ValueError):
        check_regular(folder.refuse_link(folder.console), sys.maxsize)
        with folder.console.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - MOST_MESSAGE_BYTES))
            text = file.read(MOST_MESSAGE_BYTES)
    return [printable(line) for line in text.decode(errors="replace").splitlines()[-MESSAGES:]]
