"""Runs a training with and without the profiler, and collects the figures of all ranks."""

from __future__ import annotations

import gzip
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import gather_object
from torch.profiler import ProfilerActivity, profile

from mnist_dist.distributed.collectives import run_on_all_ranks
from mnist_dist.engine.files import write_atomically
from mnist_dist.engine.train_step import TrainStep
from mnist_dist.machine.limits import count_cores
from mnist_dist.profile.memory import ACTIVATIONS, lasting_bytes, step_bytes
from mnist_dist.profile.phases import IDLE, mark_phases
from mnist_dist.profile.trace import Segment, Trace, Usage
from mnist_dist.run.components import TrainingComponents

WARM_UP_STEPS = 5
"""Untimed steps: they choose kernels, compile, and allocate the optimizer's state."""
PROFILED_WARM_UP_STEPS = 2
"""Untimed steps under the profiler, whose first step is slow."""
DRAWN_STEPS = 3
MEMORY_STEPS = 3


@dataclass(frozen=True)
class RankProfile:
    """The figures of one rank."""

    rank: int
    host: str
    cores: int
    """Number of CPU cores that its process may use."""
    on_device: bool
    """Whether the times are those of a GPU; else those of the host, which executes the operations itself."""
    seconds: dict[str, float]
    """Phase -> mean seconds in a step."""
    idle_seconds: dict[str, float]
    """Phase of the host -> mean seconds of a step in which the GPU was idle meanwhile. Empty without a GPU."""
    segments: list[Segment]
    """The timeline of `DRAWN_STEPS` steps."""
    step_starts: list[float]
    """Start of each of these steps, and the end of the last one (µs)."""
    operations: dict[str, Usage]
    bytes: dict[str, int]
    """Kind of memory -> bytes."""
    peak_mb: float
    """On a GPU: the peak of all tensors. Else the size of the process."""


@dataclass(frozen=True)
class Profile:
    """The figures of all ranks. Times without the profiler and with it are of equally many steps of one training."""

    steps: int
    plain_seconds: float
    """Seconds of a step without the profiler."""
    profiled_seconds: float
    """Seconds of a step with the profiler."""
    ranks: list[RankProfile]


def measure(
    components: TrainingComponents, run: Callable[[int], float], steps: int, scratch: Path, trace_file: Path
) -> Profile:
    """Measures a training and writes the trace of this rank. Collective: call on every rank.

    Args:
        run: makes a number of further steps and returns their duration in seconds.
        scratch: a folder of this process.
        trace_file: the file for the trace, compressed by gzip.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would print its state to stderr
    run(WARM_UP_STEPS)
    plain = run(steps) / steps
    assert isinstance(components.update, TrainStep), "a CUDA graph hides the phases"
    mark_phases(components.update)
    device = components.accelerator.device
    with profile(activities=_activities(device)) as profiler:
        run(PROFILED_WARM_UP_STEPS)
        profiled = run(steps + 1) / (steps + 1)
    with profile(activities=_activities(device), profile_memory=True) as memory_profiler:
        run(MEMORY_STEPS)

    def read() -> RankProfile:
        profiler.export_chrome_trace(str(scratch / "steps.json"))
        write_atomically(trace_file, gzip.compress((scratch / "steps.json").read_bytes(), mtime=0))
        memory_profiler.export_chrome_trace(str(scratch / "memory.json"))
        memory = lasting_bytes(components) | {ACTIVATIONS: step_bytes(scratch / "memory.json", device)}
        return _rank_profile(Trace(scratch / "steps.json", steps), components, memory, plain)

    own = run_on_all_ranks(components.accelerator.state, read)
    return Profile(steps, plain, profiled, gather_object([own]))


def _activities(device: torch.device) -> list[ProfilerActivity]:
    others = {"cuda": ProfilerActivity.CUDA, "xpu": ProfilerActivity.XPU}
    return [ProfilerActivity.CPU, *([others[device.type]] if device.type in others else [])]


def _rank_profile(trace: Trace, components: TrainingComponents, memory: dict[str, int], plain: float) -> RankProfile:
    """Returns the figures of this rank.

    Args:
        memory: kind -> bytes.
        plain: seconds of a step without the profiler.
    """
    starts = trace.step_starts
    middle = max(len(starts) - 1 - DRAWN_STEPS, 0) // 2
    drawn = starts[middle : middle + DRAWN_STEPS + 1]
    inside = [each for each in trace.timeline if each.end > drawn[0] and each.start < drawn[-1]]
    segments = [each._replace(start=max(each.start, drawn[0]), end=min(each.end, drawn[-1])) for each in inside]
    return RankProfile(
        rank=components.accelerator.process_index,
        host=socket.gethostname(),
        cores=count_cores(),
        on_device=bool(trace.device),
        seconds=without_overhead(trace.seconds(), plain) if trace.device else trace.seconds(),
        idle_seconds=trace.idle_seconds(),
        segments=segments,
        step_starts=drawn,
        operations=trace.operations(),
        bytes=memory,
        peak_mb=components.meter.gauges()["train/memory_mb"],
    )


def without_overhead(seconds: dict[str, float], plain: float) -> dict[str, float]:
    """Returns the seconds of a GPU's phases in a step that is not profiled.

    The profiler slows down the host and not the kernels, so a profiled GPU is idle for longer.

    Args:
        seconds: phase -> seconds in a profiled step.
        plain: seconds of a step that is not profiled.
    """
    busy = sum(seconds.values()) - seconds[IDLE]
    return seconds | {IDLE: max(plain - busy, 0.0)}
