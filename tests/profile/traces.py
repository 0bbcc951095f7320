"""Chrome traces for tests, in the form that PyTorch's profiler writes on a CPU and on a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mnist_dist.profile.phases import PREFIX, STEP

BASE = 5_000_000
"""Nanoseconds that all times of a trace are relative to."""


def mark(name: str, start: float, duration: float = 0.0) -> dict[str, Any]:
    return {"ph": "X", "cat": "user_annotation", "name": name, "ts": start, "dur": duration, "tid": 1}


def phase(name: str, start: float, duration: float) -> dict[str, Any]:
    return mark(PREFIX + name, start, duration)


def operation(name: str, start: float, duration: float, thread: int = 1) -> dict[str, Any]:
    return {"ph": "X", "cat": "cpu_op", "name": name, "ts": start, "dur": duration, "tid": thread}


def kernel(name: str, launch: float, start: float, duration: float, number: int) -> list[dict[str, Any]]:
    """The work of a GPU, and the call of the host that launched it."""
    about = {"args": {"correlation": number}}
    return [
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": launch, "dur": 1, "tid": 1, **about},
        {"ph": "X", "cat": "kernel", "name": name, "ts": start, "dur": duration, "tid": 7, **about},
    ]


def allocation(time: float, size: int, address: int, device_type: int = 0) -> dict[str, Any]:
    about = {"Bytes": size, "Addr": address, "Device Type": device_type}
    return {"ph": "i", "cat": "cpu_instant_event", "name": "[memory]", "ts": time, "args": about}


def step_on_cpu(start: float) -> list[dict[str, Any]]:
    """A step of 100 µs: 10 data, 20 forward, 30 backward, 15 waiting, 15 optimizer, 10 logging."""
    return [
        mark(STEP, start),
        phase("data", start, 5),
        phase("clip and optimizer", start + 5, 85),
        phase("forward", start + 5, 55),
        phase("data", start + 5, 5),
        phase("backward", start + 30, 30),
        phase("reduction and waiting", start + 60, 15),
    ]


def write(path: Path, *events: dict[str, Any]) -> Path:
    metadata = {"ph": "M", "name": "process_name", "ts": 0, "args": {"name": "python"}}
    path.write_text(json.dumps({"baseTimeNanoseconds": BASE, "traceEvents": [metadata, *events]}))
    return path
