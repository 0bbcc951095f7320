"""Synchronized batch norm on CPUs equals batch norm over the global batch."""

from __future__ import annotations

import sys

from tests.distributed.training import relative_deviations, train_in_world
from tests.processes import run_ranks

PROGRAM = """
import torch
import torch.distributed as dist
import torch.nn.functional as F
from mnist_dist import build_model
from mnist_dist.distributed.sync_batchnorm import synchronize_batch_norm

dist.init_process_group("gloo")
torch.set_default_dtype(torch.float64)
expected, synchronized = build_model("ms_ran", dropout=0.0), build_model("ms_ran", dropout=0.0)
for tensor in expected.parameters():
    dist.broadcast(tensor.detach(), 0)
synchronized.load_state_dict(expected.state_dict())
synchronized = synchronize_batch_norm(synchronized, torch.device("cpu"))
generator = torch.Generator().manual_seed(0)
images, labels = torch.randn(7, 1, 28, 28, generator=generator), torch.arange(7)
F.cross_entropy(expected(images), labels, reduction="sum").backward()
rows = [slice(0, 5), slice(5, 7), slice(7, 7)][dist.get_rank()]  # unequal numbers of rows, and no row
F.cross_entropy(synchronized(images[rows]), labels[rows], reduction="sum").backward()
for one, other in zip(expected.parameters(), synchronized.parameters()):
    dist.all_reduce(other.grad)
    torch.testing.assert_close(other.grad, one.grad, rtol=1e-9, atol=1e-9)
for one, other in zip(expected.buffers(), synchronized.buffers()):
    torch.testing.assert_close(other, one)
assert list(synchronized.state_dict()) == list(expected.state_dict())
synchronized.eval(), expected.eval()
torch.testing.assert_close(synchronized(images), expected(images))
"""


def test_gradients_and_buffers_are_those_of_the_global_batch():
    run_ranks(3, [sys.executable, "-c", PROGRAM])


def test_resnet18_has_the_same_losses_in_two_processes(tmp_path):
    # The learning rate of the recipe amplifies rounding differences to 1e-2 within five steps; 1e-5 does not.
    words = ["--recipe", "resnet18", "data.dataset=synthetic", "batch_size=16", "max_steps=8", "log_every=1"]
    words += ["sync_batchnorm=true", "optimizer.lr=1e-5", "engine.channels_last=false"]
    words += ["data.limit_train=320", "data.limit_test=10"]
    one, two = (train_in_world(size, tmp_path / str(size), *words) for size in (1, 2))
    deviations = relative_deviations(one, two)
    assert len(deviations) == 8 and max(deviations) < 1e-4, deviations
