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
LOCAL_END = "local gradients are computed"
"""Mark in a trace: from here to the end of its range, the process waits for the gradients of the others."""


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
        LOGGING: [(step.meter, "begin_step"), (step.meter, "add")],
    }
    for phase, methods in ranges.items():
        for owner, name in methods:
            _replace(owner, name, partial(_in_range, PREFIX + phase))
    # A mark is an empty range.
    _replace(step, "count_step", partial(_after_mark, STEP))
    _replace(step.clock, "mark_local_end", partial(_after_mark, LOCAL_END))
    _replace(step.clock, "backward", _in_backward_range)


def _replace(owner: object, name: str, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    setattr(owner, name, wrapper(getattr(owner, name)))


def _in_range(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def call(*arguments: Any, **keywords: Any) -> Any:
        with record_function(name):
            return method(*arguments, **keywords)

    return call


def _after_mark(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def call(*arguments: Any, **keywords: Any) -> Any:
        with record_function(name):
            pass
        return method(*arguments, **keywords)

    return call


def _in_backward_range(method: Callable[..., Any]) -> Callable[..., Any]:
    @contextmanager
    def backward() -> Iterator[None]:
        with record_function(PREFIX + BACKWARD), method():
            yield

    return backward
