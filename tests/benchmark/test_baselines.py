"""The bare step, the tensor loop, and the kernels that loops may use."""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from functools import partial
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

from mnist_dist.benchmark import baselines
from mnist_dist.benchmark.baselines import BenchmarkSetup


@pytest.mark.parametrize("build", [baselines.bare_step, baselines.tensor_loop])
def test_a_loop_without_a_loader_reduces_the_loss(build, setup_of, losses_of):
    losses = losses_of(build(setup_of()), 40)
    assert np.mean(losses[-4:]) < losses[0] - 0.2


def test_the_tensor_loop_splits_each_batch_among_the_ranks(setup_of, monkeypatch):
    setup, seen = setup_of(), []
    images = setup.dataset.train.images

    class Rank:
        device, num_processes = torch.device("cpu"), 4

        def __init__(self, rank: int):
            self.process_index = rank

    monkeypatch.setattr(baselines, "plain_step", lambda setup: lambda images, labels: seen.append(images))
    for rank in range(4):
        loop = baselines.tensor_loop(BenchmarkSetup(setup.recipe, "no", setup.dataset, Rank(rank)))
        loop.run(8)  # an epoch of 512 images
    assert {len(batch) for batch in seen} == {16}
    sums = torch.cat(seen).flatten(1).sum(dim=1)
    assert len(sums) == len(images) == len(sums.unique()), "an image was seen twice"


def test_a_baseline_uses_the_fastest_kernels_and_restores_the_settings(setup_of, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    seen: list[tuple[bool, bool]] = []

    def step() -> None:
        seen.append((torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark))

    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        setup_of().baseline("", step, iter(lambda: (), None)).run(1)
        step()
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == [(False, True), (True, False)]


def test_a_captured_step_keeps_the_tensors_that_it_uses(monkeypatch):
    for name, stand_in in {"Stream": MagicMock(), "current_stream": MagicMock(), "stream": nullcontext}.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(baselines, "capture_cuda_graph", lambda call, stream: lambda: None)
    weight = torch.zeros(1)
    kept, replay = weakref.ref(weight), baselines.captured(partial(weight.add_, 1))
    del weight
    assert kept() is not None, "the graph would read and write memory that is used by other tensors"
    del replay
    assert kept() is None


def test_a_captured_step_trains_like_an_eager_one(gpu, setup_of, monkeypatch):
    def weights(is_captured: bool) -> list[torch.Tensor]:
        modules: list[weakref.ref[torch.nn.Module]] = []  # only the loop itself keeps its network
        build = BenchmarkSetup.module

        def module(setup: BenchmarkSetup) -> torch.nn.Module:
            built = build(setup)
            modules.append(weakref.ref(built))
            return built

        with monkeypatch.context() as patch:
            patch.setattr(BenchmarkSetup, "module", module)
            patch.setattr(BenchmarkSetup, "is_captured", is_captured)
            loop = baselines.bare_step(setup_of())
            # Three warm-up steps precede the capture, which computes nothing.
            loop.run(2 if is_captured else 5)
        network = modules[0]()
        assert network is not None
        return [parameter.detach().cpu() for parameter in network.parameters()]

    for captured, eager in zip(weights(True), weights(False), strict=True):
        torch.testing.assert_close(captured, eager, rtol=1e-3, atol=1e-4)
