"""What can go wrong while a run trains: it is named, the rest of the world ends, and what was saved stays whole."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from mnist_dist import load_recipe, load_run, train
from mnist_dist.distributed.signals import Interrupts
from mnist_dist.engine.checkpoint import list_checkpoints, load_checkpoint
from mnist_dist.errors import RecipeError, RunError

WORDS = ["data.dataset=synthetic", "data.limit_train=320", "data.limit_test=50", "batch_size=64", "log_every=1"]
WORDS += ["epochs=2", "tracking.wandb.mode=disabled"]

STILL = ["data.augment.rotation=0", "data.augment.translation=0"]


def last_bytes(run_dir: Path) -> bytes:
    return (run_dir / "last.safetensors").read_bytes()


class Breaks(nn.Module):
    """LeNet-like, with batch norm; an image whose first pixel is `at` makes its outputs infinite while `broken`."""

    broken = True

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.norm, self.out = nn.BatchNorm2d(1), nn.Linear(784, num_classes)

    def forward(self, images):
        bad = (images[:, 0, 0, 0] > 100) & Breaks.broken
        return self.out(self.norm(images).flatten(1)) * torch.where(bad, float("inf"), 1.0)[:, None]


@pytest.fixture
def one_bad_image(monkeypatch):
    """Sample 7 of the training set is like no other, and `Breaks` cannot bear it."""
    from mnist_dist.data import Images

    normalize = Images.normalize

    def marked(self, images):
        found = normalize(self, images).clone()
        found[images[:, 0, 0, 0] == 255, 0, 0, 0] = 1000
        return found

    from mnist_dist import train as module

    load = module.load_data

    def load_marked(recipe, state):
        dataset = load(recipe, state)
        dataset.train.images[:, 0, 0, 0] = 0
        dataset.train.images[7, 0, 0, 0] = 255
        return dataset

    monkeypatch.setattr(Images, "normalize", marked)
    monkeypatch.setattr(module, "load_data", load_marked)
    monkeypatch.setattr(Breaks, "broken", True)


@pytest.fixture(params=["host", "device"])
def judge(request, monkeypatch) -> list[str]:
    """Who sees that a gradient is not finite; the device says so at the next log line only, as on a GPU."""
    if request.param == "device":
        from mnist_dist.engine import train_step as module

        monkeypatch.setattr(module, "guards_on_device", lambda optimizer, accelerator: True)
    return ["ema_decay=0.9", *(["log_every=4"] if request.param == "device" else [])]


def test_a_loss_that_is_not_finite_stops_before_the_update_and_names_the_sample(tmp_path, one_bad_image, judge):
    recipe = load_recipe("lenet5", *WORDS, f"model.name={__name__}:Breaks", *STILL, *judge)
    with pytest.raises(RunError) as caught:
        train(recipe, tmp_path / "run")
    message = str(caught.value)
    [saved] = list_checkpoints(tmp_path / "run" / "checkpoints")
    step = int(saved.name.removeprefix("step-"))
    assert f"the gradient of step {step} " in message and "samples 7 is not finite" in message
    assert "rank 0" in message and str(saved) in message
    assert (tmp_path / "run" / "STATUS").read_text() == "failed\n"
    state = load_checkpoint(saved)
    assert all(torch.isfinite(value).all() for value in state["parts"]["model"].values())
    assert torch.isfinite(torch.tensor(state["parts"]["meter"]["sums"])).all()

    Breaks.broken = False  # the cause is gone: the same command ends like a run that never met it
    assert train(recipe, tmp_path / "run")["steps"] == 10
    train(recipe, tmp_path / "whole")
    assert (tmp_path / "run" / "last.safetensors").read_bytes() == (
        tmp_path / "whole" / "last.safetensors"
    ).read_bytes()


def test_a_step_that_is_not_finite_may_be_passed_over(tmp_path, one_bad_image, judge):
    words = [f"model.name={__name__}:Breaks", *STILL, "on_nonfinite=skip", *judge]
    summary = train(load_recipe("lenet5", *WORDS, *words), tmp_path / "run")
    assert summary["skipped_steps"] == 2 and summary["steps"] == 10  # once an epoch
    assert all(torch.isfinite(value).all() for value in load_run(tmp_path / "run").model.state_dict().values())
    # A step that was passed over is no part of the means.
    assert all(line["train/loss"] < 100 for line in load_run(tmp_path / "run").metrics if "train/loss" in line)


class Greedy(nn.Module):
    """Runs out of memory for more than ten images at once, as a GPU says it."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.out = nn.Linear(784, num_classes)

    def forward(self, images):
        if self.training and len(images) > 10:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return self.out(images.flatten(1))


def test_micro_batch_size_auto_halves_until_it_fits_and_says_so(tmp_path, capsys):
    words = [*WORDS, f"model.name={__name__}:Greedy", "max_steps=3"]
    train(load_recipe("lenet5", *words, "micro_batch_size=auto"), tmp_path / "auto")
    assert "micro_batch_size auto: 8 images at once" in capsys.readouterr().out
    train(load_recipe("lenet5", *words, "micro_batch_size=8"), tmp_path / "eight")
    assert (tmp_path / "auto" / "last.safetensors").read_bytes() == (
        tmp_path / "eight" / "last.safetensors"
    ).read_bytes()


def test_a_full_disk_is_named_and_the_last_checkpoint_survives(tmp_path):
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", "mnist_dist.train", "--recipe", "lenet5", "--run-dir", str(run_dir), *WORDS]
    command += ["checkpoint.every_steps=2"]
    # LeNet-5's checkpoint with Adam's two moments takes three quarters of a megabyte, its weights a quarter.
    limits = {"before": 10_000_000, "full": 300_000}
    done = {}
    for name, size in limits.items():
        done[name] = subprocess.run(
            [*command, f"max_steps={3 if name == 'before' else 9}", "--allow-recipe-change"],
            preexec_fn=lambda size=size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        if name == "before":
            assert done[name].returncode == 0, done[name].stderr
            (run_dir / "STATUS").write_text("preempted\n")
    assert done["full"].returncode == 1
    assert "Traceback" not in done["full"].stderr
    assert "state.pt cannot be written: File too large" in done["full"].stderr
    [last] = list_checkpoints(run_dir / "checkpoints")
    assert f"the last checkpoint is {last}" in done["full"].stderr
    assert load_checkpoint(last)["progress"]["step"] == 2
    assert not list(run_dir.glob("**/*.staged"))


# --- from another run's checkpoint --------------------------------------------------------------------------------


def test_a_new_run_begins_from_another_s_checkpoint(tmp_path):
    recipe = load_recipe(
        "debug", "epochs=2", "log_every=1", "checkpoint.every_steps=3", "checkpoint.keep=99", *WORDS[:4]
    )
    train(recipe, tmp_path / "first")
    train(recipe, tmp_path / "second", resume=str(tmp_path / "first" / "checkpoints" / "step-3"))
    assert last_bytes(tmp_path / "second") == last_bytes(tmp_path / "first")
    lines = [[line["step"] for line in load_run(tmp_path / name).metrics] for name in ("first", "second")]
    assert lines[0] == lines[1]

    with pytest.raises(RecipeError, match="batch_size: 64 -> 32"):
        train(load_recipe("debug", *WORDS, "batch_size=32"), tmp_path / "third", resume=str(tmp_path / "first"))
    with pytest.raises(RecipeError, match="holds no checkpoint"):
        train(recipe, tmp_path / "third", resume=str(tmp_path))
    assert not (tmp_path / "third").exists(), "a refusal leaves nothing behind"


# --- signals ------------------------------------------------------------------------------------------------------


def test_a_second_signal_ends_at_once_but_an_echo_of_the_first_does_not(accelerator, monkeypatch):
    ended, now = [], [100.0]
    monkeypatch.setattr("os._exit", ended.append)
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with Interrupts(accelerator) as interrupts:
        assert not interrupts.stop_requested()
        for seconds, number in ((0, signal.SIGINT), (0.5, signal.SIGTERM), (9, signal.SIGUSR1)):
            now[0] += seconds  # Ctrl-C, the launcher that forwards it, the launcher that dies of it
            signal.raise_signal(number)
        assert interrupts.stop_requested() and not ended
        signal.raise_signal(signal.SIGTERM)
    assert ended == [128 + signal.SIGTERM]


# --- a process that hangs -----------------------------------------------------------------------------------------

HANGS = """
import os, signal, sys, time
from mnist_dist.cli import run_command
from mnist_dist.engine.train_step import TrainStep
from mnist_dist.train import main

inputs = TrainStep.inputs
def patience(self, plan, rows):
    self.calls = getattr(self, "calls", 0) + 1
    if self.calls == 6 and self.accelerator.process_index == 1:
        os.kill(os.getpid(), signal.SIGSTOP) if sys.argv[1] == "frozen" else time.sleep(600)
    return inputs(self, plan, rows)
TrainStep.inputs = patience
sys.exit(run_command(lambda: main(sys.argv[2:])))
"""


@pytest.mark.parametrize("how", ["asleep", "frozen"])
def test_a_process_that_hangs_is_named_with_its_stack_and_all_end(how, tmp_path):
    script = tmp_path / "hangs.py"
    script.write_text(HANGS)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words = [*WORDS, "engine.hang_seconds=4"]
    command = [*launcher, str(script), how, "--recipe", "lenet5", "--run-dir", str(tmp_path / "run"), *words]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
    began = time.monotonic()
    with (tmp_path / "errors").open("w") as errors:
        process = subprocess.Popen(command, env=environment, stderr=errors, stdout=subprocess.DEVNULL)
        while "all processes end" not in (message := (tmp_path / "errors").read_text()):
            assert process.poll() is None and time.monotonic() - began < 100, message
            time.sleep(0.2)
        time.sleep(1)
        message = (tmp_path / "errors").read_text()
        if how == "frozen":  # torchrun gives a process that does not answer 30 s; the rest of the world has ended
            subprocess.run(["pkill", "-KILL", "-f", f"{script} frozen"], check=False)
        assert process.wait(timeout=60) == 1 or how == "frozen"
    # Of a frozen process only what it published last is known, up to a second old.
    assert ("is frozen or gone in step" if how == "frozen" else "hangs in step 5") in message
    assert "rank 1 (" in message and ("hangs.py" in message or how == "frozen")
    assert "waiting for it: rank 0" in message
    assert (tmp_path / "run" / "STATUS").read_text() == "failed\n"


# --- Weights & Biases ---------------------------------------------------------------------------------------------


# A user waits 30 s for a server that does not answer; a test need not.
SOONER = """
import sys
from mnist_dist.tracking import wandb as weights_and_biases
from mnist_dist.train import main
weights_and_biases.INIT_SECONDS = 5
sys.exit(main(sys.argv[1:]))
"""


def train_with_wandb(run_dir: Path, **environment: str) -> subprocess.Popen:
    words = [
        "--recipe",
        "debug",
        "data.limit_train=3200",
        "batch_size=32",
        "epochs=3",
        "log_every=1",
        "tracking.wandb.mode=auto",
    ]
    variables = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")} | environment
    command = [sys.executable, "-c", SOONER, *words, "--run-dir", str(run_dir)]
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def losses(run_dir: Path) -> list[float]:
    return [line["train/loss"] for line in map(json.loads, (run_dir / "metrics.jsonl").open()) if "train/loss" in line]


def test_an_unreachable_wandb_costs_nothing_but_a_line(tmp_path):
    process = train_with_wandb(
        tmp_path / "run", WANDB_API_KEY="0" * 40, WANDB_BASE_URL="http://127.0.0.1:9", WANDB_MODE="online"
    )
    output, _ = process.communicate(timeout=150)
    assert process.returncode == 0, output
    assert "this run is logged offline" in output
    assert len(losses(tmp_path / "run")) == 300
    assert list((tmp_path / "run").glob("wandb/offline-run-*/*.wandb")), "there is something for wandb sync"
    assert load_run(tmp_path / "run").summary["wandb_share"] > 0


def test_a_killed_wandb_costs_nothing_but_a_line(tmp_path):
    process = train_with_wandb(tmp_path / "run", WANDB_MODE="offline")
    metrics, began = tmp_path / "run" / "metrics.jsonl", time.monotonic()
    while not (metrics.is_file() and metrics.read_text().count("\n") > 20):
        assert process.poll() is None and time.monotonic() - began < 100
        time.sleep(0.01)
    found = subprocess.run(["pgrep", "-f", f"wandb-core.*--pid {process.pid}"], capture_output=True, text=True)
    for pid in found.stdout.split():
        os.kill(int(pid), signal.SIGKILL)
    output, _ = process.communicate(timeout=150)
    assert found.stdout, "wandb has no service process to kill any more: this test needs another way"
    assert process.returncode == 0, output
    assert len(losses(tmp_path / "run")) == 300
    assert (tmp_path / "run" / "STATUS").read_text() == "done\n"
