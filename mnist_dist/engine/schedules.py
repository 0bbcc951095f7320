"""Learning rate schedules as pure functions of the step; `plateau` also depends on the evaluation losses.

The keywords of a schedule are those of PyTorch's scheduler of that kind. Durations (`step_size`, `T_max`,
`total_iters`, `warmup_epochs`, …) are in epochs, as in papers. Apart from `plateau`, no PyTorch scheduler is stepped,
so the rate does not depend on the number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from mnist_dist.engine import decays
from mnist_dist.engine.decays import Schedule, Span, require, require_lr, require_one_of

Annealing = Literal["cos", "linear"]


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
    require(max_lr > 0, f"max_lr must be above 0, got {max_lr}")
    require(div_factor > 0, f"div_factor must be above 0, got {div_factor}")
    require(final_div_factor > 0, f"final_div_factor must be above 0, got {final_div_factor}")
    require(0 <= pct_start <= 1, f"pct_start must be a fraction of the run from 0 to 1, got {pct_start}")
    require(not three_phase or pct_start <= 0.5, f"pct_start must be at most 0.5 with three_phase, got {pct_start}")
    require(0 <= base_momentum < 1, f"base_momentum must be at least 0 and below 1, got {base_momentum}")
    require(0 <= max_momentum < 1, f"max_momentum must be at least 0 and below 1, got {max_momentum}")
    require_one_of("anneal_strategy", anneal_strategy, Annealing)
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
    require(0 < factor < 1, f"factor must be above 0 and below 1, got {factor}")
    require(patience >= 0, f"patience must be at least 0 evaluations, got {patience}")
    stand_in = torch.optim.SGD([torch.zeros(1)], lr=require_lr(span))
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
    "constant": decays.constant,
    "step": decays.step_lr,
    "multistep": decays.multistep,
    "exponential": decays.exponential,
    "linear": decays.linear,
    "polynomial": decays.polynomial,
    "cosine": decays.cosine,
    "cosine_restarts": decays.cosine_restarts,
    "onecycle": onecycle,
    "plateau": plateau,
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
