"""The reference trainings: fp32, batch norm, bf16, and a captured step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from mnist_dist.distributed.launcher import launched_world
from mnist_dist.doctor import reference, training
from mnist_dist.doctor.checks import FAIL, NOTE, OK, WARN
from mnist_dist.doctor.ranks import Ranks
from mnist_dist.doctor.reference import REFERENCES, STEPS, reference_losses, train_alone, train_distributed

CPU = torch.device("cpu")


@pytest.mark.parametrize("train", [train_alone, train_distributed])
def test_the_reference_training_does_not_use_tf32(train, monkeypatch):
    """The rounding of TF32 is larger than the tolerance."""
    found = []
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(reference, "STEPS", 2)

    def loss(*arguments: Any, **keywords: Any) -> torch.Tensor:
        found.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
        return cross_entropy(*arguments, **keywords)

    monkeypatch.setattr("torch.nn.functional.cross_entropy", loss)
    train(CPU)
    assert len(found) >= 2 and set(found) == {(False, False)}


def test_every_reference_has_its_losses_in_the_package_and_learns():
    for name in REFERENCES:
        losses = reference_losses(name)
        assert len(losses) == STEPS and losses[-1] < losses[0]


def test_the_references_have_batch_norm_and_bf16(monkeypatch):
    _, _, network = reference.build_reference("batch norm")
    assert any(isinstance(part, nn.BatchNorm2d) for part in network.modules())
    assert not any(isinstance(part, nn.BatchNorm2d) for part in reference.build_reference("lenet5")[2].modules())
    monkeypatch.setattr(reference, "STEPS", 2)
    assert train_alone(CPU, "bf16")["losses"] != train_alone(CPU, "lenet5")["losses"]


@pytest.mark.parametrize("name", [name for name in REFERENCES if name != "lenet5"])
def test_a_wrong_batch_norm_or_precision_is_found(name, monkeypatch):
    """The constant of batch norm is 0.01 instead of 1e-5; without batch norm, weights of the last layer are tripled."""
    build = reference.build_reference

    def wrong(*arguments: str) -> Any:
        recipe, data, module = build(*arguments)
        norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
        for norm in norms:
            norm.eps = 0.01
        with torch.no_grad():
            list(module.parameters())[-2].mul_(1.0 if norms else 3.0)
        return recipe, data, module

    monkeypatch.setattr(training, "emulates_bf16", lambda device: False)
    ranks = Ranks(launched_world())
    assert [each.verdict for each in training.check_training_other(ranks, name)] == [OK]
    monkeypatch.setattr(reference, "build_reference", wrong)
    assert [each.verdict for each in training.check_training_other(ranks, name)] == [FAIL]


def test_a_cpu_that_emulates_bf16_is_named(monkeypatch):
    monkeypatch.setattr(training, "emulates_bf16", lambda device: True)
    monkeypatch.setattr(training, "train_alone", lambda device, name: {"losses": reference.reference_losses(name)})
    ranks = Ranks(launched_world())
    assert [each.verdict for each in training.check_training_other(ranks, "bf16")] == [OK, NOTE]
    assert [each.verdict for each in training.check_training_other(ranks, "batch norm")] == [OK]


def test_a_device_without_bf16_is_not_measured(monkeypatch):
    monkeypatch.setattr(training, "supports_precision", lambda device, precision: precision != "bf16")
    monkeypatch.setattr(training, "train_alone", lambda *arguments: 1 / 0)
    assert [each.verdict for each in training.check_training_other(Ranks(launched_world()), "bf16")] == [OK]


# --- a captured step ----------------------------------------------------------------------------------------------


def test_without_cuda_no_step_is_captured_and_nothing_is_trained():
    [finding] = training.check_training_captured(Ranks(launched_world()))
    assert finding.verdict == OK and "CUDA" in finding.figure


class FakeCaptured:
    """Stands in for a captured step, which needs a GPU: runs the step eagerly, after an error on request."""

    def __init__(self, step: Any, message: str):
        self.step, self.message, self.optimizer = step, message, step.optimizer
        self.notify = print

    def __call__(self, plan: Any, index: int, number: int) -> None:
        if number == 3 and self.message:
            self.notify(self.message)
        self.step(plan, index, number)


@pytest.mark.parametrize(("message", "verdicts"), [("", [OK]), ("this step cannot be captured", [OK, WARN])])
def test_the_losses_of_a_captured_step_are_compared_and_a_failed_capture_is_a_warning(message, verdicts, monkeypatch):
    build = reference.build_components

    def captured(*arguments: Any) -> Any:
        built = build(*arguments)
        step: Any = FakeCaptured(built.update, message)
        return SimpleNamespace(**vars(built) | {"update": step, "captured": step})

    monkeypatch.setattr(reference, "build_components", captured)
    assert [each.verdict for each in training.check_training_captured(Ranks(launched_world()))] == verdicts


def test_a_captured_step_gives_the_losses_on_a_gpu(gpu):
    result = train_distributed(gpu, "step")
    assert result["obstacle"] == ""
    [finding] = training.compare_losses([result["losses"]], reference_losses("lenet5"))
    assert finding.verdict == OK
