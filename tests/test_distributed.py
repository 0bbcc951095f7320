"""The same recipe on any number of CPU processes: the same losses, the same evaluation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mnist_dist import load_run


def launch(world_size: int, run_dir: Path, *words: str) -> list[dict]:
    """Trains in `world_size` CPU processes of one thread each; returns the metrics."""
    command = [sys.executable, "-m", "mnist_dist.train"]
    if world_size > 1:
        command = [
            *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"),
            *("--num_processes", str(world_size), "--mixed_precision", "no", "--dynamo_backend", "no"),
            *("--main_process_port", "0", "-m", "mnist_dist.train"),
        ]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    command += ["--run-dir", str(run_dir), "tracking.wandb.mode=disabled", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert load_run(run_dir).summary["world_size"] == world_size
    return load_run(run_dir).metrics


def test_lenet5_gives_the_same_losses_at_every_world_size(tmp_path):
    words = [
        "--recipe",
        "lenet5",
        "data.dataset=synthetic",
        "batch_size=128",
        "max_steps=20",
        "log_every=1",
        "epochs=1",
    ]
    alone = launch(1, tmp_path / "1", *words)
    for world_size in (2, 3, 4):  # 128 does not divide by 3
        together = launch(world_size, tmp_path / str(world_size), *words)
        for one, many in zip(alone, together, strict=True):
            key = "train/loss" if "train/loss" in one else "eval/loss"
            assert many[key] == pytest.approx(one[key], rel=1e-6), (world_size, one["step"])
            assert many.get("eval/accuracy") == one.get("eval/accuracy")


def test_a_last_batch_smaller_than_the_world_is_trained_on_exactly(tmp_path):
    # 130 samples in batches of 64: the last batch has two samples for three processes.
    words = ["--recipe", "lenet5", "data.dataset=synthetic", "data.limit_train=130", "batch_size=64", "log_every=1"]
    alone, together = launch(1, tmp_path / "1", *words), launch(3, tmp_path / "3", *words)
    losses = [[line["train/loss"] for line in lines if "train/loss" in line] for lines in (alone, together)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_evaluation_is_equal_to_the_image_where_it_depends_on_the_batch(tmp_path):
    # No update worth the name: both worlds evaluate the same weights, with batch statistics of the evaluated batch.
    words = [
        "--recipe",
        "simple_cnn",
        "data.dataset=synthetic",
        "max_steps=1",
        "optimizer.lr=1e-12",
        "eval_batch_size=100",
    ]
    alone, together = (launch(n, tmp_path / str(n), *words)[-1] for n in (1, 3))
    assert together["eval/accuracy"] == alone["eval/accuracy"]
    assert together["eval/loss"] == pytest.approx(alone["eval/loss"], rel=1e-6)


def test_one_run_folder_and_one_set_of_lines(tmp_path):
    launch(2, tmp_path / "run", "--recipe", "debug", "epochs=1")
    steps = [line["step"] for line in load_run(tmp_path / "run").metrics if "eval/loss" in line]
    assert len(steps) == 1
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["world_size"] == 2
