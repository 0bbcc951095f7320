"""The operations of a training step are counted without a GPU, and the trainer's step stays close to the bare step."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mnist_dist.benchmark import __main__ as benchmark
from mnist_dist.benchmark import operations
from mnist_dist.benchmark.fake_gpu import GPU, OperationCounter, PythonBackward, fake_gpu
from mnist_dist.recipe.loading import load_recipe
from tests.fake_tensors import skip_unless_fake_tensors_work


@pytest.fixture(scope="module", autouse=True)
def _fake_tensors_work():
    skip_unless_fake_tensors_work()


def test_views_and_work_of_the_cpu_do_not_count_as_kernels_syncs_or_copies():
    with fake_gpu():
        values, cpu = torch.zeros(4, device=GPU), torch.zeros(4)
    found = []
    for function in (
        lambda: values[1:].view(3, 1).detach(),
        lambda: cpu + 1,
        lambda: values + 1,
        lambda: values.isfinite(),
        lambda: float(values[0]),
        lambda: values.cpu(),
        lambda: values.to("cpu", non_blocking=True),
        lambda: cpu.to(GPU),
        lambda: torch.tensor([1.0], device=GPU),
    ):
        with fake_gpu(), OperationCounter() as counter:
            function()
        found.append((counter.found.launches, counter.found.syncs, counter.found.copies))
    one, wait, copy = (1, 0, 0), (0, 1, 0), (0, 0, 1)
    assert found == [(0, 0, 0), (0, 0, 0), one, (4, 0, 0), wait, wait, (0, 0, 0), copy, copy]


def test_a_list_of_tensors_is_one_kernel_only_if_pytorch_has_one_for_it():
    with fake_gpu():
        floats = [torch.zeros(size, device=GPU) for size in (2, 3, 4)]
        mixed = [*floats, torch.zeros(2, dtype=torch.int64, device=GPU)]
    for tensors, launches in ((floats, 1), (mixed, 4)):
        with fake_gpu(), OperationCounter() as counter:
            torch._foreach_add_(tensors, 1)
        assert counter.found.launches == launches


def test_the_backward_pass_in_python_gives_the_gradients_of_the_engine():
    torch.manual_seed(0)
    gradients = []
    module = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 4))
    images, labels = torch.randn(5, 1, 8, 8), torch.tensor([0, 1, 2, 3, 0])
    for _ in range(2):
        gradients.append([])
        for scale in (1.0, 0.25):  # the second pass adds to the first one's gradients
            features = module[:4](images)
            loss = F.cross_entropy(module[4](features) + module[4](features * 2), labels)
            if len(gradients) == 1:
                loss.backward(gradient=torch.tensor(scale))
            else:
                with PythonBackward():
                    loss.backward(gradient=torch.tensor(scale))
        gradients[-1] = [each.grad.clone() for each in module.parameters()]
        module.zero_grad()
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize(
    ("name", "words", "world_size"),
    [
        ("lenet5", ["data.augment.rotation=10"], 1),  # Adam
        ("mnistnet", ["ema_decay=0.99", "data.augment.elastic=1"], 2),  # SGD and batch norm
        ("resnet18", ["ema_decay=0.99", "clip_grad_norm=1", "optimizer.name=adamw"], 1),
        ("lenet5", ["data.augment.crop_padding=2", "data.augment.randaugment=[2,9]", "on_nonfinite=skip"], 1),
        ("lenet5", ["optimizer={name: lion, lr: 1e-4}"], 1),  # the device undoes a bad update
        ("cifar10_quick", [], 1),  # Muon, too; colour images
        ("cifar10", [], 1),  # cutout, too; a layer without gradient
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_the_trainers_step_launches_few_kernels_more_than_the_bare_step(name, words, world_size):
    result = operations.count(load_recipe(name, *words), world_size)
    assert operations.is_within_limits(result), (result["mnist_dist"], result["bare_step"], result["more"])
    assert result["mnist_dist"]["launches"] > result["bare_step"]["launches"] > 30
    assert result["syncs_allowed"] == result["mnist_dist"]["syncs"] == 0


def test_an_optimizer_that_counts_its_steps_on_the_host_waits_once_a_step():
    result = operations.count(load_recipe("lenet5", "optimizer={name: rmsprop, lr: 0.01}"), 1)
    assert result["syncs_allowed"] == result["mnist_dist"]["syncs"] == 1


def test_a_step_with_more_launches_syncs_or_copies_exceeds_the_limits():
    ours = {"launches": 50, "syncs": 0, "copies": 1}
    result = {"mnist_dist": ours, "launches_allowed": 50, "syncs_allowed": 0}
    assert operations.is_within_limits(result)
    for key in ours:
        assert not operations.is_within_limits(result | {"mnist_dist": ours | {key: ours[key] + 1}})


def test_the_command_writes_the_counts(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(operations, "WORLD_SIZES", (1,))
    files = [f"--{kind}={tmp_path / kind}" for kind in ("json", "markdown")]
    assert benchmark.main(["--operations", "lenet5", *files, "ema_decay=0.9"]) == 0
    [result] = json.loads((tmp_path / "json").read_text())["operations"]
    assert result["recipe"] == "lenet5" and "_fused_sgd_" in " ".join(result["more"]), "the average's kernel"
    row = next(line for line in (tmp_path / "markdown").read_text().splitlines() if line.startswith("| lenet5"))
    assert f"{result['bare_step']['launches']:g}" in row and "met" in row
    assert "lenet5" in capsys.readouterr().out
