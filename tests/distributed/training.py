"""Trains a recipe in any number of processes and compares the results."""

from __future__ import annotations

import sys
from pathlib import Path

from mnist_dist import load_run
from tests.processes import run, run_ranks

WITHOUT_TRACKING = ["tracking.wandb.mode=disabled", "tracking.plots=false"]


def train_in_world(world_size: int, run_dir: Path, *words: str) -> list[dict]:
    """Trains in `world_size` CPU processes of one thread each; returns the lines of metrics.jsonl."""
    command = [sys.executable, "-m", "mnist_dist.train", "--run-dir", run_dir, *WITHOUT_TRACKING, *words]
    if world_size > 1:
        run_ranks(world_size, command)
    else:
        done = run(command)
        assert done.returncode == 0, done.stdout + done.stderr
    found = load_run(run_dir)
    assert found.summary["world_size"] == world_size
    return found.metrics


def training_losses(metrics: list[dict]) -> list[float]:
    return [line["train/loss"] for line in metrics if "train/loss" in line]


def relative_deviations(expected: list[dict], found: list[dict]) -> list[float]:
    """Returns the relative deviation of every training loss."""
    pairs = zip(training_losses(expected), training_losses(found), strict=True)
    return [abs(other - loss) / loss for loss, other in pairs]


def weights_and_metrics(run_dir: Path) -> tuple[bytes, list[dict]]:
    """Returns the bytes of the last weights and the lines of metrics.jsonl without times."""
    return (run_dir / "last.safetensors").read_bytes(), [without_times(line) for line in load_run(run_dir).metrics]


def without_times(line: dict) -> dict:
    """Returns a line of metrics.jsonl without the figures that depend on times."""
    times = ("train/images_per_second", "train/waiting_percent")
    return {key: value for key, value in line.items() if key not in times and not key.startswith("process/")}
