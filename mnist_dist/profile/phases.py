"""The phases of a training step, and the ranges that mark them in the profiler's trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

from torch.profiler import record_function

from mnist_dist.engine.train_step import TrainStep

PHASES = ("data", "forward", "backward", "reduction and waiting", "clip and optimizer", "logging", "idle")
DATA, FORWARD, BACKWARD, WAITING, OPTIMIZER, LOGGING, IDLE = PHASES

PREFIX = "phase: "
"""Start of the name of a phase's range in a trace."""
STEP = "step starts"
"""Mark at the start of each step in a trace."""


def mark_phases(step: TrainStep) -> None:
    """Makes the methods of `step` record a range for each phase, and a mark at the start of each step.

    Ranges are nested, and the inner range counts: `compute` is the phase "clip and optimizer" except for the forward
    and backward passes within it. Time outside all ranges, between two updates, belongs to the phase "logging".
    The training step has no code for this: its methods are replaced on this one object.
    """
    ranges = {
        DATA: [(step, "load"), (step, "inputs"), (step, "targets")],
        FORWARD: [(step, "_accumulate")],
        BACKWARD: [(step.accelerator, "backward")],
        OPTIMIZER: [(step, "compute")],
        WAITING: [(step.reduction, "finish")] if step.reduction else [],
        LOGGING: [(step.meter, "add")],
    }
    for phase, methods in ranges.items():
        for owner, name in methods:
            _replace(owner, name, partial(_in_range, PREFIX + phase))
    _replace(step, "count_step", _after_mark)
    _replace(step.clock, "waiting", _in_waiting_range)


def _replace(owner: object, name: str, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    setattr(owner, name, wrapper(getattr(owner, name)))


def _in_range(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def call(*arguments: Any, **keywords: Any) -> Any:
        with record_function(name):
            return method(*arguments, **keywords)

    return call


def _after_mark(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def call(*arguments: Any, **keywords: Any) -> Any:
        with record_function(STEP):  # a mark is an empty range
            pass
        return method(*arguments, **keywords)

    return call


def _in_waiting_range(method: Callable[..., Any]) -> Callable[..., Any]:
    """Encloses a context manager: logical shards wait for the other processes without `FlatGradients`."""

    @contextmanager
    def waiting() -> Iterator[None]:
        with record_function(PREFIX + WAITING), method():
            yield

    return waiting
