"""`Dropout` has the distribution of `nn.Dropout`, exact gradients, and the same zeros when compiled."""

import math

import pytest
import torch
from torch import Tensor, nn

from mnist_dist.models.layers import (
    Dropout,
    bound_zeros,
    draw_bernoulli_positions,
    sparse_dropout,
    sparse_dropout_backward,
)

FORMATS = [torch.contiguous_format, torch.channels_last]
IMAGES = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("p", [0.01, 0.05])
def test_the_number_of_zeros_has_a_binomial_distribution(p):
    torch.manual_seed(0)
    size, trials = 1000, 3000
    counts = torch.tensor([len(draw_bernoulli_positions(size, p)) for _ in range(trials)], dtype=torch.float64)
    mean, variance = size * p, size * p * (1 - p)
    assert abs(counts.mean() - mean) < 5 * math.sqrt(variance / trials)
    assert abs(counts.var() / variance - 1) < 5 * math.sqrt(2 / trials)


@pytest.mark.parametrize("p", [0.01, 0.05, 0.2])
def test_positions_of_zeros_are_independent_and_uniform(p):
    torch.manual_seed(0)
    size = 2_000_000
    positions = draw_bernoulli_positions(size, p)
    assert positions[0] >= 0 and positions[-1] < size
    gaps = positions.diff()
    assert gaps.min() >= 1
    for distance in (1, 2, 3):  # a gap of this length has a known frequency in the geometric distribution
        rate = p * (1 - p) ** (distance - 1)
        assert abs((gaps == distance).double().mean() - rate) < 5 * math.sqrt(rate * (1 - rate) / len(gaps))
    dropped = torch.zeros(size, dtype=torch.bool)
    dropped[positions] = True
    pairs = (dropped[1:] & dropped[:-1]).sum()
    assert abs(pairs - size * p**2) < 6 * math.sqrt(size * p**2)
    tenths = dropped.view(10, -1).double().mean(dim=1)
    assert (tenths - p).abs().max() < 5 * math.sqrt(p * (1 - p) / (size / 10))


def test_positions_are_drawn_until_the_end_is_reached(monkeypatch):
    # With gaps of 1, the first round of draws covers only a small part.
    monkeypatch.setattr(Tensor, "exponential_", lambda tensor, rate: tensor.zero_())
    assert draw_bernoulli_positions(1000, 0.01).tolist() == list(range(1000))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("gradient_format", FORMATS)
def test_dropout_scales_output_and_gradient_exactly(dtype, memory_format, gradient_format):
    torch.manual_seed(0)
    layer = Dropout(0.05)
    values = torch.rand(8, 6, 13, 11, dtype=dtype).add(1).contiguous(memory_format=memory_format).requires_grad_()
    gradient = torch.rand(8, 6, 13, 11, dtype=dtype).add(1).contiguous(memory_format=gradient_format)
    output = layer(values)
    output.backward(gradient)
    kept = output != 0
    assert 0 < (~kept).sum() < 0.1 * kept.numel()
    assert output.dtype == dtype and output.is_contiguous(memory_format=memory_format)
    assert torch.equal(output, torch.where(kept, values * (1 / 0.95), 0))
    assert torch.equal(values.grad, torch.where(kept, gradient * (1 / 0.95), 0))


@pytest.mark.parametrize("shape", [(4000,), (50, 80), (8, 5, 100), (4000, 1, 1, 1), (1, 4000, 1, 1), (0, 3, 5, 5)])
def test_dropout_accepts_any_shape(shape):
    values = torch.ones(shape, requires_grad=True)
    output = Dropout(0.05)(values)
    output.sum().backward()
    assert torch.equal(output, values.grad)
    assert set(output.unique().tolist()) <= {0.0, torch.tensor(1 / 0.95).item()}


def test_dropout_accepts_strided_values_and_does_not_change_them():
    values = torch.ones(40, 40)
    output = Dropout(0.1)(values[:, ::2].t())
    assert output.shape == (20, 40) and (output == 0).any()
    assert (values == 1).all()


def test_first_and_second_derivatives_of_dropout():
    def seeded(values: Tensor) -> Tensor:
        torch.manual_seed(3)
        return Dropout(0.2)(values)

    values = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert 0 < (seeded(values) == 0).sum() < values.numel()
    assert torch.autograd.gradcheck(seeded, (values,))
    assert torch.autograd.gradgradcheck(seeded, (values,))


@pytest.mark.parametrize("p", [0.01, 0.5])
def test_the_seed_determines_the_zeros(p):
    values = torch.ones(16, 8, 12, 12)
    layer = Dropout(p)

    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return layer(values)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("gradient_format", FORMATS)
def test_dropout_for_the_compiler_equals_eager_dropout(memory_format, gradient_format, monkeypatch):
    layer, results = Dropout(0.1), []
    gradient = torch.rand(8, 6, 13, 11).contiguous(memory_format=gradient_format)
    for compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda compiling=compiling: compiling)
        torch.manual_seed(0)
        values = torch.ones(8, 6, 13, 11).contiguous(memory_format=memory_format).requires_grad_()
        output = layer(values)
        output.backward(gradient)
        assert output.is_contiguous(memory_format=memory_format)
        results.append((output, values.grad))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


def test_the_custom_operation_is_what_it_declares():
    values = torch.rand(4, 3, 5, 5, requires_grad=True).contiguous(memory_format=torch.channels_last)
    for utility in ("test_schema", "test_autograd_registration", "test_faketensor"):
        torch.library.opcheck(sparse_dropout, (values, 0.1, True), test_utils=utility)
    nothing_dropped = torch.full((bound_zeros(3, 0.01),), -1)
    assert torch.equal(sparse_dropout_backward(torch.ones(3), nothing_dropped, 0.5, False), torch.full((3,), 2.0))


def test_dropout_is_an_identity_in_evaluation_and_at_rate_zero():
    values = torch.randn(4, 3, 5, 5)
    assert Dropout(0.3).eval()(values) is values
    assert Dropout(0.0)(values) is values


def test_dropout_works_with_autocast_meta_tensors_and_export():
    network = nn.Sequential(nn.Conv2d(1, 4, 3), Dropout(0.05))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = network(IMAGES)
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert network[0].weight.grad is not None
    assert Dropout(0.05)(torch.empty(2, 3, device="meta")).shape == (2, 3)
    program = torch.export.export(network.eval(), (IMAGES,))
    assert torch.equal(program.module()(IMAGES), network(IMAGES))
