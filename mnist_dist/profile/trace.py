"""Reads the profiler's Chrome trace: which phase of the step the host and the GPU are in at each instant.

A CPU executes an operation while the host is in its range, so the ranges of the host are the timeline. A GPU works
behind the host: a kernel belongs to the phase in which the host launched it. All times are in microseconds of the
machine's clock.
"""

from __future__ import annotations

import bisect
import heapq
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from mnist_dist.profile.phases import IDLE, LOGGING, PREFIX, STEP, WAITING

ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
"""Categories of the events that are work of a GPU."""


class Segment(NamedTuple):
    """A phase from `start` to `end`."""

    phase: str
    start: float
    end: float


class Usage(NamedTuple):
    """How often an operation or a kernel ran, and how long in total (µs)."""

    calls: int
    time: float


class Trace:
    """The last `steps` complete steps of a trace.

    Args:
        path: a file of `torch.profiler.profile.export_chrome_trace`, in which `mark_phases` has marked the steps.
        steps: number of steps; the trace has at least one more.
    """

    def __init__(self, path: Path, steps: int):
        content = json.loads(path.read_text(encoding="utf-8"))
        base = content.get("baseTimeNanoseconds", 0) / 1000
        self._events: list[dict[str, Any]] = [
            event | {"ts": event["ts"] + base} for event in content["traceEvents"] if "cat" in event
        ]
        starts = sorted(event["ts"] for event in self._of("user_annotation") if event["name"] == STEP)
        self.starts = starts[-steps - 1 :]
        """Start of each step on the host, and the end of the last step."""
        assert len(self.starts) == steps + 1, f"{len(starts)} of {steps + 1} steps are in the trace"
        self.host = self._host_timeline()
        """The phases of the host from the first step to the end of the trace, without gaps."""
        launches = {_correlation(event): event["ts"] for event in self._events if _is_launch(event)}
        work = [(launches.get(_correlation(event), 0.0), event) for event in self._of(*ON_DEVICE)]
        self._work = sorted((each for each in work if each[0] >= self.starts[0]), key=lambda each: each[0])
        """The work of the GPU: when the host launched it, and its event."""
        self.device = flatten([self._phase_of(*each) for each in self._work], hidden=WAITING)
        """The phases of the GPU. Empty if the operations ran on the host."""

    def _of(self, *categories: str) -> Iterator[dict[str, Any]]:
        return (event for event in self._events if event["cat"] in categories)

    def _holds(self, time: float) -> bool:
        return self.starts[0] <= time < self.starts[-1]

    def _host_timeline(self) -> list[Segment]:
        first, last = self.starts[0], max(event["ts"] + event.get("dur", 0.0) for event in self._events)
        ranges = [event for event in self._of("user_annotation") if first <= event["ts"]]
        phases = [_segment(event, event["name"].removeprefix(PREFIX)) for event in ranges if _is_phase(event)]
        return flatten([Segment(LOGGING, first, last), *phases])

    def _phase_of(self, launch: float, event: dict[str, Any]) -> Segment:
        index = bisect.bisect_right(self.host, launch, key=lambda segment: segment.start) - 1
        return _segment(event, WAITING if "nccl" in event["name"].lower() else self.host[max(index, 0)].phase)

    @property
    def timeline(self) -> list[Segment]:
        """The phases of the GPU, or of the host if the operations ran there."""
        return self.device or self.host

    @property
    def step_starts(self) -> list[float]:
        """Start of each step on the timeline, and the end of the last step."""
        if not self.device:
            return self.starts
        # The GPU starts a step with the first work that the host launches in it.
        indices = [bisect.bisect_left(self._work, start, key=lambda each: each[0]) for start in self.starts]
        end = self.device[-1].end
        return [self._work[index][1]["ts"] if index < len(self._work) else end for index in indices]

    def seconds(self) -> dict[str, float]:
        """Returns the mean seconds of each phase in a step, and those in which the GPU was idle."""
        steps = self.step_starts
        used = durations(self.timeline, steps[0], steps[-1])
        idle = steps[-1] - steps[0] - sum(used.values())
        return {phase: time / (len(steps) - 1) / 1e6 for phase, time in (used | {IDLE: max(idle, 0.0)}).items()}

    def idle_seconds(self) -> dict[str, float]:
        """Returns for each phase of the host the mean seconds of a step in which the GPU was idle meanwhile."""
        first, *_, last = self.step_starts
        total: dict[str, float] = defaultdict(float)
        for one, other in pairwise(self.device):
            for phase, time in durations(self.host, max(one.end, first), min(other.start, last)).items():
                total[phase] += time / (len(self.starts) - 1) / 1e6
        return dict(total)

    def operations(self) -> dict[str, Usage]:
        """Returns the use of each kernel of the GPU; without a GPU, of each operation, without those that it calls."""
        if self.device:
            return _usage((event["name"], event["dur"]) for launch, event in self._work if self._holds(launch))
        return _usage(_own_times([event for event in self._of("cpu_op") if self._holds(event["ts"])]))


def flatten(intervals: list[Segment], hidden: str = "") -> list[Segment]:
    """Returns segments that do not overlap: at each instant the interval that started last.

    Args:
        hidden: a phase that counts only while no interval of another phase runs.
    """
    waiting = sorted(intervals, key=lambda each: each.start)
    times = sorted({time for each in intervals for time in (each.start, each.end)})
    running: list[tuple[bool, float, float, Segment]] = []
    found: list[Segment] = []
    index = 0
    for start, end in pairwise(times):
        while index < len(waiting) and waiting[index].start <= start:
            each = waiting[index]
            # Of two that started together, the shorter one is nested in the other.
            heapq.heappush(running, (each.phase == hidden, -each.start, each.end, each))
            index += 1
        while running and running[0][-1].end <= start:
            heapq.heappop(running)
        if not running:
            continue
        phase = running[0][-1].phase
        if found and (found[-1].phase, found[-1].end) == (phase, start):
            found[-1] = found[-1]._replace(end=end)
        else:
            found.append(Segment(phase, start, end))
    return found


def durations(segments: list[Segment], start: float, end: float) -> dict[str, float]:
    """Returns the time of each phase between `start` and `end`. The segments are sorted and do not overlap."""
    total: dict[str, float] = defaultdict(float)
    index = max(bisect.bisect_right(segments, start, key=lambda each: each.start) - 1, 0)
    while index < len(segments) and segments[index].start < end:
        each = segments[index]
        total[each.phase] += max(min(each.end, end) - max(each.start, start), 0.0)
        index += 1
    return dict(total)


def _own_times(operations: list[dict[str, Any]]) -> Iterator[tuple[str, float]]:
    """Yields the name of each operation and its time without the operations that it calls on its thread."""
    threads: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for event in operations:
        threads[event["tid"]].append(event)
    for events in threads.values():
        callers: list[list[Any]] = []  # name, end, time of the operations called
        for event in sorted(events, key=lambda each: (each["ts"], -each["dur"])):
            while callers and callers[-1][1] <= event["ts"]:
                yield _finish(callers.pop())
            if callers:
                callers[-1][2] -= event["dur"]
            callers.append([event["name"], event["ts"] + event["dur"], event["dur"]])
        while callers:
            yield _finish(callers.pop())


def _finish(caller: list[Any]) -> tuple[str, float]:
    return caller[0], max(caller[2], 0.0)


def _usage(times: Iterable[tuple[str, float]]) -> dict[str, Usage]:
    found: dict[str, Usage] = {}
    for name, time in times:
        calls, total = found.get(name, (0, 0.0))
        found[name] = Usage(calls + 1, total + time)
    return found


def _segment(event: dict[str, Any], phase: str) -> Segment:
    return Segment(phase, event["ts"], event["ts"] + event["dur"])


def _is_phase(event: dict[str, Any]) -> bool:
    return event["name"].startswith(PREFIX)


def _is_launch(event: dict[str, Any]) -> bool:
    return event["cat"].endswith(("_runtime", "_driver"))


def _correlation(event: dict[str, Any]) -> Any:
    return event.get("args", {}).get("correlation")
