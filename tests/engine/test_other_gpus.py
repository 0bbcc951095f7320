"""The GPUs of Apple and of Intel's desktops have no float64: a run uses none there, and its figures are as exact."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mnist_dist.engine import metrics
from mnist_dist.engine.metrics import Meter
from mnist_dist.models import build_model
from tests.engine.test_cuda_graph import run_fake_steps
from tests.engine.test_metrics import FakeProcess


class NoFloat64(TorchDispatchMode):
    """Refuses a float64 tensor on a GPU, as Apple's GPUs do. PyTorch's fake tensors have a device, but no content."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for each in result if isinstance(result, list | tuple) else [result]:
            if isinstance(each, Tensor) and each.dtype == torch.float64 and each.device.type != "cpu":
                raise TypeError(f"{function}: the device does not support float64")
        return result


@pytest.mark.parametrize("name", ["model_v1", "lenet5", "resnet18"])
@pytest.mark.parametrize(
    "words",
    [{"ema": True, "clip_grad_norm": 1.0}, {"everything": True}, {"teacher": True, "micro_batch_size": 5}],
    ids=lambda words: "-".join(words),
)
def test_a_step_and_its_figures_need_no_float64(name, words, monkeypatch):
    monkeypatch.setattr(metrics, "sum_dtype", lambda device: torch.float32)
    run_fake_steps(lambda: build_model(name), monkeypatch, watching=NoFloat64(), **words)


def test_the_stand_in_refuses_float64(monkeypatch):
    with pytest.raises(TypeError, match="float64"):
        run_fake_steps(lambda: build_model("lenet5"), monkeypatch, watching=NoFloat64(), ema=True)


def test_the_figures_in_float32_agree_with_those_in_float64(monkeypatch):
    """Over 2,000 steps between two log lines; counts are exact."""
    generator = torch.Generator().manual_seed(0)
    losses = 128 * torch.rand(2000, generator=generator)
    found = {}
    for dtype in (torch.float32, torch.float64):
        monkeypatch.setattr(metrics, "sum_dtype", lambda device, dtype=dtype: dtype)
        meter = Meter(FakeProcess())
        meter.resume()
        for loss in losses:
            meter.add(loss, torch.eye(2).repeat(64, 1), torch.zeros(128, dtype=torch.int64))
            meter.count_step(128)
        state = {"sums": [meter.sums.tolist()], "epoch_sums": [0.0, 0.0, 0.0], "train_seconds": 1.0, "steps": 2000}
        found[dtype] = meter.read()
    exact, single = found[torch.float64], found[torch.float32]
    assert single["train/accuracy"] == exact["train/accuracy"] == 50.0
    assert single["train/loss"] == pytest.approx(exact["train/loss"], rel=2e-6)
    monkeypatch.setattr(metrics, "sum_dtype", lambda device: torch.float32)
    other = Meter(FakeProcess())
    other.load_state_dict(state | {"seconds": 1.0})  # a checkpoint of another machine
    assert other.read()["train/loss"] == pytest.approx(exact["train/loss"], rel=2e-6)
