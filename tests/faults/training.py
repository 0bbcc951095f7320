"""The run that is disturbed: its command line, how it is started, and the bytes that it ends with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mnist_dist.engine.checkpoint import list_checkpoints, load_checkpoint
from mnist_dist.run.folder import RunFolder
from tests import processes
from tests.distributed.training import without_times

REPOSITORY = Path(__file__).resolve().parents[2]

# Batch norm, dropout, momentum, averaged weights, augmentation, plateau: everything that has a state.
WORDS = [
    *("data.dataset=synthetic", "data.limit_train=250", "data.limit_test=100", "batch_size=16", "epochs=4"),
    *("log_every=5", "checkpoint.every_steps=7", "ema_decay=0.9", "tracking.wandb.mode=disabled"),
    *("tracking.plots=false", "schedule.name=plateau", "schedule.patience=0", "optimizer.lr=0.05"),
    *(f"schedule.{key}=null" for key in ("max_lr", "pct_start", "anneal_strategy", "div_factor")),
    *("schedule.final_div_factor=null", "schedule.cycle_momentum=null"),
]
STEPS = 4 * 16
EVERY_STATE = ("checkpoint.every_steps=1", "checkpoint.keep=1000")
"""For the undisturbed run: a disturbed run also saves at the step where a signal stops it, and that is compared too."""
VARIABLES = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
OF_THE_LAUNCHER = {"PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"}  # as launch/cpu.sh sets it


COLOUR_WORDS = [
    *("data.dataset=folder", "data.place=disk", "data.image_size=28", "data.limit_train=null", "data.limit_test=null"),
    "data.augment={flip: true, crop_padding: 2, rotation: 7, contrast: 0.2, cutout: 6, cutmix: 1.0}",
]
"""Replace words of `WORDS`: colour images of files, decoded to a memory-mapped file, with mixed labels."""


def use_colour_folder(folder: Path) -> None:
    """Makes a small folder of pictures, and has every later run train from it."""
    generator = np.random.default_rng(0)
    for part, count in (("train", 250), ("test", 100)):
        for number in range(count):
            path = folder / part / f"class{number % 10}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (30, 34, 3), dtype=np.uint8)).save(path)
    WORDS.extend([*COLOUR_WORDS, f"data.root={folder}"])


def command(run_dir: Path, world_size: int = 1, *words: str, module: str = "mnist_dist.train") -> list[str]:
    """Returns a run's command line.

    Args:
        run_dir: the run folder.
        world_size: above 1 the command starts torchrun, as launch/cpu.sh does.
        words: overrides, which replace those of `WORDS`; words with two dashes are options of `accelerate launch`.
        module: the module to run.
    """
    launcher = [sys.executable]
    if world_size > 1:
        options = [word for word in words if word.startswith("--")]
        folder = REPOSITORY / "launch" / "accelerate"
        launcher += [str(folder / "launch.py"), "--quiet", "--config_file", str(folder / "cpu.yaml")]
        launcher += ["--num_processes", str(world_size), *options]
    overrides = [word for word in words if not word.startswith("--")]
    return [*launcher, "-m", module, "--recipe", "model_v1_onecycle", "--run-dir", str(run_dir), *WORDS, *overrides]


def start(line: list[str], **variables: str) -> processes.Process:
    """Starts a training process without a launcher, in a new session; stdout and stderr are one stream."""
    environment = os.environ | VARIABLES | variables
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return processes.popen(line, cwd=REPOSITORY, env=environment, **pipes)


def start_launcher(line: list[str], **variables: str) -> subprocess.Popen[str]:
    """Starts a launcher and its processes in a new session; stdout and stderr are one stream."""
    # A shell lets a background process ignore Ctrl-C, and its children inherit that.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return subprocess.Popen(
        line,
        cwd=REPOSITORY,
        env=os.environ | VARIABLES | OF_THE_LAUNCHER | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(run_dir: Path, world_size: int = 1, *words: str) -> str:
    """Runs the training to its end, without a launcher, and returns what its processes printed.

    Raises:
        AssertionError: a process did not end with exit code 0.
        subprocess.TimeoutExpired: the run took five minutes.
    """
    line, environment = command(run_dir, 1, *words), os.environ | VARIABLES
    if world_size > 1:
        ranks = processes.run_ranks(world_size, line, cwd=REPOSITORY, env=environment)
        return "".join(rank.stdout + rank.stderr for rank in ranks)
    done = processes.run(line, cwd=REPOSITORY, env=environment)
    assert done.returncode == 0, f"exit code {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def wait_for_step(run_dir: Path, step: int, process: processes.Process | subprocess.Popen[str]) -> None:
    """Waits until metrics.jsonl has a line of that step or a later one.

    Raises:
        AssertionError: the process ended before, or two minutes have passed.
    """
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
    """Returns all that must be equal: weights, metrics, figures of the summary, every value of each checkpoint.

    Without times.
    """
    folder = RunFolder(run_dir)
    found: dict[str, Any] = {path.name: path.read_bytes() for path in (folder.last, folder.best)}
    for number, line in enumerate(folder.metrics.read_text().splitlines()):
        found[f"metrics.jsonl, line {number}"] = without_times(json.loads(line))
    summary = json.loads(folder.summary.read_text())
    found["summary.json"] = {
        key: summary[key] for key in summary if key.startswith(("eval.", "train.", "test.", "step"))
    }
    for path in list_checkpoints(folder.checkpoints):
        found |= checkpoint_bytes(path)
    return found


def checkpoint_bytes(path: Path) -> dict[str, Any]:
    """Returns the values of a checkpoint, each by its path in the state.

    Without times, and without the length of metrics.jsonl, which depends on the times.
    """
    state = load_checkpoint(path)
    for key in ("metrics_bytes", "train_seconds"):
        state.pop(key)
    for key in ("train_seconds", "seconds"):
        state["components"]["meter"].pop(key)
    return dict(_leaves(state, path.name))


def _leaves(value: Any, path: str) -> Any:
    """Yields the path and content of a nested value's tensors, numbers and texts, and the length of its containers."""
    if isinstance(value, torch.Tensor):
        yield path, (value.dtype, tuple(value.shape), value.contiguous().numpy().tobytes())
    elif isinstance(value, dict | list | tuple):
        yield path, (type(value).__name__, len(value))
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(part, f"{path}/{key}")
    else:
        yield path, value


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Returns the names of the values that differ. A run keeps only the last few of the expected checkpoints."""
    kept = {name.partition("/")[0] for name in found}
    wanted = {name for name in expected if not name.startswith("step-") or name.partition("/")[0] in kept}
    if not any(name.startswith("step-") for name in found):
        return ["no checkpoint"]
    return sorted(name for name in wanted | found.keys() if found.get(name) != expected.get(name))
