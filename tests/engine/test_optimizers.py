"""Every optimizer of PyTorch is built, trains, and refuses bad values."""

import pytest
import torch
from torch.optim import SGD, Optimizer

from mnist_dist.engine.optimizers import OPTIMIZERS, build_optimizer, default_lr, fill_momentum


def toy_parameter() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))


def only(parameter: torch.nn.Parameter) -> torch.nn.Module:
    return torch.nn.ParameterList([parameter])


def test_all_optimizers_of_pytorch_are_known_except_two():
    kinds = [kind for kind in vars(torch.optim).values() if isinstance(kind, type) and issubclass(kind, Optimizer)]
    unfit = {"Optimizer", "LBFGS", "SparseAdam"}
    own = {"Lion", "Muon"}
    assert {kind.__name__ for kind in OPTIMIZERS.values()} == {kind.__name__ for kind in kinds} - unfit | own
    assert {"sgd", "adam", "adamw", "adadelta", "rmsprop"} <= OPTIMIZERS.keys()


@pytest.mark.parametrize("name", sorted(OPTIMIZERS.keys() - {"muon"}))  # which needs to know the layers: test_muon.py
def test_every_optimizer_makes_the_steps_of_its_class(name):
    built, plain = toy_parameter(), toy_parameter()
    optimizer = build_optimizer(only(built), name, lr=default_lr(name))
    reference = OPTIMIZERS[name]([plain])  # with PyTorch's default learning rate
    for _ in range(3):
        for parameter, each in [(built, optimizer), (plain, reference)]:
            each.zero_grad()
            (parameter**2).sum().backward()
            each.step()
    assert not torch.equal(built, toy_parameter())
    torch.testing.assert_close(built, plain, rtol=1e-6, atol=1e-7)


def test_keywords_reach_the_optimizer():
    optimizer = build_optimizer(only(toy_parameter()), "adamw", lr=0.3, betas=(0.8, 0.9), weight_decay=0.2)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.3, (0.8, 0.9), 0.2)


@pytest.fixture
def uninitialised_memory_is_nan():
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


def test_a_skipped_first_step_leaves_the_momentum_at_zero(uninitialised_memory_is_nan):
    """The kernel skips a step if `found_inf` is set, as on a GPU after a gradient that is not finite."""
    parameter, plain = toy_parameter(), toy_parameter()
    optimizer = build_optimizer(only(parameter), "sgd", lr=0.1, momentum=0.9, nesterov=True)
    fill_momentum(optimizer)
    parameter.grad = torch.full_like(parameter, torch.inf)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert torch.equal(parameter, plain)
    parameter.grad = plain.grad = torch.ones_like(parameter)
    optimizer.found_inf.zero_()
    expected = SGD([plain], lr=0.1, momentum=0.9, nesterov=True)
    for _ in range(3):
        optimizer.step()
        expected.step()
        torch.testing.assert_close(parameter, plain)


@pytest.mark.parametrize("keywords", [{}, {"fused": False}, {"foreach": True}])
def test_the_kernel_is_fused_unless_the_recipe_chooses(keywords):
    group = build_optimizer(only(toy_parameter()), "adam", lr=0.1, **keywords).param_groups[0]
    assert bool(group["fused"]) is (not keywords)


@pytest.mark.parametrize(
    ("name", "keywords"),
    [
        ("sdg", {}),
        ("SGD", {}),
        ("lbfgs", {}),
        ("sgd", {"lr": -0.1}),
        ("sgd", {"momentum": -1.0}),
        ("sgd", {"nesterov": True}),
        ("adam", {"betas": (0.9, 1.5)}),
        ("adadelta", {"rho": 2.0}),
        ("lion", {"lr": -0.1}),
        ("lion", {"betas": (0.9, 1.0)}),
        ("lion", {"weight_decay": -1.0}),
        ("muon", {"lr": -0.1}),
        ("muon", {"momentum": 1.0}),
        ("muon", {"ns_steps": 0}),
        ("muon", {"ns_steps": 100}),
        ("muon", {"adjust_lr_fn": "none"}),
        ("muon", {"adamw_lr_ratio": -1.0}),
        ("muon", {"adamw_betas": (0.9, -0.1)}),
        ("muon", {"adamw_weight_decay": -1.0}),
    ],
)
def test_a_bad_optimizer_is_refused(name, keywords):
    with pytest.raises(ValueError, match=r".") as caught:
        build_optimizer(only(toy_parameter()), name, **{"lr": 0.1, **keywords})
    if name not in OPTIMIZERS:
        assert repr(name) in str(caught.value)
        assert "adadelta" in str(caught.value), "the known names are not listed"
