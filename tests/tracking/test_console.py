"""The console of a run, also where its output goes nowhere or cannot show every character."""

import builtins
import errno
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mnist_dist.tracking import ConsoleTracker
from tests.processes import popen

TRAIN = [sys.executable, "-m", "mnist_dist.train", "epochs=1", "max_steps=4", "log_every=2", "tracking.plots=false"]


def test_the_time_left_is_by_the_speed_of_this_process_also_after_a_resume(tmp_path):
    now = 0.0
    tracker = ConsoleTracker(1000, 10, "test", tmp_path / "console.log", quiet=True, clock=lambda: now)
    for step in (720, 740, 760):  # this process resumed at step 700: 20 steps in 40 s
        now += 40.0
        figures = {"train/loss": 0.5, "train/accuracy": 90.0, "train/images_per_second": 64.0}
        tracker.log({"step": step, "epoch": step / 100, **figures})
    tracker.finish()
    lines = (tmp_path / "console.log").read_text().splitlines()
    assert lines == [
        "step 720/1,000  loss 0.5000  acc 90.00 %  64 images/s",
        "step 740/1,000  loss 0.5000  acc 90.00 %  64 images/s  9 min left",
        "step 760/1,000  loss 0.5000  acc 90.00 %  64 images/s  8 min left",
    ]


def test_a_notebook_gets_lines_of_text(tmp_path, monkeypatch, capsys):
    class ZMQInteractiveShell:
        """The class name by which rich knows a notebook."""

    monkeypatch.setattr(builtins, "get_ipython", ZMQInteractiveShell, raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)  # as in a notebook
    tracker = ConsoleTracker(10, 1, "test", tmp_path / "console.log")
    tracker.start()
    tracker.header({"recipe": "debug"})
    tracker.finish()
    assert capsys.readouterr().out == "recipe  debug\n"


def finished(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end; returns its exit code and what it printed into pipes."""
    process = popen(command, stderr=subprocess.PIPE, **options)
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(command, process.wait(), out, err)


def trained(folder: Path, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return finished([*TRAIN, "--recipe", "debug", "--run-dir", str(folder), *words], **options)


def assert_done(folder: Path, done: subprocess.CompletedProcess[str]) -> None:
    assert (done.returncode, done.stderr) == (0, "")
    assert (folder / "STATUS").read_text().strip() == "done"
    assert "epoch 1/1" in (folder / "console.log").read_text(encoding="utf-8")


def test_a_run_whose_output_pipe_is_closed_trains_on(tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = trained(tmp_path / "run", stdout=writing)
    finally:
        os.close(writing)
    assert_done(tmp_path / "run", done)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_run_whose_output_is_on_a_full_disk_trains_on(tmp_path):
    with Path("/dev/full").open("w") as full:
        done = trained(tmp_path / "run", stdout=full)
    assert_done(tmp_path / "run", done)


def test_other_commands_end_quietly_where_nobody_reads():
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "mnist_dist.train", "--list-recipes"]
    done = finished(command, stdout=writing)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_command_whose_output_a_full_disk_does_not_take_fails():
    command = [sys.executable, "-m", "mnist_dist.train", "--list-recipes"]
    with Path("/dev/full").open("w") as full:
        done = finished(command, stdout=full)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert os.strerror(errno.ENOSPC) in done.stderr


def test_characters_that_the_output_lacks_are_replaced_and_the_log_keeps_them(tmp_path):
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = trained(tmp_path / "réseau", "name=réseau", stdout=subprocess.PIPE, env=ascii_only)
    assert_done(tmp_path / "réseau", done)
    assert "r?seau" in done.stdout
    assert "réseau" in (tmp_path / "réseau" / "console.log").read_text(encoding="utf-8")
    command = [sys.executable, "-m", "mnist_dist.train", "--recipe", "réseau"]
    refused = finished(command, stdout=subprocess.PIPE, env=ascii_only)
    assert refused.returncode == 2
    assert "Traceback" not in refused.stderr


def test_train_called_from_a_script_needs_no_working_stdout(tmp_path, monkeypatch):
    class Broken(io.StringIO):
        encoding = "ascii"

        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Broken())
    tracker = ConsoleTracker(10, 1, "test", tmp_path / "console.log")
    tracker.message("réseau \udcff")
    tracker.finish()
    assert (tmp_path / "console.log").read_text(encoding="utf-8") == "réseau \\udcff\n"
