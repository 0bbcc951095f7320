"""Learning rate schedules as pure functions of the step; `plateau` also depends on the evaluation losses.

The keywords of a schedule are those of PyTorch's scheduler of that kind. Durations (`step_size`, `T_max`,
`total_iters`) are in epochs, as in papers. Apart from `plateau`, no PyTorch scheduler is stepped, so the rate does not
depend on the number of processes. `linear` and the first phase of `onecycle` can warm up the rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau


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
Annealing = Literal["cos", "linear"]


def constant(span: Span) -> Schedule:
    """Returns a constant learning rate."""
    lr = _require_lr(span)
    return Schedule(lambda step: lr)


def step_lr(span: Span, *, step_size: int, gamma: float = 0.1) -> Schedule:
    """Returns StepLR: the rate is multiplied by `gamma` every `step_size` epochs."""
    lr = _require_lr(span)
    _require(step_size >= 1, f"step_size must be at least 1 epoch, got {step_size}")
    _require(gamma >= 0, f"gamma must be at least 0, got {gamma}")
    return Schedule(lambda step: lr * gamma ** (step // span.steps_per_epoch // step_size))


def cosine(span: Span, *, T_max: float | None = None, eta_min: float = 0.0, interval: Interval = "epoch") -> Schedule:
    """Returns CosineAnnealingLR: half a cosine from `lr` to `eta_min` over `T_max` epochs (None: the complete run)."""
    lr, period = _require_lr(span), span.epochs if T_max is None else T_max
    _require(period > 0, f"T_max must be above 0 epochs, got {T_max}")
    _require(eta_min >= 0, f"eta_min must be at least 0, got {eta_min}")
    _require_one_of("interval", interval, Interval)

    def lr_at(step: int) -> float:
        return eta_min + (lr - eta_min) * (1 + math.cos(math.pi * span.epoch_of(step, interval) / period)) / 2

    return Schedule(lr_at)


def linear(
    span: Span,
    *,
    start_factor: float = 1 / 3,
    end_factor: float = 1.0,
    total_iters: float = 5,
    interval: Interval = "epoch",
) -> Schedule:
    """Returns LinearLR: `lr` × a factor that changes from `start_factor` to `end_factor` over `total_iters` epochs."""
    lr = _require_lr(span)
    _require(0 < start_factor <= 1, f"start_factor must be above 0 and at most 1, got {start_factor}")
    _require(0 <= end_factor <= 1, f"end_factor must be from 0 to 1, got {end_factor}")
    _require(total_iters > 0, f"total_iters must be above 0 epochs, got {total_iters}")
    _require_one_of("interval", interval, Interval)

    def lr_at(step: int) -> float:
        done = min(span.epoch_of(step, interval) / total_iters, 1.0)
        return lr * (start_factor + (end_factor - start_factor) * done)

    return Schedule(lr_at)


class Phase(NamedTuple):
    """A part of a onecycle run, in which rate and momentum each change from a first to a last value."""

    end: float
    """The step at which the phase ends."""
    rates: tuple[float, float]
    momenta: tuple[float, float]


def onecycle(
    span: Span,
    *,
    max_lr: float,
    pct_start: float = 0.3,
    anneal_strategy: Annealing = "cos",
    cycle_momentum: bool = True,
    base_momentum: float = 0.85,
    max_momentum: float = 0.95,
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
    three_phase: bool = False,
) -> Schedule:
    """Returns OneCycleLR over the complete run (Smith and Topin, arXiv 1708.07120); the rate changes at every step.

    The first step's rate is `max_lr / div_factor`, or `optimizer.lr` if that is given. The last step's rate is
    the first one divided by `final_div_factor`.
    """
    _require(max_lr > 0, f"max_lr must be above 0, got {max_lr}")
    _require(div_factor > 0, f"div_factor must be above 0, got {div_factor}")
    _require(final_div_factor > 0, f"final_div_factor must be above 0, got {final_div_factor}")
    _require(0 <= pct_start <= 1, f"pct_start must be a fraction of the run from 0 to 1, got {pct_start}")
    _require(not three_phase or pct_start <= 0.5, f"pct_start must be at most 0.5 with three_phase, got {pct_start}")
    _require(0 <= base_momentum < 1, f"base_momentum must be at least 0 and below 1, got {base_momentum}")
    _require(0 <= max_momentum < 1, f"max_momentum must be at least 0 and below 1, got {max_momentum}")
    _require_one_of("anneal_strategy", anneal_strategy, Annealing)
    first = max_lr / div_factor if span.lr is None else span.lr
    last, end, rise = first / final_div_factor, span.total_steps - 1, pct_start * span.total_steps
    if three_phase:
        phases = [
            Phase(rise - 1, (first, max_lr), (max_momentum, base_momentum)),
            Phase(2 * rise - 2, (max_lr, first), (base_momentum, max_momentum)),
            Phase(end, (first, last), (max_momentum, max_momentum)),
        ]
    else:
        phases = [
            Phase(rise - 1, (first, max_lr), (max_momentum, base_momentum)),
            Phase(end, (max_lr, last), (base_momentum, max_momentum)),
        ]
    return _through_phases(phases, anneal_strategy, cycle_momentum)


def _through_phases(phases: list[Phase], anneal_strategy: Annealing, cycle_momentum: bool) -> Schedule:
    """Returns the schedule that runs the phases in order. The phases cover the complete run."""

    def value_at(step: int, values: Callable[[Phase], tuple[float, float]]) -> float:
        start = 0.0
        for phase in phases:
            if step <= phase.end or phase is phases[-1]:
                done = (step - start) / (phase.end - start) if phase.end > start else 1.0
                first, last = values(phase)
                if anneal_strategy == "cos":
                    return last + (first - last) / 2 * (1 + math.cos(math.pi * done))
                return first + (last - first) * done
            start = phase.end
        raise AssertionError("the last phase ends with the run")

    return Schedule(
        lr_at=lambda step: value_at(step, lambda phase: phase.rates),
        momentum_at=(lambda step: value_at(step, lambda phase: phase.momenta)) if cycle_momentum else None,
    )


def plateau(
    span: Span,
    *,
    factor: float = 0.1,
    patience: int = 10,
    threshold: float = 1e-4,
    threshold_mode: Literal["rel", "abs"] = "rel",
    cooldown: int = 0,
    min_lr: float = 0.0,
    eps: float = 1e-8,
) -> Schedule:
    """Returns ReduceLROnPlateau on the evaluation loss. PyTorch's scheduler computes it, on a stand-in optimizer."""
    _require(0 < factor < 1, f"factor must be above 0 and below 1, got {factor}")
    _require(patience >= 0, f"patience must be at least 0 evaluations, got {patience}")
    stand_in = torch.optim.SGD([torch.zeros(1)], lr=_require_lr(span))
    scheduler = ReduceLROnPlateau(
        stand_in,
        factor=factor,
        patience=patience,
        threshold=threshold,
        threshold_mode=threshold_mode,
        cooldown=cooldown,
        min_lr=min_lr,
        eps=eps,
    )
    group = stand_in.param_groups[0]
    counts = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")

    def load_state_dict(state: dict[str, Any]) -> None:
        """Restores the counts, and the rate relative to `lr`. Other settings come from the recipe, which may change."""
        if state:  # a checkpoint with another schedule has no such state
            vars(scheduler).update(state["counts"])
            group["lr"] = state["lr"] * (span.lr / state["of"])

    return Schedule(
        lr_at=lambda step: group["lr"],
        observe=scheduler.step,
        state_dict=lambda: {"counts": {key: vars(scheduler)[key] for key in counts}, "lr": group["lr"], "of": span.lr},
        load_state_dict=load_state_dict,
    )


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "constant": constant,
    "step": step_lr,
    "cosine": cosine,
    "onecycle": onecycle,
    "plateau": plateau,
    "linear": linear,
}
"""Name in a recipe -> schedule."""


def build_schedule(name: str, *, lr: float | None, steps_per_epoch: int, total_steps: int, **keywords: Any) -> Schedule:
    """Builds a schedule for a run of `total_steps` updates.

    Args:
        name: a key of `SCHEDULES`.
        lr: the recipe's `optimizer.lr`; None if not given.
        keywords: arguments of the schedule.

    Raises:
        ValueError: the name is unknown, or a value is out of range.
    """
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}; known: {', '.join(SCHEDULES)}")
    return SCHEDULES[name](Span(lr, steps_per_epoch, total_steps), **keywords)


def set_rates(optimizer: Optimizer, schedule: Schedule, step: int) -> None:
    """Sets learning rate and, if the schedule has one, momentum of `step` in every parameter group."""
    lr, momentum = schedule.lr_at(step), schedule.momentum_at(step) if schedule.momentum_at else None
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)  # in place, because a captured step reads this tensor
        else:
            group["lr"] = lr
        if momentum is not None and "betas" in group:
            group["betas"] = (momentum, *group["betas"][1:])
        elif momentum is not None:
            group["momentum"] = momentum


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_one_of(name: str, value: str, choices: Any) -> None:
    _require(value in get_args(choices), f"{name} must be {' or '.join(get_args(choices))}, got {value!r}")


def _require_lr(span: Span) -> float:
    _require(span.lr is not None, "this schedule needs optimizer.lr")
    assert span.lr is not None
    return span.lr
