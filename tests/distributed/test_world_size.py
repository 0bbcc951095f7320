"""A recipe has the same losses, the same evaluation and one run folder at any number of CPU processes."""

from __future__ import annotations

import json
import sys

import pytest

from mnist_dist import load_run
from tests.distributed.training import WITHOUT_TRACKING, relative_deviations, train_in_world
from tests.processes import run_ranks


def test_lenet5_has_the_same_losses_at_every_world_size(tmp_path):
    """With SGD: Adam divides by the size of the gradient, which turns rounding errors near 0 into full steps."""
    # Four batches an epoch: three of 128 samples, which 3 does not divide, and one of two samples.
    words = ["--recipe", "lenet5", "data.dataset=synthetic", "data.limit_train=386", "data.limit_test=200"]
    words += ["batch_size=128", "epochs=5", "log_every=1", "optimizer.name=sgd", "optimizer.lr=0.05"]
    one = train_in_world(1, tmp_path / "1", *words)
    for world_size in (2, 3, 4):
        several = train_in_world(world_size, tmp_path / str(world_size), *words)
        deviations = relative_deviations(one, several)
        assert len(deviations) == 20 and max(deviations) <= 1e-6, (world_size, deviations)
        assert several[-1]["eval/accuracy"] == one[-1]["eval/accuracy"]


def test_evaluation_is_the_same_even_if_outputs_depend_on_the_batch(tmp_path):
    # The learning rate is too small to change the weights: both worlds evaluate the same ones, and batch norm uses the
    # statistics of the evaluated batch.
    words = ["--recipe", "simple_cnn", "data.dataset=synthetic", "data.limit_train=640", "data.limit_test=550"]
    words += ["max_steps=1", "optimizer.lr=1e-12", "eval_batch_size=100"]
    one, three = (train_in_world(size, tmp_path / str(size), *words)[-1] for size in (1, 3))
    assert three["eval/accuracy"] == one["eval/accuracy"]
    assert three["eval/loss"] == pytest.approx(one["eval/loss"], rel=1e-6)


FIGURES = ("images_per_second", "waiting_percent")


def test_two_processes_write_one_run_folder_with_the_speed_of_each(tmp_path):
    train_in_world(2, tmp_path / "run", "--recipe", "debug", "epochs=1")
    run = load_run(tmp_path / "run")
    assert len([line for line in run.metrics if "eval/loss" in line]) == 1
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["world_size"] == 2
    assert run.summary["nodes"] == 1
    for line in run.metrics:
        speeds, waits = ([line.get(f"process/{rank}/{key}") for rank in range(2)] for key in FIGURES)
        if "train/loss" in line:
            assert sum(speeds) == pytest.approx(line["train/images_per_second"], abs=0.1)
            assert all(0 < wait < 100 for wait in waits)
            assert line["train/waiting_percent"] == pytest.approx(sum(waits) / 2, abs=0.02)
        else:
            assert [*speeds, *waits] == [None] * 4
    assert len(run.summary["images_per_second_per_process"]) == 2
    assert all(0 < share < 1 for share in run.summary["communication_share_per_process"])
    assert run.summary["wandb_share"] == 0  # W&B is disabled


ON_A_MACHINE_WITH_A_GPU = """
import runpy, sys
import torch
torch._C._get_accelerator = lambda *_: torch.device("cuda")  # what PyTorch answers where there is a GPU
del sys.argv[0]
runpy.run_module(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    ("module", "words"),
    [("train", ["--run-dir", "run", "epochs=1", *WITHOUT_TRACKING]), ("benchmark", ["--rounds", "1", "--steps", "1"])],
)
def test_processes_on_the_cpu_need_no_gpu_each(tmp_path, module, words):
    command = [f"mnist_dist.{module}", "--recipe", "debug", "data.limit_train=256", "data.limit_test=64", *words]
    run_ranks(2, [sys.executable, "-c", ON_A_MACHINE_WITH_A_GPU, *command], cwd=tmp_path)
