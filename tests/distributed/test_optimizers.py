"""Muon and Lion in several processes: logical shards give identical bytes, sharded parameters the same training."""

from __future__ import annotations

import os
import sys

import pytest

from mnist_dist import load_recipe, load_run, train
from tests.distributed.training import (
    WITHOUT_TRACKING,
    relative_deviations,
    train_in_world,
    weights_and_metrics,
)
from tests.processes import run_ranks

DATA = ["data.dataset=synthetic", "data.limit_train=320", "data.limit_test=64", "batch_size=64"]
DATA += ["max_steps=6", "log_every=1"]  # one evaluation batch: the second process has none
OPTIMIZERS = {
    "muon": ["optimizer.name=muon", "optimizer.lr=0.02", "optimizer.adamw_lr_ratio=0.05"],
    "lion": ["optimizer.name=lion", "optimizer.lr=0.0003", "optimizer.weight_decay=0.1"],
}
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_MIN_NUM_PARAMS": "1000"}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_logical_shards_give_identical_bytes(name, tmp_path):
    words = ["--recipe", "lenet5", *DATA, *OPTIMIZERS[name], "logical_shards=2"]
    for world_size in (1, 2):
        train_in_world(world_size, tmp_path / str(world_size), *words)
    assert weights_and_metrics(tmp_path / "1") == weights_and_metrics(tmp_path / "2")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_sharded_parameters_train_as_whole_ones_and_resume(name, tmp_path):
    words = [*DATA, *OPTIMIZERS[name], "checkpoint.every_steps=3", "checkpoint.keep=9"]
    recipe = load_recipe("lenet5", *WITHOUT_TRACKING, *words)
    train(recipe, tmp_path / "whole")
    command = [sys.executable, "-m", "mnist_dist.train", "--recipe", "lenet5", *WITHOUT_TRACKING, *words]
    found = run_ranks(2, [*command, "--run-dir", tmp_path / "sharded"], env=os.environ | FSDP2)
    assert "FSDP2" in found[0].stdout

    checkpoint = tmp_path / "sharded" / "checkpoints" / "step-3"
    train(recipe, tmp_path / "whole from sharded", resume=str(checkpoint))
    checkpoint = tmp_path / "whole" / "checkpoints" / "step-3"
    run_ranks(
        2, [*command, "--run-dir", tmp_path / "sharded from whole", "--resume", checkpoint], env=os.environ | FSDP2
    )

    expected = load_run(tmp_path / "whole")
    for folder in ("sharded", "whole from sharded", "sharded from whole"):
        run = load_run(tmp_path / folder)
        # Rounding is amplified: Muon iterates in bfloat16, and Lion's sign turns a number near 0 into a complete step.
        assert max(relative_deviations(expected.metrics, run.metrics)) < 1e-3, folder
        for key, value in expected.model.state_dict().items():
            difference = (run.model.state_dict()[key] - value).abs()
            assert difference.mean() < 0.02 * value.abs().mean() + 1e-4, (folder, key)
