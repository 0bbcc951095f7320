"""Compares the times of an examination with those of an earlier one, and reports what became slower."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from mnist_dist.doctor.checks import FAIL, OK, Row, format_milliseconds

Times = dict[str, dict[str, float]]
"""Check -> measured thing -> seconds."""

LIMITS = {"training, each rank alone": 1.5, "run folder": 10.0}
"""Check -> ratio from which a time is slower than before. The times are the shortest of many, which other programs
disturb least: steps differ by some percent, messages (`MESSAGE_LIMIT`) by up to a factor of two, a flush by more."""

MESSAGE_LIMIT = 3.0

SMALLEST_CHANGE = 20e-6
"""A time is slower only if it grew by more seconds. Smaller changes come from the clock and the scheduler."""


def times_of(rows: Iterable[Row]) -> Times:
    """Returns the times in the rows of a report."""
    found: Times = {}
    for row in rows:
        found.setdefault(row.check, {}).update(row.seconds or {})
    return {check: times for check, times in found.items() if times}


def read_report(path: Path) -> dict[str, Any]:
    """Returns `times`, `world_size`, `device` and `date` of a report, or a `problem` and its `kind`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = [Row(**row) for row in content["checks"]]
        report = {key: content[key] for key in ("world_size", "device", "date")}
    except OSError as error:
        return {"problem": f"{path} cannot be read: {error.strerror}", "kind": "missing"}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {"problem": f"{path} is not a report of doctor, or was written by an earlier version", "kind": "damaged"}
    return report | {"times": times_of(rows)}


def find_mismatch(before: dict[str, Any], world_size: int, device: str) -> str | None:
    """Returns why the times of a report cannot be compared with those of this world; None if they can."""
    for key, here in (("world_size", world_size), ("device", device)):
        if before[key] != here:
            return f"the {key.replace('_', ' ')} of the report is {before[key]}, here it is {here}"
    return None


def compare(before: Times, now: Times, again: Callable[[str], Times], name: str) -> list[Row]:
    """Returns a row for each time that is slower than before, or one row if none is.

    A check with a slower time is measured once more, and the shorter times count: other programs may have slowed down
    the first measurement.

    Args:
        again: measures a check once more.
        name: of the earlier report.
    """
    for check in dict.fromkeys(check for check, _, _ in _slower(before, now)):  # all ranks in the same order
        second = again(check).get(check, {})
        now = now | {check: {key: min(time, second.get(key, time)) for key, time in now[check].items()}}
    title = f"compared with {name}"
    rows = []
    for check, key, limit in _slower(before, now):
        old, new = before[check][key], now[check][key]
        times = (
            f"{format_milliseconds(new)}, before {format_milliseconds(old)} ({new / old:.1f} times, limit {limit:g})"
        )
        rows.append(Row(title, FAIL, f"{check}, {key}: {times}", ""))
    if rows:
        return rows
    ratios = [(now[check][key] / old, check, key) for check, key, old in _common(before, now)]
    if not ratios:
        return [Row(title, OK, "no time was measured both now and before", "")]
    ratio, check, key = max(ratios)
    return [Row(title, OK, f"{len(ratios)} times, none is slower; largest ratio {ratio:.2f} ({check}, {key})", "")]


def _common(before: Times, now: Times) -> list[tuple[str, str, float]]:
    """Returns check, key and earlier time of everything that was measured both times."""
    return [
        (check, key, old)
        for check, times in before.items()
        for key, old in times.items()
        if old > 0 and key in now.get(check, {})
    ]


def _slower(before: Times, now: Times) -> list[tuple[str, str, float]]:
    """Returns check, key and limit of each time that exceeds its limit."""
    found = []
    for check, key, old in _common(before, now):
        limit = LIMITS.get(check, MESSAGE_LIMIT)
        if now[check][key] > limit * old and now[check][key] - old > SMALLEST_CHANGE:
            found.append((check, key, limit))
    return found
