"""The history of a run's world: one line of world.jsonl for each start of its processes."""

from __future__ import annotations

import json
from contextlib import suppress
from datetime import datetime
from typing import Any

from mnist_dist.distributed.world_size_option import is_elastic
from mnist_dist.engine.files import read_regular, write_atomically
from mnist_dist.run.folder import MOST_JSON, RunFolder
from mnist_dist.run.text_output import printable

FIELDS = {"time": str, "step": int, "processes": int, "nodes": int, "cause": str}
"""Fields of a line: when the processes started, from which step, how many on how many machines, and why."""


def read_history(folder: RunFolder) -> list[dict[str, Any]]:
    """Returns the valid lines of world.jsonl, oldest first. The run folder may come from a stranger."""
    found, content = [], b""
    with suppress(OSError, ValueError):
        content = read_regular(folder.refuse_link(folder.world), MOST_JSON)
    for line in content.splitlines():
        with suppress(ValueError, RecursionError):
            values = json.loads(line)
            if isinstance(values, dict) and all(type(values.get(key)) is kind for key, kind in FIELDS.items()):
                known = {key: values[key] for key in FIELDS}
                found.append(known | {key: printable(known[key]) for key, kind in FIELDS.items() if kind is str})
    return found


def note_start(folder: RunFolder, step: int, processes: int, nodes: int) -> list[dict[str, Any]]:
    """Adds a line to world.jsonl; returns all lines. Call on rank 0, after the run folder was opened.

    Args:
        step: the step from which the run continues.
        processes: the number of processes.
        nodes: the number of machines.
    """
    history = read_history(folder)
    before = history[-1]["processes"] if history else None
    line = {
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "step": step,
        "processes": processes,
        "nodes": nodes,
        "cause": _cause(before, processes, folder.status_before),
    }
    history.append(line)
    write_atomically(folder.world, "".join(json.dumps(each) + "\n" for each in history))
    return history


def _cause(before: int | None, processes: int, status: str) -> str:
    """Returns why the processes started.

    Args:
        before: their number at the previous start; None at the first start.
        processes: their number now.
        status: the STATUS that the run had before.
    """
    if before is None:
        return "start"
    if is_elastic() and processes > before:
        return "processes joined"
    if is_elastic() and processes < before:
        return "processes left" if status == "preempted" else "processes lost"
    return {"preempted": "resumed after a stop", "done": "resumed after the end"}.get(status, "resumed after a failure")


def sizes(history: list[dict[str, Any]]) -> str:
    """Returns the numbers of processes in their order, such as "3 → 2 → 3"."""
    numbers = [each["processes"] for each in history]
    return " → ".join(str(n) for n, before in zip(numbers, [None, *numbers], strict=False) if n != before)
