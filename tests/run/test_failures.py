"""Failures of a training run: the cause is reported, all processes end, and saved checkpoints stay valid."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from torch import nn

from mnist_dist import load_recipe, load_run, train
from mnist_dist.engine.checkpoint import list_checkpoints, load_checkpoint
from mnist_dist.engine.micro_batch_size import find_micro_batch_size
from mnist_dist.errors import RecipeError, RunError
from tests.faults.training import REPOSITORY, VARIABLES
from tests.processes import Process, popen, run

WORDS = ["data.dataset=synthetic", "data.limit_train=320", "data.limit_test=50", "batch_size=64", "log_every=1"]
WORDS += ["epochs=2", "tracking.wandb.mode=disabled"]

STILL = ["data.augment.rotation=0", "data.augment.translation=0"]


def last_bytes(run_dir: Path) -> bytes:
    return (run_dir / "last.safetensors").read_bytes()


class Breaks(nn.Module):
    """A linear network with batch norm. While `broken`, an image with a first pixel above 100 has infinite outputs."""

    broken = True

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.norm, self.out = nn.BatchNorm2d(1), nn.Linear(784, num_classes)

    def forward(self, images):
        bad = (images[:, 0, 0, 0] > 100) & Breaks.broken
        return self.out(self.norm(images).flatten(1)) * torch.where(bad, float("inf"), 1.0)[:, None]


@pytest.fixture
def one_bad_image(monkeypatch):
    """Gives sample 7 of the training set a first pixel that makes the outputs of `Breaks` infinite."""
    from mnist_dist.data import Images

    normalize = Images.normalize

    def marked(self, images):
        found = normalize(self, images).clone()
        found[images[:, 0, 0, 0] == 255, 0, 0, 0] = 1000
        return found

    from mnist_dist import train as module

    load = module.load_data

    def load_marked(*arguments):
        dataset = load(*arguments)
        dataset.train.images[:, 0, 0, 0] = 0
        dataset.train.images[7, 0, 0, 0] = 255
        return dataset

    monkeypatch.setattr(Images, "normalize", marked)
    monkeypatch.setattr(module, "load_data", load_marked)
    monkeypatch.setattr(Breaks, "broken", True)


@pytest.fixture(params=["host", "device", "device, read behind"])
def guard(request, monkeypatch) -> list[str]:
    """Where a gradient that is not finite is detected. The device reports it at a log line, as on a GPU.

    A GPU's log line is read when the next one begins.
    """
    if request.param != "host":
        monkeypatch.setattr("mnist_dist.engine.train_step.guards_on_device", lambda optimizer, accelerator: True)
    if request.param == "device, read behind":
        monkeypatch.setattr("mnist_dist.engine.metrics.runs_behind", lambda device: True)
        return ["ema_decay=0.9", "log_every=1"]
    return ["ema_decay=0.9", *(["log_every=4"] if request.param == "device" else [])]


def test_a_nonfinite_loss_stops_the_run_before_the_update_and_names_the_sample(tmp_path, one_bad_image, guard):
    recipe = load_recipe("lenet5", *WORDS, f"model.name={__name__}:Breaks", *STILL, *guard)
    with pytest.raises(RunError) as caught:
        train(recipe, tmp_path / "run")
    message = str(caught.value)
    [saved] = list_checkpoints(tmp_path / "run" / "checkpoints")
    step = int(saved.name.removeprefix("step-"))
    assert f"step {step} " in message and "rank 0" in message and "samples 7 " in message
    assert str(saved) in message
    assert (tmp_path / "run" / "STATUS").read_text() == "failed\n"
    assert message in (tmp_path / "run" / "console.log").read_text()
    state = load_checkpoint(saved)
    assert all(torch.isfinite(value).all() for value in state["components"]["model"].values())
    assert torch.isfinite(torch.tensor(state["components"]["meter"]["sums"])).all()

    Breaks.broken = False  # without the cause, the same command gives the weights of a run that never failed
    assert train(recipe, tmp_path / "run")["steps"] == 10
    train(recipe, tmp_path / "undisturbed")
    assert last_bytes(tmp_path / "run") == last_bytes(tmp_path / "undisturbed")


def test_on_nonfinite_skip_skips_the_step(tmp_path, one_bad_image, guard):
    words = [f"model.name={__name__}:Breaks", *STILL, "on_nonfinite=skip", *guard]
    summary = train(load_recipe("lenet5", *WORDS, *words), tmp_path / "run")
    assert summary["skipped_steps"] == 2 and summary["steps"] == 10  # one step per epoch
    trained = load_run(tmp_path / "run", allow_code=__name__)
    assert all(torch.isfinite(value).all() for value in trained.model.state_dict().values())
    # A skipped step does not count in the means.
    assert all(line["train/loss"] < 100 for line in trained.metrics if "train/loss" in line)


class Greedy(nn.Module):
    """Raises the error of a full memory for more than `most` images at once, from its `first` call on."""

    def __init__(
        self, most: int = 10, first: int = 0, evaluated: int = 1000, on_gpu: bool = True, num_classes: int = 10
    ):
        super().__init__()
        self.out, self.calls = nn.Linear(784, num_classes), 0
        self.most, self.first, self.evaluated, self.on_gpu = most, first, evaluated, on_gpu

    def forward(self, images):
        self.calls += 1
        if self.calls > self.first and len(images) > (self.most if self.training else self.evaluated):
            if self.on_gpu:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            torch.empty(2**60)
        return self.out(images.flatten(1))


def test_micro_batch_size_auto_halves_until_it_fits_and_prints_the_size(tmp_path, capsys):
    words = [*WORDS, f"model.name={__name__}:Greedy", "max_steps=3"]
    train(load_recipe("lenet5", *words, "micro_batch_size=auto"), tmp_path / "auto")
    [note] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("micro_batch_size auto")]
    assert " 8 images" in note
    train(load_recipe("lenet5", *words, "micro_batch_size=8"), tmp_path / "eight")
    assert last_bytes(tmp_path / "auto") == last_bytes(tmp_path / "eight")


def test_micro_batch_size_auto_is_refused_if_not_one_image_fits(tmp_path, refused, monkeypatch):
    def find_none(step, plan):
        def full(*arguments, **keywords):
            raise torch.OutOfMemoryError("CUDA out of memory.")

        step.module.forward = full
        return find_micro_batch_size(step, plan)

    monkeypatch.setattr("mnist_dist.run.build.find_micro_batch_size", find_none)
    recipe = load_recipe("lenet5", *WORDS, "micro_batch_size=auto")
    assert refused(lambda: train(recipe, tmp_path / "run")) == [("micro_batch_size", "unsupported")]


@pytest.mark.parametrize("on_gpu", ["true", "false"])
def test_a_full_memory_is_reported_and_the_advice_leads_to_a_finished_run(tmp_path, on_gpu):
    network = [f"model.name={__name__}:Greedy", f"model.on_gpu={on_gpu}", "model.first=3"]
    words = [*WORDS, *network, "max_steps=5", "checkpoint.every_steps=1"]
    with pytest.raises(RunError) as caught:
        train(load_recipe("lenet5", *words), tmp_path / "run")
    message = str(caught.value)
    [last] = list_checkpoints(tmp_path / "run" / "checkpoints")[-1:]
    assert f"full after step {load_checkpoint(last)['progress']['step']}:" in message and str(last) in message
    assert "rank 0" in message and "64 images at once" in message and "500 in evaluation" in message
    assert (tmp_path / "run" / "STATUS").read_text() == "failed\n"
    assert message in (tmp_path / "run" / "console.log").read_text()
    size = 64
    while size > 10:  # the advice, repeated
        advised = f"micro_batch_size={size // 2}"
        assert advised in message
        try:
            summary = train(load_recipe("lenet5", *words, advised), tmp_path / "run", allow_recipe_change=True)
        except RunError as error:
            message = str(error)
        size //= 2
    assert summary["steps"] == 5


def test_a_full_memory_in_an_evaluation_is_reported_and_a_smaller_eval_batch_size_helps(tmp_path):
    words = [*WORDS, f"model.name={__name__}:Greedy", "model.most=1000", "model.evaluated=20", "max_steps=2"]
    with pytest.raises(RunError, match=r"after step 2: .*\n.*50 in evaluation.*\n.*eval_batch_size"):
        train(load_recipe("lenet5", *words, "eval_batch_size=50"), tmp_path / "run")
    words.append("eval_batch_size=20")
    assert train(load_recipe("lenet5", *words), tmp_path / "run", allow_recipe_change=True)["steps"] == 2


# --- a full disk --------------------------------------------------------------------------------------------------

LIMITED = """
import resource, sys
from mnist_dist.cli import run_command
from mnist_dist.train import main

size = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
sys.exit(run_command(lambda: main(sys.argv[2:])))
"""


def test_a_full_disk_is_reported_and_the_last_checkpoint_stays_valid(tmp_path):
    run_dir = tmp_path / "run"
    words = ["--recipe", "lenet5", "--run-dir", run_dir, *WORDS, "checkpoint.every_steps=2", "tracking.plots=false"]

    def train_with_limit(size: int, steps: int):
        command = [sys.executable, "-c", LIMITED, size, *words, f"max_steps={steps}", "--allow-recipe-change"]
        return run(command, cwd=REPOSITORY, env=os.environ | VARIABLES)

    # LeNet-5's checkpoint with Adam's two moments takes three quarters of a megabyte, its weights a quarter.
    before = train_with_limit(10_000_000, 3)
    assert before.returncode == 0, before.stderr
    (run_dir / "STATUS").write_text("preempted\n")
    full = train_with_limit(300_000, 9)
    assert full.returncode == 1
    assert "Traceback" not in full.stderr
    *_, last = list_checkpoints(run_dir / "checkpoints")
    assert "state.pt" in full.stderr and os.strerror(errno.EFBIG) in full.stderr and str(last) in full.stderr
    assert load_checkpoint(last)["progress"]["step"] == 3
    assert not list(run_dir.glob("**/*.staged"))


# --- from another run's checkpoint --------------------------------------------------------------------------------


def test_a_new_run_starts_from_another_run_s_checkpoint(tmp_path, refused):
    recipe = load_recipe(
        "debug", "epochs=2", "log_every=1", "checkpoint.every_steps=3", "checkpoint.keep=99", *WORDS[:4]
    )
    first, third = tmp_path / "first", tmp_path / "third"
    train(recipe, first)
    train(recipe, tmp_path / "second", resume=str(first / "checkpoints" / "step-3"))
    assert last_bytes(tmp_path / "second") == last_bytes(first)
    lines = [[line["step"] for line in load_run(tmp_path / name).metrics] for name in ("first", "second")]
    assert lines[0] == lines[1]

    other = load_recipe("debug", *WORDS, "batch_size=32")
    with pytest.raises(RecipeError, match="batch_size: 64 -> 32") as caught:
        train(other, third, resume=str(first))
    assert [(problem.key, problem.kind) for problem in caught.value.problems] == [("--resume", "conflict")]
    assert refused(lambda: train(recipe, third, resume=str(tmp_path))) == [("--resume", "missing")]
    assert refused(lambda: train(recipe, third, resume=str(first / "checkpoints/step-4"))) == [("--resume", "missing")]
    (first / "checkpoints" / "step-3" / "state.pt").write_bytes(b"")
    step_3 = str(first / "checkpoints" / "step-3")
    assert refused(lambda: train(recipe, third, resume=step_3)) == [("--resume", "damaged")]
    assert not third.exists(), "a refusal must not create a folder"


# --- Weights & Biases ---------------------------------------------------------------------------------------------

# Shortens the 30 s that a run waits for a server that does not answer.
SOONER = """
import sys
from mnist_dist.tracking import wandb as weights_and_biases
from mnist_dist.train import main
weights_and_biases.SETTINGS["init_timeout"] = 5
sys.exit(main(sys.argv[1:]))
"""


def train_with_wandb(run_dir: Path, **environment: str) -> Process:
    words = ["data.limit_train=3200", "batch_size=32", "epochs=3", "log_every=1", "tracking.wandb.mode=auto"]
    variables = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")} | environment
    command = [sys.executable, "-c", SOONER, "--recipe", "debug", *words, "tracking.plots=false", "--run-dir", run_dir]
    return popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def losses(run_dir: Path) -> list[float]:
    return [line["train/loss"] for line in load_run(run_dir).metrics if "train/loss" in line]


def test_a_run_logs_offline_if_wandb_cannot_be_reached(tmp_path):
    process = train_with_wandb(
        tmp_path / "run", WANDB_API_KEY="0" * 40, WANDB_BASE_URL="http://127.0.0.1:9", WANDB_MODE="online"
    )
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "wandb" in output and "offline" in output
    assert len(losses(tmp_path / "run")) == 300
    assert list((tmp_path / "run").glob("wandb/offline-run-*/*.wandb")), "there is something for wandb sync"
    assert load_run(tmp_path / "run").summary["wandb_share"] > 0


def test_a_run_continues_if_wandb_is_killed(tmp_path):
    process = train_with_wandb(tmp_path / "run", WANDB_MODE="offline")
    metrics, began = tmp_path / "run" / "metrics.jsonl", time.monotonic()
    while not (metrics.is_file() and metrics.read_text().count("\n") > 20):
        assert process.poll() is None and time.monotonic() - began < 120
        time.sleep(0.01)
    services = [each for each in psutil.process_iter() if is_wandb_service(each, process.pid)]
    for each in services:
        each.kill()
    output, _ = process.communicate(timeout=300)
    assert services, "wandb has no service process that this test could kill"
    assert process.returncode == 0, output
    assert len(losses(tmp_path / "run")) == 300
    assert (tmp_path / "run" / "STATUS").read_text() == "done\n"


def is_wandb_service(process: psutil.Process, pid: int) -> bool:
    try:
        words = process.cmdline()
    except psutil.Error:
        return False
    return any("wandb-core" in word for word in words) and str(pid) in words


LOST = "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.1]:29400"


@pytest.mark.parametrize("restarts", ["0", "3"])
def test_the_loss_of_another_process_is_a_line_if_the_launcher_starts_all_again(restarts, tmp_path, monkeypatch):
    """Otherwise it stays an error with a traceback, which may be the only trace of the cause."""
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)

    def lose(*arguments: object) -> None:
        raise RuntimeError(LOST)

    monkeypatch.setattr("mnist_dist.engine.train_step.TrainStep.__call__", lose)
    recipe = load_recipe("debug", "tracking.plots=false", "tracking.wandb.mode=disabled")
    with pytest.raises((RuntimeError, RunError)) as caught:
        train(recipe, tmp_path / "run")
    assert isinstance(caught.value, RunError) == (restarts != "0")
    assert "step 0" in str(caught.value) or restarts == "0"
    assert (tmp_path / "run" / "STATUS").read_text() == "failed\n"
