"""Muon equals PyTorch's on matrices, treats convolutions as matrices, and leaves the rest to AdamW."""

import copy

import pytest
import torch
from torch import nn

from mnist_dist.engine.muon import Muon, newton_schulz, split_hidden
from mnist_dist.engine.optimizers import add_missing_state, build_optimizer
from mnist_dist.engine.schedules import build_schedule, set_rates
from mnist_dist.models import build_model

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def random_parameters(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def set_gradients(parameters: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this version of torch has no Muon")
@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"nesterov": False, "momentum": 0.8, "weight_decay": 0.0},
        {"adjust_lr_fn": "match_rms_adamw", "ns_steps": 3},
        {"adjust_lr_fn": "original", "ns_coefficients": (2.0, -1.5, 0.5), "eps": 1e-3},
    ],
)
def test_matrices_move_as_with_pytorchs_muon(keywords, monkeypatch):
    monkeypatch.setattr("mnist_dist.engine.muon.emulates_bf16", lambda device: False)  # PyTorch's runs in bfloat16
    shapes = [(6, 9), (9, 6), (6, 9), (5, 5), (1, 4)]  # wide, tall, two of one shape
    own, expected, start = (random_parameters(*shapes) for _ in range(3))
    optimizers = [(own, Muon(own, lr=0.05, **keywords)), (expected, torch.optim.Muon(expected, lr=0.05, **keywords))]
    for step in range(5):
        for parameters, optimizer in optimizers:
            set_gradients(parameters, step)
            optimizer.step()
    for found, reference, before in zip(own, expected, start, strict=True):
        assert (reference - before).abs().max() > 0.01
        torch.testing.assert_close(found, reference, rtol=1e-2, atol=1e-3)  # bfloat16 has 8 bits


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_kernel_moves_as_the_matrix_of_its_rows(memory_format):
    kernel, matrix = random_parameters((6, 4, 3, 3)), random_parameters((6, 36))
    kernel[0].data = kernel[0].data.contiguous(memory_format=memory_format)
    assert torch.equal(kernel[0].flatten(1), matrix[0])
    optimizers = Muon(kernel, lr=0.1), Muon(matrix, lr=0.1)
    for step in range(3):
        set_gradients(matrix, step)
        kernel[0].grad = matrix[0].grad.view(6, 4, 3, 3).contiguous(memory_format=memory_format)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(kernel[0].flatten(1), matrix[0])
    assert kernel[0].is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize(("emulated", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_the_iteration_moves_singular_values_close_to_one(emulated, dtype, monkeypatch):
    monkeypatch.setattr("mnist_dist.engine.muon.emulates_bf16", lambda device: emulated)
    matrices = torch.randn(4, 20, 30, generator=torch.Generator().manual_seed(0))
    for each in (matrices, matrices.mT):
        values = torch.linalg.svdvals(newton_schulz(each, COEFFICIENTS, 5, 1e-7).float())
        assert values.min() > 0.5 and values.max() < 1.3
    # The singular vectors stay: the product with the polar factor is close to the identity.
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    product = newton_schulz(matrices, COEFFICIENTS, 5, 1e-7).float() @ (left @ right).mT
    assert product.diagonal(dim1=1, dim2=2).min() > 0.5
    zeros = torch.zeros(1, 3, 4)
    assert torch.equal(newton_schulz(zeros, COEFFICIENTS, 5, 1e-7), zeros.to(dtype))


class Mixed(nn.Module):
    """One parameter of every kind."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.table = nn.Parameter(torch.zeros(16, 8))
        self.embedding = nn.Embedding(10, 8)
        self.stem = nn.Conv2d(1, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.convolution = nn.Conv2d(8, 8, 3)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.hidden = nn.Linear(8, 8)
        self.frozen = nn.Linear(8, 8)
        self.head = nn.Linear(8, 10)


def test_muon_takes_the_hidden_matrices_and_convolutions():
    network = Mixed()
    network.frozen.requires_grad_(False)
    hidden, others = split_hidden(network)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    expected = {"convolution.weight", "attention.in_proj_weight", "attention.out_proj.weight", "hidden.weight"}
    assert {names[id(parameter)] for parameter in hidden} == expected
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert {names[id(parameter)] for parameter in others} == trained - expected


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [("resnet18", "conv1.weight", "fc.weight"), ("lenet5", "features.0.weight", "classifier.5.weight")],
)
def test_first_and_last_layer_of_a_network_are_for_adamw(name, first, last):
    network = build_model(name)
    hidden, others = split_hidden(network)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    assert [names[id(each)] for each in others if each.ndim > 1] == [first, last]
    assert all(each.ndim > 1 for each in hidden) and hidden


def test_the_rest_moves_as_with_adamw():
    own, expected = random_parameters((5,), (7,)), random_parameters((5,), (7,))
    keywords = {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3}
    optimizer = Muon(own, lr=0.5, adamw_lr_ratio=0.1, **{f"adamw_{key}": value for key, value in keywords.items()})
    reference = torch.optim.AdamW(expected, lr=0.05, **keywords)
    for step in range(4):
        for parameters, each in ((own, optimizer), (expected, reference)):
            set_gradients(parameters, step)
            each.step()
    for found, other in zip(own, expected, strict=True):
        torch.testing.assert_close(found, other)


def test_the_schedule_sets_the_rate_of_both_methods():
    network = build_model("lenet5")
    optimizer = build_optimizer(network, "muon", lr=0.1, adamw_lr_ratio=0.25)
    schedule = build_schedule("onecycle", lr=None, max_lr=0.4, steps_per_epoch=5, total_steps=20)
    set_rates(optimizer, schedule, 7)
    muon, adamw = optimizer.param_groups
    assert muon["lr"] == adamw["lr"] == schedule.lr_at(7) and adamw["lr_ratio"] == 0.25
    assert muon["momentum"] == adamw["betas"][0] == schedule.momentum_at(7)
    assert adamw["betas"][1] == 0.999
    # A rate of 0 stops both.
    before = copy.deepcopy(network.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    set_gradients(list(network.parameters()), 0)
    optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_muon_resumes_exactly():
    whole, halves = build_model("lenet5"), build_model("lenet5")
    halves.load_state_dict(whole.state_dict())
    optimizer, resumed = (build_optimizer(each, "muon", lr=0.02) for each in (whole, halves))
    for step in range(6):
        if step == 3:
            state = copy.deepcopy(resumed.state_dict())
            resumed = build_optimizer(halves, "muon", lr=0.02)
            resumed.load_state_dict(state)
            add_missing_state(resumed)
        for network, each in ((whole, optimizer), (halves, resumed)):
            set_gradients(list(network.parameters()), step)
            each.step()
    state = whole.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in halves.state_dict().items())


def test_a_network_without_hidden_layers_trains_with_adamw():
    network = nn.Linear(4, 2)
    optimizer = build_optimizer(network, "muon", lr=0.1)
    assert [group["use_muon"] for group in optimizer.param_groups] == [False]
    before = network.weight.detach().clone()
    network(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert not torch.equal(network.weight, before)
