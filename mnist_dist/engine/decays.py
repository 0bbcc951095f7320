"""The types of all schedules, and schedules whose rate is a pure function of the step, with an optional warm-up.

The keywords of a schedule are those of PyTorch's scheduler of that kind. Durations are in epochs.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import update_wrapper
from typing import Any, Literal, get_args


@dataclass(frozen=True)
class Span:
    """The learning rate and the length of the run that a schedule is built for."""

    lr: float | None
    """The recipe's `optimizer.lr`; None if not given."""
    steps_per_epoch: int
    total_steps: int

    @property
    def epochs(self) -> float:
        return self.total_steps / self.steps_per_epoch

    def epoch_of(self, step: int, interval: str) -> float:
        """Returns the number of epochs completed before `step`, for a rate that changes once per `interval`.

        Args:
            interval: "step" includes the fraction of the current epoch; "epoch" rounds down.
        """
        return step / self.steps_per_epoch if interval == "step" else step // self.steps_per_epoch


@dataclass(frozen=True)
class Schedule:
    """A learning rate, and for some schedules a momentum, for every step."""

    lr_at: Callable[[int], float]
    """Number of updates made so far -> learning rate of the next update."""
    momentum_at: Callable[[int], float] | None = None
    """The same for the momentum; None: the schedule does not change it."""
    observe: Callable[[float], None] = lambda loss: None
    """Called with the loss of every evaluation."""
    state_dict: Callable[[], dict[str, Any]] = dict
    """Returns the state for a checkpoint; empty if the schedule depends on the step only."""
    load_state_dict: Callable[[dict[str, Any]], None] = lambda state: None


Interval = Literal["epoch", "step"]


def require(condition: bool, message: str) -> None:
    """Raises ValueError with the message if the condition is not met."""
    if not condition:
        raise ValueError(message)


def require_one_of(name: str, value: str, choices: Any) -> None:
    """Raises ValueError if a keyword's value is not one of the choices, a Literal."""
    require(value in get_args(choices), f"{name} must be {' or '.join(get_args(choices))}, got {value!r}")


def require_lr(span: Span) -> float:
    """Returns the recipe's `optimizer.lr`. Raises ValueError if it is not given."""
    require(span.lr is not None, "this schedule needs optimizer.lr")
    assert span.lr is not None
    return span.lr


# --- warm-up ------------------------------------------------------------------------------------------------------


def after_warm_up(schedule: Callable[..., Schedule]) -> Callable[..., Schedule]:
    """Adds the keywords `warmup_epochs` and `warmup_start_factor` to a schedule.

    During the warm-up, the rate rises linearly at every step, from `warmup_start_factor` × `lr` to `lr`. The schedule
    begins after it and covers the rest of the run, as with PyTorch's SequentialLR and LinearLR. Large batches need a
    warm-up (Goyal et al. 2017, arXiv 1706.02677).
    """

    def warmed_up(
        span: Span, *, warmup_epochs: float = 0.0, warmup_start_factor: float = 0.01, **keywords: Any
    ) -> Schedule:
        require(warmup_epochs >= 0, f"warmup_epochs must be at least 0, got {warmup_epochs}")
        in_range = 0 <= warmup_start_factor <= 1
        require(in_range, f"warmup_start_factor must be from 0 to 1, got {warmup_start_factor}")
        lr, steps = require_lr(span), max(1, round(warmup_epochs * span.steps_per_epoch)) if warmup_epochs else 0
        after = schedule(replace(span, total_steps=max(1, span.total_steps - steps)), **keywords)

        def lr_at(step: int) -> float:
            if step >= steps:
                return after.lr_at(step - steps)
            return lr * (warmup_start_factor + (1 - warmup_start_factor) * step / steps)

        return Schedule(lr_at)

    # The checks of a recipe read the keywords from the signature.
    own, outer = (inspect.signature(each, eval_str=True) for each in (schedule, warmed_up))
    added = [parameter for name, parameter in outer.parameters.items() if name.startswith("warmup_")]
    update_wrapper(warmed_up, schedule)
    warmed_up.__signature__ = own.replace(parameters=[*own.parameters.values(), *added])  # type: ignore[attr-defined]  # typeshed does not declare it
    return warmed_up


# --- schedules ----------------------------------------------------------------------------------------------------


@after_warm_up
def constant(span: Span) -> Schedule:
    """Returns a constant learning rate."""
    lr = require_lr(span)
    return Schedule(lambda step: lr)


@after_warm_up
def step_lr(span: Span, *, step_size: int, gamma: float = 0.1) -> Schedule:
    """Returns StepLR: the rate is multiplied by `gamma` every `step_size` epochs."""
    lr = require_lr(span)
    require(step_size >= 1, f"step_size must be at least 1 epoch, got {step_size}")
    require(gamma >= 0, f"gamma must be at least 0, got {gamma}")
    return Schedule(lambda step: lr * gamma ** (step // span.steps_per_epoch // step_size))


@after_warm_up
def multistep(span: Span, *, milestones: list[int], gamma: float = 0.1) -> Schedule:
    """Returns MultiStepLR: the rate is multiplied by `gamma` after each number of epochs in `milestones`."""
    lr = require_lr(span)
    in_range = bool(milestones) and min(milestones) >= 1
    require(in_range, f"milestones must be a list of epochs of at least 1, got {milestones}")
    require(gamma >= 0, f"gamma must be at least 0, got {gamma}")
    return Schedule(lambda step: lr * gamma ** sum(each <= step // span.steps_per_epoch for each in milestones))


@after_warm_up
def exponential(span: Span, *, gamma: float, interval: Interval = "epoch") -> Schedule:
    """Returns ExponentialLR: the rate is multiplied by `gamma` in every epoch."""
    lr = require_lr(span)
    require(gamma > 0, f"gamma must be above 0, got {gamma}")
    require_one_of("interval", interval, Interval)
    return Schedule(lambda step: lr * gamma ** span.epoch_of(step, interval))


@after_warm_up
def polynomial(
    span: Span, *, total_iters: float | None = None, power: float = 1.0, interval: Interval = "epoch"
) -> Schedule:
    """Returns PolynomialLR: `lr` × (1 - t) ** `power`, where t goes from 0 to 1 over `total_iters` epochs.

    Unlike PyTorch's 5, the default of `total_iters` is None: the complete run.
    """
    lr, period = require_lr(span), span.epochs if total_iters is None else total_iters
    require(period > 0, f"total_iters must be above 0 epochs, got {total_iters}")
    require(power > 0, f"power must be above 0, got {power}")
    require_one_of("interval", interval, Interval)
    return Schedule(lambda step: lr * (1 - min(span.epoch_of(step, interval) / period, 1.0)) ** power)


@after_warm_up
def cosine_restarts(
    span: Span, *, T_0: int, T_mult: int = 1, eta_min: float = 0.0, interval: Interval = "epoch"
) -> Schedule:
    """Returns CosineAnnealingWarmRestarts (Loshchilov and Hutter 2017, arXiv 1608.03983).

    Half a cosine from `lr` to `eta_min` over `T_0` epochs, then again from `lr`, each time over `T_mult` times as many
    epochs.
    """
    lr = require_lr(span)
    require(T_0 >= 1, f"T_0 must be at least 1 epoch, got {T_0}")
    require(T_mult >= 1, f"T_mult must be at least 1, got {T_mult}")
    require(eta_min >= 0, f"eta_min must be at least 0, got {eta_min}")
    require_one_of("interval", interval, Interval)

    def lr_at(step: int) -> float:
        done, period = span.epoch_of(step, interval), T_0
        while done >= period:
            done, period = done - period, period * T_mult
        return eta_min + (lr - eta_min) * (1 + math.cos(math.pi * done / period)) / 2

    return Schedule(lr_at)


@after_warm_up
def cosine(span: Span, *, T_max: float | None = None, eta_min: float = 0.0, interval: Interval = "epoch") -> Schedule:
    """Returns CosineAnnealingLR: half a cosine from `lr` to `eta_min` over `T_max` epochs (None: the complete run)."""
    lr, period = require_lr(span), span.epochs if T_max is None else T_max
    require(period > 0, f"T_max must be above 0 epochs, got {T_max}")
    require(eta_min >= 0, f"eta_min must be at least 0, got {eta_min}")
    require_one_of("interval", interval, Interval)

    def lr_at(step: int) -> float:
        return eta_min + (lr - eta_min) * (1 + math.cos(math.pi * span.epoch_of(step, interval) / period)) / 2

    return Schedule(lr_at)


@after_warm_up
def linear(
    span: Span,
    *,
    start_factor: float = 1 / 3,
    end_factor: float = 1.0,
    total_iters: float = 5,
    interval: Interval = "epoch",
) -> Schedule:
    """Returns LinearLR: `lr` × a factor that changes from `start_factor` to `end_factor` over `total_iters` epochs."""
    lr = require_lr(span)
    require(0 < start_factor <= 1, f"start_factor must be above 0 and at most 1, got {start_factor}")
    require(0 <= end_factor <= 1, f"end_factor must be from 0 to 1, got {end_factor}")
    require(total_iters > 0, f"total_iters must be above 0 epochs, got {total_iters}")
    require_one_of("interval", interval, Interval)

    def lr_at(step: int) -> float:
        done = min(span.epoch_of(step, interval) / total_iters, 1.0)
        return lr * (start_factor + (end_factor - start_factor) * done)

    return Schedule(lr_at)
