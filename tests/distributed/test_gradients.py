"""The sum of gradients over the processes equals that of DistributedDataParallel, in every dtype and with any gaps."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys

import pytest
import torch

from mnist_dist import load_run
from tests.distributed.training import WITHOUT_TRACKING, relative_deviations, train_in_world, training_losses
from tests.processes import run_ranks

SETUP = """
import copy
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from mnist_dist import build_model
from mnist_dist.distributed import devices, gradients
from mnist_dist.distributed.gradients import FlatGradients, GradientClock

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
sent, all_reduce = [], dist.all_reduce

def counted(tensor, **keywords):
    sent.append(tensor)
    return all_reduce(tensor, **keywords)

def deviation(found, expected):
    return float((found - expected).norm() / expected.norm())

dist.all_reduce = counted
generator = torch.Generator().manual_seed(rank)
images, labels = torch.randn(6, 1, 28, 28, generator=generator), torch.arange(6)
"""

AS_DISTRIBUTED_DATA_PARALLEL = """
def compute_gradient(precision, parts, channels_last=True, freeze=False):
    torch.manual_seed(rank)  # the ranks start with different weights and take those of rank 0
    module = build_model("ms_ran", dropout=0.0).train()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    module.to(memory_format=layout)
    next(module.children()).requires_grad_(not freeze)
    torch.manual_seed(rank)
    other = build_model("ms_ran", dropout=0.0).train().to(memory_format=layout)
    next(other.children()).requires_grad_(not freeze)
    other = nn.parallel.DistributedDataParallel(other)
    reduction = FlatGradients(module, precision, False, GradientClock())
    for name, value in other.module.state_dict().items():
        assert torch.equal(module.state_dict()[name], value), name
    sent.clear()
    for number, (x, y) in enumerate(zip(images.chunk(parts), labels.chunk(parts)), start=1):
        other.require_backward_grad_sync = number == parts
        if number == parts:
            reduction.start()
        (F.cross_entropy(module(x), y, reduction="sum") / 6 / world).backward()
        (F.cross_entropy(other(x), y, reduction="sum") / 6).backward()
    early = len(sent)
    reduction.finish()
    pairs = list(zip(module.parameters(), other.parameters()))
    assert all(one.grad is None for one, _ in pairs if not one.requires_grad)
    assert all(one.grad.stride() == one.stride() for one, _ in pairs if one.requires_grad)
    found, expected = (torch.cat([each.grad.flatten() for each in part if each.requires_grad]) for part in zip(*pairs))
    assert deviation(found, expected) < (1e-5 if precision == "none" else 1e-2)
    # The gradients are the same on all ranks, and every buffer was sent once.
    for bucket in reduction.buckets:
        rank_0 = bucket.flat.clone()
        dist.broadcast(rank_0, 0)
        assert torch.equal(bucket.flat, rank_0)
    assert len(sent) == len(reduction.buckets)
    return early, len(sent)

assert compute_gradient("none", 1) == (0, 1)
assert compute_gradient("bf16", 1) == (0, 1)
assert compute_gradient("none", 2, channels_last=False, freeze=True) == (0, 1)
gradients.BUCKET_BYTES = 200_000
early, count = compute_gradient("none", 3)
assert early == count > 3, "every buffer was sent before the end of the backward pass"
early, count = compute_gradient("fp16", 1)
assert early == count > 3

# A process polls only if every thread has a core. Both ways of waiting give the sums.
torch.set_num_threads(1)
polled, poll = [], gradients._poll
gradients._poll = lambda work: polled.append(work) or poll(work)
for cores in (world, world - 1):
    polled.clear()
    devices.count_cores = lambda: cores
    compute_gradient("none", 1)
    assert bool(polled) == (cores == world)
"""


def test_sums_are_those_of_distributed_data_parallel():
    run_ranks(3, [sys.executable, "-c", SETUP + AS_DISTRIBUTED_DATA_PARALLEL])


GAPS = """
class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(784, 10) for _ in range(4))
        self.layers[3].double()

    def forward(self, images, used):
        return sum(self.layers[each](images.flatten(1).to(self.layers[each].weight.dtype)).float() for each in used)

def reduce(used, precision, allows_unused):
    torch.manual_seed(0)
    module = Branches()
    alone = copy.deepcopy(module)
    reduction = FlatGradients(module, precision, allows_unused, GradientClock())
    assert len(reduction.buckets) == (2 if gradients.BUCKET_BYTES > 100_000 else 8)
    reduction.start()
    F.cross_entropy(module(images, used), labels).backward()
    error = ""
    try:
        reduction.finish()
    except RuntimeError as caught:
        error = str(caught)
    F.cross_entropy(alone(images, used), labels).backward()
    for each, other in zip(module.layers, alone.layers):
        expected = torch.zeros_like(each.weight) if other.weight.grad is None else other.weight.grad
        all_reduce(expected)
        if each.weight.grad is None:
            assert not expected.any()
        else:
            assert deviation(each.weight.grad, expected) < (1e-5 if precision == "none" else 1e-2)
    return [each.weight.grad is not None for each in module.layers], error

for gradients.BUCKET_BYTES in (25 * 2**20, 5_000):
    for precision in ("none", "bf16", "fp16"):
        # Rank 0 uses layers 0 and 3, rank 1 uses layers 1 and 3, and no rank uses layer 2.
        assert reduce([rank, 3], precision, True) == ([True, True, False, True], "")
        assert reduce([0, 1, 2, 3], precision, False) == ([True] * 4, "")
    # Layer 2 is missing on rank 1 only: the sums are right on both, and rank 1 says what to do.
    used, error = reduce([0, 1, 2, 3] if rank == 0 else [0, 1, 3], "none", False)
    assert used == [True] * 4
    assert ("layers.2.weight" in error and "ddp.find_unused_parameters" in error) == (rank == 1)
"""


def test_parameters_without_a_gradient_count_as_zero_or_are_refused():
    run_ranks(2, [sys.executable, "-c", SETUP + GAPS])


TWICE = """
gradients.BUCKET_BYTES = 5_000
module = build_model("lenet5")
reduction = FlatGradients(module, "none", False, GradientClock())
reduction.start()
output = module(images)
F.cross_entropy(output, labels).backward(retain_graph=True)
try:
    F.cross_entropy(output, labels).backward()
except RuntimeError as error:
    assert "second gradient" in str(error)
else:
    raise AssertionError("the second gradient was lost")
"""


def test_a_gradient_that_comes_after_its_buffer_was_sent_is_an_error():
    run_ranks(1, [sys.executable, "-c", SETUP + TWICE])


def test_gradients_may_be_sent_in_half_precision(tmp_path):
    words = ["--recipe", "lenet5", "data.dataset=synthetic", "max_steps=5", "log_every=1"]
    words += ["data.limit_train=640", "data.limit_test=100"]
    hooks = ("none", "bf16", "fp16")
    full, *half = (train_in_world(2, tmp_path / name, *words, f"ddp.comm_hook={name}") for name in hooks)
    for metrics in half:
        assert 0 < max(relative_deviations(full, metrics)) < 1e-2


SMALL_BUFFERS = """
import sys
from mnist_dist.distributed import gradients
from mnist_dist.train import main

gradients.BUCKET_BYTES = 20_000
sys.exit(main(sys.argv[1:]))
"""


def test_two_runs_of_three_processes_have_the_same_bytes(tmp_path):
    words = ["--recipe", "model_v1_onecycle", "data.dataset=synthetic", "data.limit_train=104", "data.limit_test=10"]
    words += [
        "batch_size=32",
        "epochs=2",
        "log_every=1",
        "sync_batchnorm=true",
        "micro_batch_size=6",
        *WITHOUT_TRACKING,
    ]
    found = []
    for name in ("1", "2"):
        run_ranks(3, [sys.executable, "-c", SMALL_BUFFERS, "--run-dir", tmp_path / name, *words])
        found.append(hashlib.sha256((tmp_path / name / "last.safetensors").read_bytes()).hexdigest())
    assert found[0] == found[1]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("recipe", ["model_v1_onecycle", "resnet18"])  # one buffer; several buffers
def test_two_gpus_replay_the_eager_steps_and_agree_with_one(tmp_path, recipe):
    words = ["--recipe", recipe, "data.dataset=synthetic", "data.limit_train=2000", "data.limit_test=100"]
    words += [
        "max_steps=12",
        "log_every=1",
        "optimizer.lr=1e-3",
        "tracking.wandb.mode=disabled",
        "tracking.plots=false",
    ]
    losses, weights = {}, {}
    for name, count, capture in (("one", 1, "off"), ("eager", 2, "off"), ("captured", 2, "step")):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
        command = [*launcher, "-m", "mnist_dist.train", "--run-dir", str(tmp_path / name), *words]
        subprocess.run([*command, f"engine.capture={capture}"], check=True, timeout=120)
        losses[name] = training_losses(load_run(tmp_path / name).metrics)
        weights[name] = (tmp_path / name / "last.safetensors").read_bytes()
    assert "engine.capture" not in (tmp_path / "captured" / "console.log").read_text()
    assert weights["captured"] == weights["eager"]
    assert losses["eager"][0] == pytest.approx(losses["one"][0], rel=1e-3)
    assert json.loads((tmp_path / "captured" / "summary.json").read_text())["world_size"] == 2
