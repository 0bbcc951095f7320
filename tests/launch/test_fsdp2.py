"""FSDP2 through launch/accelerate/fsdp2.yaml: the run of one process, and checkpoints that both can read."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace

import pytest
import torch

from mnist_dist import load_recipe, load_run, train
from mnist_dist.errors import RecipeError
from mnist_dist.run.build import check_world
from tests.launch.launching import LAUNCH, OVERRIDES, WORDS, launch, losses
from tests.processes import run_ranks

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_MIN_NUM_PARAMS": "1000"}
"""Variables that `accelerate launch` sets for the processes."""


def test_sharded_parameters_give_the_run_of_one_process_and_its_checkpoints(tmp_path):
    # Two processes evaluate three batches. The momentum shows whether the optimizer's state is restored.
    words = ["optimizer.momentum=0.9", "clip_grad_norm=1", "data.limit_test=150", "eval_batch_size=64"]
    words += ["checkpoint.every_steps=4", "checkpoint.keep=9", "data.limit_train=null"]
    recipe = load_recipe("lenet5", *OVERRIDES, *words)
    train(recipe, tmp_path / "one process")
    checkpoint = tmp_path / "one process" / "checkpoints" / "step-4"

    launcher = ["python", "-m", "accelerate.commands.launch", "--quiet", "--num_processes", "2"]
    launcher += ["--config_file", LAUNCH / "accelerate" / "fsdp2.yaml", "--fsdp_min_num_params", "1000"]
    launcher += ["-m", "mnist_dist.train"]
    output = launch(*launcher, "--world-size", "2", *WORDS, *words, "--run-dir", tmp_path / "sharded")
    assert "FSDP2" in output

    resume = ["--run-dir", tmp_path / "sharded from one process", "--resume", checkpoint]
    command = [sys.executable, "-m", "mnist_dist.train", *WORDS, *words, *resume]
    assert "FSDP2" in run_ranks(2, command, env=os.environ | FSDP2)[0].stdout

    sharded = tmp_path / "sharded" / "checkpoints" / "step-4"
    train(recipe, tmp_path / "one process from sharded", resume=str(sharded))

    expected = load_run(tmp_path / "one process")
    for name in ("sharded", "sharded from one process", "one process from sharded"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one process"), rel=1e-6)
        found = load_run(tmp_path / name).model.state_dict()
        for key, value in expected.model.state_dict().items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6)


def test_settings_that_need_unsharded_parameters_are_refused(monkeypatch, refused):
    for name, value in FSDP2.items():
        monkeypatch.setenv(name, value)
    two = SimpleNamespace(num_processes=2)
    keys = {"ema_decay": "0.9", "logical_shards": "2", "micro_batch_size": "8", "mixed_precision": "fp16"}
    recipe = load_recipe("lenet5", *(f"{key}={value}" for key, value in keys.items()))
    with pytest.raises(RecipeError) as found:
        check_world(recipe, two)
    assert {problem.key for problem in found.value.problems} == set(keys)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")  # the precision may come from the launcher, too
    with pytest.raises(RecipeError) as found:
        check_world(load_recipe("lenet5"), two)
    assert [problem.key for problem in found.value.problems] == ["mixed_precision"]
    monkeypatch.setenv("FSDP_VERSION", "1")
    assert refused(lambda: check_world(recipe, two)) == [("FSDP_VERSION", "unsupported")]
