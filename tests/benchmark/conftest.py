"""Fixtures of the benchmark's tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from accelerate.state import AcceleratorState

from mnist_dist.benchmark.baselines import BenchmarkSetup
from mnist_dist.recipe.loading import load_recipe


@pytest.fixture(autouse=True)
def _new_accelerator_state() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def setup_of() -> Callable[..., BenchmarkSetup]:
    """Returns a function that prepares the recipe `debug` with a constant learning rate and the given overrides."""
    words = ["schedule.name=constant", "schedule.max_lr=null", "schedule.cycle_momentum=null", "optimizer.lr=0.003"]
    return lambda *overrides: BenchmarkSetup.prepare(load_recipe("debug", "batch_size=64", *words, *overrides))


@pytest.fixture
def losses_of(monkeypatch) -> Callable[..., list[float]]:
    """Returns a function that runs a timed loop in two rounds and returns the loss of each step."""

    def measure(loop, steps: int) -> list[float]:
        losses: list[float] = []
        compute = BenchmarkSetup.loss

        def loss(setup, logits, labels):
            value = compute(setup, logits, labels)
            losses.append(float(value.detach()))
            return value

        with monkeypatch.context() as patch:
            patch.setattr(BenchmarkSetup, "loss", loss)
            assert loop.run(4) > 0
            assert len(losses) == 4
            assert loop.run(steps - 4) > 0
            loop.close()
        assert len(losses) == steps
        return losses

    return measure
