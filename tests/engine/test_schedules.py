"""Every schedule equals PyTorch's scheduler at every step, although no scheduler is stepped."""

import copy
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch.optim import SGD, Adam, Optimizer, lr_scheduler

from mnist_dist.engine.schedules import SCHEDULES, Schedule, build_schedule, set_rates

LR, STEPS_PER_EPOCH, EPOCHS = 0.05, 7, 12
TOTAL_STEPS = STEPS_PER_EPOCH * EPOCHS


def toy_parameter() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))


def build(name: str, *, lr: float | None = LR, total_steps: int = TOTAL_STEPS, **keywords) -> Schedule:
    return build_schedule(name, lr=lr, steps_per_epoch=STEPS_PER_EPOCH, total_steps=total_steps, **keywords)


def walk(
    make_scheduler: Callable[[Optimizer], lr_scheduler.LRScheduler],
    *,
    lr: float = LR,
    total_steps: int = TOTAL_STEPS,
    every: int = STEPS_PER_EPOCH,
) -> Iterator[dict]:
    """Yields PyTorch's parameter group before every update, with a scheduler step after `every` updates."""
    optimizer = SGD([toy_parameter()], lr=lr, momentum=0.9)
    scheduler = make_scheduler(optimizer)
    for step in range(total_steps):
        yield optimizer.param_groups[0]
        optimizer.step()
        if (step + 1) % every == 0 and step + 1 < total_steps:
            scheduler.step()


def assert_same_rates(schedule: Schedule, groups: Iterator[dict]) -> None:
    steps = 0
    for step, group in enumerate(groups):
        # PyTorch computes the rate recursively, with rounding errors of this size where it passes 0.
        assert math.isclose(schedule.lr_at(step), group["lr"], rel_tol=1e-9, abs_tol=1e-16), f"at step {step}"
        steps += 1
    assert steps == TOTAL_STEPS


# --- comparison with PyTorch --------------------------------------------------------------------------------------


def test_constant_is_constant():
    assert {build("constant").lr_at(step) for step in range(TOTAL_STEPS)} == {LR}


@pytest.mark.parametrize("keywords", [{"step_size": 1}, {"step_size": 5}, {"step_size": 3, "gamma": 0.7}])
def test_step_is_steplr(keywords):
    assert_same_rates(build("step", **keywords), walk(lambda optimizer: lr_scheduler.StepLR(optimizer, **keywords)))


@pytest.mark.parametrize(
    "keywords",
    [{"T_max": EPOCHS}, {"T_max": 20, "eta_min": 1e-4}, {"T_max": 4}, {"T_max": 5, "eta_min": 0.01}, {"T_max": 1}],
)
def test_cosine_is_cosineannealinglr(keywords):
    expected = walk(lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, **keywords))
    assert_same_rates(build("cosine", **keywords), expected)


@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_cosine_covers_the_complete_run_without_t_max(interval):
    schedule, explicit = build("cosine", interval=interval), build("cosine", T_max=EPOCHS, interval=interval)
    assert [schedule.lr_at(s) for s in range(TOTAL_STEPS)] == [explicit.lr_at(s) for s in range(TOTAL_STEPS)]
    # max_steps can end a run in the middle of an epoch.
    shortened = build("cosine", total_steps=TOTAL_STEPS - 3, interval="step")
    assert shortened.lr_at(TOTAL_STEPS - 3) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"start_factor": 1.0, "end_factor": 0.0, "total_iters": EPOCHS - 1},
        {"start_factor": 0.1, "end_factor": 0.9, "total_iters": 4},
        {"start_factor": 0.5, "total_iters": 30},
    ],
)
def test_linear_is_linearlr(keywords):
    assert_same_rates(build("linear", **keywords), walk(lambda optimizer: lr_scheduler.LinearLR(optimizer, **keywords)))


def test_interval_step_equals_pytorch_stepped_at_every_update():
    cosine = build("cosine", T_max=5, eta_min=1e-3, interval="step")
    period = 5 * STEPS_PER_EPOCH
    expected = walk(lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, period, 1e-3), every=1)
    assert_same_rates(cosine, expected)
    linear = build("linear", start_factor=0.2, end_factor=0.8, total_iters=5, interval="step")
    expected = walk(lambda optimizer: lr_scheduler.LinearLR(optimizer, 0.2, 0.8, period), every=1)
    assert_same_rates(linear, expected)


@pytest.mark.parametrize("keywords", [{"milestones": [3, 7]}, {"milestones": [8, 2, 2, 50], "gamma": 0.5}])
def test_multistep_is_multisteplr(keywords):
    assert_same_rates(build("multistep", **keywords), walk(lambda made: lr_scheduler.MultiStepLR(made, **keywords)))


@pytest.mark.parametrize("gamma", [0.9, 0.5, 1.1])
def test_exponential_is_exponentiallr(gamma):
    expected = walk(lambda optimizer: lr_scheduler.ExponentialLR(optimizer, gamma))
    assert_same_rates(build("exponential", gamma=gamma), expected)


@pytest.mark.parametrize("keywords", [{"total_iters": 5}, {"total_iters": EPOCHS, "power": 2.0}, {"total_iters": 20}])
def test_polynomial_is_polynomiallr(keywords):
    expected = walk(lambda optimizer: lr_scheduler.PolynomialLR(optimizer, **keywords))
    assert_same_rates(build("polynomial", **keywords), expected)


@pytest.mark.parametrize(
    "keywords", [{"T_0": 3}, {"T_0": 1, "eta_min": 0.01}, {"T_0": 2, "T_mult": 2}, {"T_0": 1, "T_mult": 3}]
)
@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_cosine_restarts_is_cosineannealingwarmrestarts(keywords, interval):
    every = STEPS_PER_EPOCH if interval == "epoch" else 1
    lengths = keywords | {"T_0": keywords["T_0"] * STEPS_PER_EPOCH // every}
    expected = walk(lambda made: lr_scheduler.CosineAnnealingWarmRestarts(made, **lengths), every=every)
    assert_same_rates(build("cosine_restarts", interval=interval, **keywords), expected)


def test_polynomial_covers_the_complete_run_by_default():
    schedule = build("polynomial", interval="step", power=2.0)
    assert [schedule.lr_at(step) for step in (0, TOTAL_STEPS // 2, TOTAL_STEPS)] == pytest.approx([LR, LR / 4, 0])


# --- warm-up ------------------------------------------------------------------------------------------------------

WARM_UPS: dict[str, tuple[dict, Callable[[Optimizer], lr_scheduler.LRScheduler]]] = {
    "constant": ({}, lambda made: lr_scheduler.ConstantLR(made, factor=1.0)),
    "step": ({"step_size": 4}, lambda made: lr_scheduler.StepLR(made, 4 * STEPS_PER_EPOCH)),
    "multistep": (
        {"milestones": [2, 5]},
        lambda made: lr_scheduler.MultiStepLR(made, [2 * STEPS_PER_EPOCH, 5 * STEPS_PER_EPOCH]),
    ),
    "exponential": (
        {"gamma": 0.5, "interval": "step"},
        lambda made: lr_scheduler.ExponentialLR(made, 0.5 ** (1 / STEPS_PER_EPOCH)),
    ),
    "linear": (
        {"start_factor": 1.0, "end_factor": 0.1, "total_iters": 6, "interval": "step"},
        lambda made: lr_scheduler.LinearLR(made, 1.0, 0.1, 6 * STEPS_PER_EPOCH),
    ),
    "polynomial": (
        {"power": 2.0, "interval": "step"},
        lambda made: lr_scheduler.PolynomialLR(made, TOTAL_STEPS - 3 * STEPS_PER_EPOCH, 2.0),
    ),
    "cosine": (
        {"eta_min": 1e-3, "interval": "step"},
        lambda made: lr_scheduler.CosineAnnealingLR(made, TOTAL_STEPS - 3 * STEPS_PER_EPOCH, 1e-3),
    ),
    "cosine_restarts": (
        {"T_0": 2, "T_mult": 2, "interval": "step"},
        lambda made: lr_scheduler.CosineAnnealingWarmRestarts(made, 2 * STEPS_PER_EPOCH, 2),
    ),
}
"""Schedule -> its keywords, and PyTorch's scheduler, stepped at every update. The warm-up takes 3 epochs."""


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")  # SequentialLR passes it itself
@pytest.mark.parametrize("name", sorted(set(SCHEDULES) - {"onecycle", "plateau"}))
def test_a_warm_up_is_sequentiallr_with_linearlr(name):
    keywords, make_after = WARM_UPS[name]
    steps = 3 * STEPS_PER_EPOCH

    def make(optimizer: Optimizer) -> lr_scheduler.LRScheduler:
        schedulers = [lr_scheduler.LinearLR(optimizer, 0.1, 1.0, steps), make_after(optimizer)]
        return lr_scheduler.SequentialLR(optimizer, schedulers, [steps])

    schedule = build(name, warmup_epochs=3, warmup_start_factor=0.1, **keywords)
    assert_same_rates(schedule, walk(make, every=1))


def test_a_warm_up_ends_at_the_learning_rate_and_starts_near_zero():
    schedule = build("cosine", warmup_epochs=0.5)
    steps = round(0.5 * STEPS_PER_EPOCH)
    assert schedule.lr_at(0) == pytest.approx(LR / 100)
    assert schedule.lr_at(steps) == LR > schedule.lr_at(steps - 1)
    assert build("constant", warmup_epochs=1e-9).lr_at(1) == LR, "a warm-up takes at least one step"


@pytest.mark.parametrize("name", sorted(WARM_UPS))
def test_without_a_warm_up_a_schedule_does_not_change(name):
    keywords, _ = WARM_UPS[name]
    plain, explicit = build(name, **keywords), build(name, warmup_epochs=0, **keywords)
    assert [plain.lr_at(step) for step in range(TOTAL_STEPS)] == [explicit.lr_at(step) for step in range(TOTAL_STEPS)]
    assert plain.lr_at(0) == LR


@pytest.mark.parametrize("name", ["onecycle", "plateau"])
def test_schedules_without_a_warm_up_refuse_its_keywords(name):
    with pytest.raises(TypeError, match="warmup_epochs"):
        build(name, warmup_epochs=1, **({"max_lr": 0.1} if name == "onecycle" else {}))


# --- onecycle -----------------------------------------------------------------------------------------------------

ONECYCLES = [
    {},
    {"anneal_strategy": "linear"},
    {"three_phase": True},
    {"three_phase": True, "anneal_strategy": "linear", "pct_start": 0.4},
    {"three_phase": True, "pct_start": 0.5},
    {"pct_start": 0.2, "div_factor": 10.0, "final_div_factor": 100.0},
    {"pct_start": 0.0},
    {"pct_start": 1.0},
    {"base_momentum": 0.7, "max_momentum": 0.99},
]


@pytest.mark.parametrize("total_steps", [TOTAL_STEPS, 6, 3])
@pytest.mark.parametrize("keywords", ONECYCLES)
def test_onecycle_is_onecyclelr_in_rate_and_momentum(keywords, total_steps):
    schedule = build("onecycle", lr=None, total_steps=total_steps, max_lr=0.4, **keywords)
    assert schedule.momentum_at is not None

    def make(optimizer: Optimizer) -> lr_scheduler.OneCycleLR:
        return lr_scheduler.OneCycleLR(optimizer, 0.4, total_steps, **keywords)

    expected = [dict(group) for group in walk(make, total_steps=total_steps, every=1)]
    for step, group in enumerate(expected):
        assert schedule.lr_at(step) == pytest.approx(group["lr"], rel=1e-9), f"at step {step}"
        assert schedule.momentum_at(step) == pytest.approx(group["momentum"], rel=1e-9), f"at step {step}"
    assert len(expected) == total_steps


@pytest.mark.parametrize(
    ("total_steps", "keywords"), [(1, {}), (1, {"pct_start": 1.0}), (5, {"pct_start": 0.2}), (2, {"three_phase": True})]
)
def test_onecycle_works_in_runs_too_short_for_a_phase(total_steps, keywords):
    # PyTorch divides by 0 in some of these cases.
    schedule = build("onecycle", lr=None, total_steps=total_steps, max_lr=0.4, **keywords)
    for step in range(total_steps):
        assert 0.4 / 25 / 1e4 * (1 - 1e-9) <= schedule.lr_at(step) <= 0.4
        assert 0.85 <= schedule.momentum_at(step) <= 0.95


def test_onecycle_starts_at_the_learning_rate_of_the_recipe():
    schedule = build("onecycle", lr=0.02, max_lr=0.4, div_factor=25.0, final_div_factor=50.0)
    rates = [schedule.lr_at(step) for step in range(TOTAL_STEPS)]
    assert rates[0] == pytest.approx(0.02, rel=1e-12)
    assert max(rates) <= 0.4
    assert max(rates) == pytest.approx(0.4, rel=1e-2)
    assert rates[-1] == pytest.approx(0.02 / 50, rel=1e-9)
    expected = build("onecycle", lr=None, max_lr=0.4, div_factor=0.4 / 0.02, final_div_factor=50.0)
    assert rates == pytest.approx([expected.lr_at(step) for step in range(TOTAL_STEPS)], rel=1e-12)


def test_onecycle_can_leave_the_momentum_unchanged():
    assert build("onecycle", max_lr=0.4, cycle_momentum=False).momentum_at is None


# --- plateau ------------------------------------------------------------------------------------------------------

# Falls, stays, falls by less than the threshold, jumps, falls again, stays to the end.
LOSSES = [2.0, 1.0, 0.9, 0.9, 0.9, 0.9, 0.89999, 0.89998, 1.5, 0.85, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"patience": 1},
        {"patience": 0, "factor": 0.5},
        {"patience": 1, "threshold": 1e-6},
        {"patience": 1, "threshold": 0.2, "threshold_mode": "abs"},
        {"patience": 1, "cooldown": 2},
        {"patience": 0, "min_lr": 0.004},
        {"patience": 0, "factor": 0.5, "eps": 0.01},
    ],
)
def test_plateau_is_reducelronplateau(keywords):
    schedule = build("plateau", **keywords)
    optimizer = SGD([toy_parameter()], lr=LR)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, **keywords)
    seen = set()
    for epoch, loss in enumerate(LOSSES):
        expected = optimizer.param_groups[0]["lr"]
        for step in range(epoch * STEPS_PER_EPOCH, (epoch + 1) * STEPS_PER_EPOCH):
            assert schedule.lr_at(step) == pytest.approx(expected, rel=1e-9), f"at step {step}"
        seen.add(expected)
        schedule.observe(loss)
        scheduler.step(loss)
    assert len(seen) > 1 or not keywords, "the rate never fell, so nothing was compared"


@pytest.mark.parametrize("count", range(0, len(LOSSES), 3))
def test_plateau_resumes_from_its_state(count):
    keywords = {"patience": 1, "factor": 0.5, "cooldown": 1}
    uninterrupted, stopped, resumed = (build("plateau", **keywords) for _ in range(3))
    for loss in LOSSES[:count]:
        uninterrupted.observe(loss)
        stopped.observe(loss)
    resumed.load_state_dict(copy.deepcopy(stopped.state_dict()))
    for loss in [None, *LOSSES[count:]]:
        if loss is not None:
            uninterrupted.observe(loss)
            resumed.observe(loss)
        assert resumed.lr_at(0) == uninterrupted.lr_at(0)


@pytest.mark.parametrize("name", sorted(set(SCHEDULES) - {"plateau"}))
def test_other_schedules_ignore_evaluations(name):
    schedule = build(name, **({"max_lr": 0.4} if name == "onecycle" else WARM_UPS[name][0]))
    before = [schedule.lr_at(step) for step in range(TOTAL_STEPS)]
    for loss in LOSSES:
        schedule.observe(loss)
    schedule.load_state_dict(schedule.state_dict())
    assert [schedule.lr_at(step) for step in range(TOTAL_STEPS)] == before


# --- setting the rates --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 11, TOTAL_STEPS - 1])
def test_set_rates_sets_rate_and_momentum_of_every_group(step):
    schedule = build("onecycle", max_lr=0.4)
    sgd = SGD([{"params": [toy_parameter()], "lr": lr} for lr in (1.0, 2.0)], momentum=0.5)
    adam = Adam([{"params": [toy_parameter()], "lr": lr} for lr in (1.0, 2.0)], betas=(0.5, 0.123))
    for optimizer in (sgd, adam):
        set_rates(optimizer, schedule, step)
        assert [group["lr"] for group in optimizer.param_groups] == [schedule.lr_at(step)] * 2
    assert [group["momentum"] for group in sgd.param_groups] == [schedule.momentum_at(step)] * 2
    assert [group["betas"] for group in adam.param_groups] == [(schedule.momentum_at(step), 0.123)] * 2


def test_set_rates_leaves_the_momentum_unchanged_if_the_schedule_has_none():
    sgd, adam = SGD([toy_parameter()], momentum=0.5), Adam([toy_parameter()], betas=(0.5, 0.123))
    for optimizer in (sgd, adam):
        set_rates(optimizer, build("step", step_size=1), STEPS_PER_EPOCH)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(LR / 10)
    assert sgd.param_groups[0]["momentum"] == 0.5
    assert adam.param_groups[0]["betas"] == (0.5, 0.123)


# --- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "keywords", "message"),
    [
        ("cosin", {}, "cosin.*known: .*cosine"),
        ("step", {"step_size": 0}, "step_size"),
        ("cosine", {"T_max": 0}, "T_max"),
        ("cosine", {"T_max": -3}, "T_max"),
        ("cosine", {"interval": "steps"}, "interval"),
        ("linear", {"start_factor": 0.0}, "start_factor"),
        ("linear", {"start_factor": 1.5}, "start_factor"),
        ("linear", {"end_factor": -0.1}, "end_factor"),
        ("linear", {"end_factor": 2.0}, "end_factor"),
        ("linear", {"total_iters": 0}, "total_iters"),
        ("linear", {"interval": "steps"}, "interval"),
        ("onecycle", {"max_lr": 0.0}, "max_lr"),
        ("onecycle", {"max_lr": 0.1, "div_factor": 0.0}, "div_factor"),
        ("onecycle", {"max_lr": 0.1, "final_div_factor": -1.0}, "final_div_factor"),
        ("onecycle", {"max_lr": 0.1, "pct_start": 1.5}, "pct_start"),
        ("onecycle", {"max_lr": 0.1, "anneal_strategy": "cosine"}, "anneal_strategy"),
        ("multistep", {"milestones": []}, "milestones"),
        ("multistep", {"milestones": [3, 0]}, "milestones"),
        ("multistep", {"milestones": [3], "gamma": -1.0}, "gamma"),
        ("exponential", {"gamma": 0.0}, "gamma"),
        ("exponential", {"gamma": 0.5, "interval": "steps"}, "interval"),
        ("polynomial", {"total_iters": 0}, "total_iters"),
        ("polynomial", {"power": 0.0}, "power"),
        ("cosine_restarts", {"T_0": 0}, "T_0"),
        ("cosine_restarts", {"T_0": 1, "T_mult": 0}, "T_mult"),
        ("cosine_restarts", {"T_0": 1, "eta_min": -1.0}, "eta_min"),
        ("cosine", {"warmup_epochs": -1}, "warmup_epochs"),
        ("constant", {"warmup_start_factor": 2.0}, "warmup_start_factor"),
        ("plateau", {"factor": 1.0}, "[Ff]actor"),
        ("plateau", {"threshold_mode": "relative"}, "threshold mode|threshold_mode"),
    ],
)
def test_a_bad_schedule_is_refused(name, keywords, message):
    with pytest.raises(ValueError, match=message):
        build(name, **keywords)


@pytest.mark.parametrize("name", sorted(set(SCHEDULES) - {"onecycle"}))
def test_a_schedule_without_a_learning_rate_is_refused(name):
    with pytest.raises(ValueError, match=r"optimizer\.lr"):
        build(name, lr=None, **(WARM_UPS[name][0] if name in WARM_UPS else {}))
