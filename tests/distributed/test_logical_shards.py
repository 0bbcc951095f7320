"""Logical shards: identical bytes at every world size."""

from __future__ import annotations

import sys

import pytest

from mnist_dist.distributed.logical_shards import branches_of, shards_of
from tests.distributed.training import WITHOUT_TRACKING, train_in_world, weights_and_metrics
from tests.processes import run_ranks

# Batch norm, dropout, augmentation, averaged weights, accumulation, clipping, a short last batch of three samples.
WORDS = ["--recipe", "model_v1_onecycle", "data.dataset=synthetic", "data.limit_train=195", "data.limit_test=30"]
WORDS += ["batch_size=64", "epochs=2", "log_every=2", "ema_decay=0.9", "clip_grad_norm=0.5", "micro_batch_size=5"]

STOP_AFTER_STEP = """
import itertools, os, signal, sys
from mnist_dist.distributed import signals
from mnist_dist.train import main

signals.AGREE_SECONDS = 0  # the ranks exchange stop requests in every step
stop_requested, calls = signals.Interrupts.stop_requested, itertools.count(1)
def stop(self, *arguments):
    if next(calls) == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGTERM)
    return stop_requested(self, *arguments)
signals.Interrupts.stop_requested = stop
assert main(sys.argv[2:]) == signals.PREEMPTED
"""


def test_a_run_has_the_same_bytes_at_every_world_size(tmp_path):
    for world_size in (1, 2, 3, 4):
        train_in_world(world_size, tmp_path / str(world_size), *WORDS, "logical_shards=4")
    found = [weights_and_metrics(tmp_path / name) for name in ("1", "2", "3", "4")]
    assert found[0] == found[1] == found[2] == found[3]

    # A run that changes the world size in the middle of an epoch has the same bytes, too.
    folder = tmp_path / "changed"
    words = ["--run-dir", folder, *WITHOUT_TRACKING, *WORDS, "logical_shards=4"]
    run_ranks(2, [sys.executable, "-c", STOP_AFTER_STEP, "3", *words])
    assert (folder / "STATUS").read_text() == "preempted\n"
    assert (folder / "checkpoints" / "step-3").is_dir()
    train_in_world(1, folder, *WORDS, "logical_shards=4")
    assert weights_and_metrics(folder) == found[0]


def test_shards_may_be_empty(tmp_path):
    # The last batch has three samples for eight shards.
    for world_size in (1, 2):
        train_in_world(world_size, tmp_path / str(world_size), *WORDS, "logical_shards=8")
    assert weights_and_metrics(tmp_path / "1") == weights_and_metrics(tmp_path / "2")


@pytest.mark.parametrize("count", [1, 8, 32])
def test_the_branches_of_all_processes_hold_every_shard_once(count):
    for world_size in range(1, count + 1):
        branches = [node for rank in range(world_size) for node in branches_of(shards_of(count, rank, world_size))]
        held = [shard for height, place in branches for shard in range(place << height, (place + 1) << height)]
        assert held == list(range(count))


def test_a_process_has_one_branch_if_its_shards_are_a_power_of_two():
    assert branches_of(range(4, 8)) == [(2, 1)]
    assert branches_of(range(2, 5)) == [(1, 1), (0, 4)]
    assert branches_of(range(5, 8)) == [(0, 5), (1, 3)]
