"""A run that was killed, signalled or damaged goes on as if nothing had happened: compared byte for byte."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mnist_dist import load_recipe, train
from mnist_dist.engine.checkpoint import list_checkpoints, load_checkpoint, newest_checkpoint, save_checkpoint
from mnist_dist.engine.interrupts import PREEMPTED
from mnist_dist.recipe_file import RecipeError
from mnist_dist.runs import RunFolder

# Batch norm, dropout, momentum, averaged weights, augmentation, plateau: everything that has a state.
WORDS = [
    *("data.dataset=synthetic", "data.limit_train=1000", "data.limit_test=200", "batch_size=64", "epochs=4"),
    *("log_every=5", "checkpoint.every_steps=7", "ema_decay=0.9", "tracking.wandb.mode=disabled"),
    *("schedule.name=plateau", "schedule.patience=0", "optimizer.lr=0.05"),
    *(f"schedule.{key}=null" for key in ("max_lr", "pct_start", "anneal_strategy", "div_factor")),
    *("schedule.final_div_factor=null", "schedule.cycle_momentum=null"),
]
STEPS = 4 * 16


def command(run_dir: Path, world_size: int = 1) -> list[str]:
    launcher = [sys.executable]
    if world_size > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"]
    return [*launcher, "-m", "mnist_dist.train", "--recipe", "model_v1_onecycle", "--run-dir", str(run_dir), *WORDS]


def start(run_dir: Path, world_size: int = 1) -> subprocess.Popen:
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command(run_dir, world_size),
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def finish(run_dir: Path, world_size: int = 1) -> None:
    process = start(run_dir, world_size)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen) -> None:
    """Until metrics.jsonl tells of that step."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        metrics = run_dir / "metrics.jsonl"
        if metrics.is_file() and any(json.loads(line)["step"] >= step for line in whole_lines(metrics)):
            return
        time.sleep(0.01)
    if process.poll() is None:
        raise AssertionError(f"step {step} was not reached")


def whole_lines(metrics: Path) -> list[str]:
    return [line for line in metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]


def bytes_of(run_dir: Path) -> dict[str, object]:
    """All that must be equal: weights, the last checkpoint's tensors, and the metrics but for times."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("train/images_per_second", None)
    folder = RunFolder(run_dir)
    return {"last": folder.last.read_bytes(), "best": folder.best.read_bytes(), "metrics": lines}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, object]:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(run_dir)
    return bytes_of(run_dir)


def test_killed_again_and_again_it_ends_in_the_same_bytes(tmp_path, undisturbed):
    run_dir, generator = tmp_path / "run", random.Random(0)
    for step in (5, 20, 35, 50):
        process = start(run_dir)
        wait_for_step(run_dir, step, process)
        time.sleep(generator.uniform(0, 0.05))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    finish(run_dir)
    assert bytes_of(run_dir) == undisturbed


def test_killed_in_two_processes_it_ends_in_the_same_bytes(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(whole, world_size=2)
    process = start(killed, world_size=2)
    wait_for_step(killed, 30, process)
    os.killpg(process.pid, signal.SIGKILL)  # the launcher; its workers die with it, or are killed below
    subprocess.run(["pkill", "-9", "-f", str(killed)], check=False)
    process.wait()
    finish(killed, world_size=2)
    assert bytes_of(killed) == bytes_of(whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_the_same_command_goes_on(number, tmp_path, undisturbed):
    run_dir = tmp_path / "run"
    process = start(run_dir)
    wait_for_step(run_dir, 20, process)
    process.send_signal(number)
    asked = time.monotonic()
    assert process.wait(timeout=60) == PREEMPTED
    assert time.monotonic() - asked < 10
    assert (run_dir / "STATUS").read_text() == "preempted\n"
    finish(run_dir)
    assert bytes_of(run_dir) == undisturbed


def test_a_signal_to_the_launcher_of_one_process_reaches_the_trainer(tmp_path):
    run_dir = tmp_path / "run"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *command(run_dir)[1:]]
    process = subprocess.Popen(launcher, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    wait_for_step(run_dir, 10, process)
    process.terminate()
    process.wait(timeout=60)
    deadline = time.monotonic() + 10
    while (run_dir / "STATUS").read_text() == "running\n" and time.monotonic() < deadline:
        time.sleep(0.1)
    assert (run_dir / "STATUS").read_text() == "preempted\n"


def test_another_world_size_goes_on_with_the_same_samples(tmp_path, undisturbed):
    run_dir = tmp_path / "run"
    process = start(run_dir)
    wait_for_step(run_dir, 20, process)
    process.terminate()
    assert process.wait(timeout=60) == PREEMPTED
    finish(run_dir, world_size=2)
    steps = [(line["step"], line["epoch"], line.get("train/lr")) for line in bytes_of(run_dir)["metrics"]]
    before = [(line["step"], line["epoch"], line.get("train/lr")) for line in undisturbed["metrics"]]
    assert [each[:2] for each in steps] == [each[:2] for each in before]


# --- checkpoints on disk ------------------------------------------------------------------------------------------

DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-10]),
    "one bit": lambda path: path.write_bytes(path.read_bytes()[:500] + b"\xff" + path.read_bytes()[501:]),
    "empty": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"0"),
    "another file": lambda path: path.write_bytes(b"PK\x03\x04" + bytes(5000)),
    "gone": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["state.pt", "manifest.json"])
def test_a_damaged_checkpoint_is_named_set_aside_and_the_one_before_it_used(damage, name, tmp_path):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"step": step, "weights": torch.full((1000,), float(step))}, keep=2)
    DAMAGES[damage](tmp_path / "step-2" / name)
    state, [problem] = newest_checkpoint(tmp_path)
    assert state is not None and state["step"] == 1
    assert "step-2" in problem and "set aside" in problem
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-1"]
    assert list(tmp_path.glob("damaged-step-2-*")), "nothing is thrown away that somebody may want to look at"


def test_a_pickle_with_code_in_it_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "harm"),))

    save_checkpoint(tmp_path, 1, {"step": Evil()}, keep=1)
    with pytest.raises(ValueError, match="step-1"):
        load_checkpoint(tmp_path / "step-1")
    assert not (tmp_path / "harm").exists()


def test_an_old_checkpoint_goes_only_after_its_successor_is_there(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, {"step": 1}, keep=1)

    def full(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr("torch.save", full)
        save_checkpoint(tmp_path, 2, {"step": 2}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    save_checkpoint(tmp_path, 3, {"step": 3}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-3"]


# --- whose run is it? ---------------------------------------------------------------------------------------------


def test_a_whole_checkpoint_of_the_same_step_is_never_taken_away(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, {"step": 1}, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda path, **keywords: pytest.fail(f"{path} was deleted"))
        save_checkpoint(tmp_path, 1, {"step": 1}, keep=1)
    (tmp_path / "step-1" / "state.pt").write_bytes(b"")
    save_checkpoint(tmp_path, 1, {"step": 1}, keep=1)
    assert load_checkpoint(tmp_path / "step-1") == {"step": 1}


def test_another_recipe_is_refused_with_the_difference_unless_allowed(tmp_path, monkeypatch):
    words = ["data.limit_train=200", "data.limit_test=50", "tracking.wandb.mode=disabled"]
    recipe = load_recipe("debug", *words)
    monkeypatch.setattr("mnist_dist.train.fit", lambda *arguments: False)  # as if asked to stop at once
    train(recipe, tmp_path / "run")
    with pytest.raises(RecipeError, match=r"batch_size: 128 -> 64"):
        train(load_recipe("debug", *words, "batch_size=64"), tmp_path / "run")
    train(load_recipe("debug", *words, "checkpoint.keep=5"), tmp_path / "run")  # changes no result
    train(load_recipe("debug", *words, "batch_size=64"), tmp_path / "run", allow_recipe_change=True)
    with pytest.raises(RecipeError, match="never overwritten"):
        train(recipe, tmp_path / "run", resume="never")


def test_a_finished_run_is_not_trained_again(tmp_path):
    recipe = load_recipe("debug", "data.limit_train=200", "data.limit_test=50", "tracking.wandb.mode=disabled")
    train(recipe, tmp_path / "run")
    with pytest.raises(RecipeError, match="done already"):
        train(recipe, tmp_path / "run")
