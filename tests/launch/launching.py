"""Runs launch scripts with the programs, the device and the threads of the tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from mnist_dist import load_run
from tests.processes import forked_python

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
TRAINJOB = yaml.safe_load((LAUNCH / "kubernetes" / "trainjob.yaml").read_text())

# With SGD: Adam amplifies the rounding of gradients near 0, which differs between world sizes.
OVERRIDES = [
    *("data.dataset=synthetic", "data.limit_train=640", "data.limit_test=200", "batch_size=64", "max_steps=10"),
    *("log_every=1", "tracking.wandb.mode=disabled", "tracking.plots=false"),
    *("optimizer.name=sgd", "optimizer.lr=0.05"),
]
WORDS = ["--recipe", "lenet5", *OVERRIDES]


INSTALLED = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
"""PATH with the `python` of the tests. For a test of what happens while a process starts, or of another network."""


def environment(*first_in_path: Path, **variables: str) -> dict[str, str]:
    """Returns the environment of a launch script, whose `python` is `forked_python`.

    Args:
        first_in_path: folders whose programs replace those of the system.
    """
    path = [*map(str, first_in_path), str(forked_python().parent), INSTALLED]
    settings = {"PATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return os.environ | settings | variables


@contextmanager
def started(*command: str | Path, **variables: str) -> Iterator[subprocess.Popen]:
    """Starts a command. If the test fails before it ends, ends it and its workers with SIGTERM."""
    process = subprocess.Popen(
        list(map(str, command)),
        env=environment() | variables,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def finish(process: subprocess.Popen, expected: int = 0) -> str:
    """Waits for the end of a process and checks its exit code; returns its output."""
    output, _ = process.communicate(timeout=300)
    assert process.returncode == expected, f"exit code {process.returncode}\n{output}"
    return output


def launch(*command: str | Path, **variables: str) -> str:
    """Runs a command that must succeed; returns its output."""
    with started(*command, **variables) as process:
        return finish(process)


def wait_for_lines(run_dir: Path, count: int, process: subprocess.Popen) -> None:
    """Waits until metrics.jsonl has this number of lines."""
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        file = run_dir / "metrics.jsonl"
        if file.is_file() and file.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.01)
    raise AssertionError(f"step {count} was not reached:\n{process.stdout.read() if process.poll() else ''}")


def executable(path: Path, text: str) -> None:
    """Writes an executable script."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def losses(run_dir: Path) -> list[float]:
    """Returns the loss of every line of metrics.jsonl."""
    return [line.get("train/loss", line.get("eval/loss")) for line in load_run(run_dir).metrics]
