"""The run that is disturbed: its command, how it is started, and the bytes that it ends in."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from mnist_dist.engine.checkpoint import list_checkpoints, load_checkpoint
from mnist_dist.run.folder import RunFolder

REPOSITORY = Path(__file__).resolve().parents[2]

# Batch norm, dropout, momentum, averaged weights, augmentation, plateau: everything that has a state.
WORDS = [
    *("data.dataset=synthetic", "data.limit_train=1000", "data.limit_test=200", "batch_size=64", "epochs=4"),
    *("log_every=5", "checkpoint.every_steps=7", "ema_decay=0.9", "tracking.wandb.mode=disabled"),
    *("schedule.name=plateau", "schedule.patience=0", "optimizer.lr=0.05"),
    *(f"schedule.{key}=null" for key in ("max_lr", "pct_start", "anneal_strategy", "div_factor")),
    *("schedule.final_div_factor=null", "schedule.cycle_momentum=null"),
]
STEPS = 4 * 16
EVERY_STATE = ("checkpoint.every_steps=1", "checkpoint.keep=1000")
"""For the undisturbed run: a disturbed one also saves where it was asked to stop, and that is compared too."""


def command(run_dir: Path, world_size: int = 1, *words: str, module: str = "mnist_dist.train") -> list[str]:
    """A run's command line; `words` come last and win, but for torchrun's own, which begin with two dashes."""
    launcher = [sys.executable]
    if world_size > 1:
        options = [word for word in words if word.startswith("--")]
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}", *options]
    overrides = [word for word in words if not word.startswith("--")]
    return [*launcher, "-m", module, "--recipe", "model_v1_onecycle", "--run-dir", str(run_dir), *WORDS, *overrides]


def start(line: list[str], **variables: str) -> subprocess.Popen[str]:
    """Starts a command in a session of its own, with what it says kept in one stream."""
    # A shell starts what it puts into the background deaf to Ctrl-C, and a child inherits that.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return subprocess.Popen(
        line,
        cwd=REPOSITORY,
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(run_dir: Path, world_size: int = 1, *words: str) -> str:
    """Runs the command to its end; returns what it said.

    Raises:
        AssertionError: it ended otherwise than with 0, or took five minutes.
    """
    process = start(command(run_dir, world_size, *words))
    try:
        output, _ = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        raise AssertionError("the run was not at its end after five minutes") from None
    finally:
        process.kill()  # does nothing where it has ended
    assert process.returncode == 0, f"exit code {process.returncode}:\n{output}"
    return output


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Until metrics.jsonl tells of that step."""
    deadline, metrics = time.monotonic() + 120, run_dir / "metrics.jsonl"
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.is_file():
            lines = metrics.read_text().splitlines(keepends=True)
            if any(json.loads(line)["step"] >= step for line in lines if line.endswith("\n")):
                return
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached")


# --- what is compared ---------------------------------------------------------------------------------------------


def bytes_of(run_dir: Path) -> dict[str, Any]:
    """All that must be equal, times aside: weights, metrics, the summary's figures, every value of each checkpoint."""
    folder = RunFolder(run_dir)
    found: dict[str, Any] = {path.name: path.read_bytes() for path in (folder.last, folder.best)}
    for number, line in enumerate(folder.metrics.read_text().splitlines()):
        found[f"metrics.jsonl, line {number}"] = json.loads(line) | {"train/images_per_second": None}
    summary = json.loads(folder.summary.read_text())
    found["summary.json"] = {
        key: summary[key] for key in summary if key.startswith(("eval.", "train.", "test.", "step"))
    }
    for path in list_checkpoints(folder.checkpoints):
        found |= checkpoint_bytes(path)
    return found


def checkpoint_bytes(path: Path) -> dict[str, Any]:
    """The values of a checkpoint, each under its place in it; times, and the metrics' length, which tells them."""
    state = load_checkpoint(path)
    for key in ("metrics_bytes", "train_seconds"):
        state.pop(key)
    state["parts"]["meter"].pop("train_seconds")
    return dict(_leaves(state, path.name))


def _leaves(value: Any, place: str) -> Any:
    if isinstance(value, torch.Tensor):
        yield place, (value.dtype, tuple(value.shape), value.contiguous().numpy().tobytes())
    elif isinstance(value, dict | list | tuple):
        yield place, (type(value).__name__, len(value))
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(part, f"{place}/{key}")
    else:
        yield place, value


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """The places at which a run's bytes differ. Of the expected checkpoints a run keeps only the last few."""
    kept = {place.partition("/")[0] for place in found}
    wanted = {place for place in expected if not place.startswith("step-") or place.partition("/")[0] in kept}
    if not any(place.startswith("step-") for place in found):
        return ["no checkpoint"]
    return sorted(place for place in wanted | found.keys() if found.get(place) != expected.get(place))
