"""Lion equals a plain reference, and resumes exactly."""

import copy

import pytest
import torch

from mnist_dist.engine.lion import Lion

SHAPES = [(5, 3), (4,), (2, 3, 3, 3)]


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def set_gradients(made: list[torch.nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in made:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def plain_lion(
    weights: list[float], steps: list[list[float]], lr: float, betas: tuple[float, float], decay: float
) -> list[float]:
    """Algorithm 2 of Chen et al. 2023, number by number."""
    averages = [0.0] * len(weights)
    for gradients in steps:
        for at, gradient in enumerate(gradients):
            mixed = betas[0] * averages[at] + (1 - betas[0]) * gradient
            direction = (mixed > 0) - (mixed < 0)
            weights[at] -= lr * (direction + decay * weights[at])
            averages[at] = betas[1] * averages[at] + (1 - betas[1]) * gradient
    return weights


@pytest.mark.parametrize("keywords", [{}, {"betas": (0.95, 0.98), "weight_decay": 0.3}])
def test_lion_is_the_algorithm_of_the_paper(keywords):
    made = parameters()
    steps = []
    optimizer = Lion(made, lr=0.01, **keywords)
    for step in range(8):
        set_gradients(made, step)
        steps.append(torch.cat([parameter.grad.flatten() for parameter in made]).tolist())
        optimizer.step()
    start = torch.cat([parameter.detach().flatten() for parameter in parameters()]).tolist()
    betas, decay = keywords.get("betas", (0.9, 0.99)), keywords.get("weight_decay", 0.0)
    expected = torch.tensor(plain_lion(start, steps, 0.01, betas, decay))
    torch.testing.assert_close(torch.cat([parameter.detach().flatten() for parameter in made]), expected)


def test_a_zero_gradient_and_no_gradient_change_nothing():
    made = parameters()
    made[0].grad = torch.zeros_like(made[0])
    Lion(made, lr=0.01).step()
    assert all(torch.equal(each, before) for each, before in zip(made, parameters(), strict=True))


def test_lion_resumes_exactly():
    whole, halves = parameters(), parameters()
    optimizer = Lion(whole, lr=0.01)
    first = Lion(halves, lr=0.01)
    for step in range(6):
        if step == 3:
            state = copy.deepcopy(first.state_dict())
            first = Lion(halves, lr=0.01)
            first.load_state_dict(state)
        for made, each in ((whole, optimizer), (halves, first)):
            set_gradients(made, step)
            each.step()
    assert all(torch.equal(one, other) for one, other in zip(whole, halves, strict=True))
