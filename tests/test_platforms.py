"""Windows and macOS: the package imports and trains without the POSIX-only parts of Python, and refuses the rest."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import ClassVar
from unittest.mock import patch

import pytest
import torch
from accelerate import PartialState

from mnist_dist.distributed import launcher
from mnist_dist.engine import files
from tests.processes import ROOT, run

# Removes from Python what Windows does not have, after the imports of other packages, which bring their own versions.
WINDOWS = """
import importlib, os, pkgutil, signal, sys
import accelerate, matplotlib.pyplot, psutil, torch, torchvision, wandb, yaml
import torch._dynamo, torch.distributed.fsdp

for name in ("SIGUSR1", "SIGUSR2", "SIGHUP", "SIGKILL", "SIGALRM", "SIGCHLD", "SIGQUIT"):
    delattr(signal, name)
for name in ("sched_getaffinity", "sched_yield", "fork", "getuid", "geteuid", "getloadavg", "killpg", "setsid"):
    delattr(os, name)
for name in ("resource", "fcntl", "termios", "pty", "tty", "pwd", "grp"):
    sys.modules[name] = None
for name in [name for name in sys.modules if name.partition(".")[0] == "mnist_dist"]:
    del sys.modules[name]  # the server of test processes has imported the package with them
"""

IMPORTS = """
import mnist_dist
optional = {"lightning", "onnx", "onnxruntime", "onnxscript"}
for module in pkgutil.walk_packages(mnist_dist.__path__, "mnist_dist."):
    try:
        importlib.import_module(module.name)
    except ImportError as error:
        assert error.name and error.name.partition(".")[0] in optional, (module.name, error)
from mnist_dist.distributed.devices import peak_memory
from mnist_dist.distributed.signals import SIGNALS
print([each.name for each in SIGNALS])
"""

TRAINS = """
from mnist_dist.train import main
code = main(["--recipe", "debug", "--run-dir", sys.argv[1], "tracking.wandb.mode=disabled", "tracking.plots=false"])
sys.exit(code)
"""


def on_windows(program: str, *words: object) -> str:
    """Runs a program in a Python without the POSIX-only parts; returns its output."""
    done = run([sys.executable, "-c", WINDOWS + program, *map(str, words)], cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_module_imports_without_posix():
    assert on_windows(IMPORTS).splitlines()[-1] == "['SIGTERM', 'SIGINT']"


def test_a_run_trains_without_posix(tmp_path):
    on_windows(TRAINS, tmp_path / "run")
    assert (tmp_path / "run" / "STATUS").read_text() == "done\n"


def test_windows_flushes_files_but_opens_no_folder(tmp_path, monkeypatch):
    """A folder cannot be opened there, and a file can be flushed only if it is open for writing."""
    opened, real = [], files.os.open

    def windows_open(path: Path, flags: int) -> int:
        assert not path.is_dir()
        assert flags & files.os.O_RDWR
        opened.append(path.name)
        return real(path, flags)

    monkeypatch.setattr(files.sys, "platform", "win32")
    monkeypatch.setattr(files.os, "open", windows_open)
    (tmp_path / "file").write_bytes(b"1")
    files.fsync_path(tmp_path / "file")
    files.fsync_path(tmp_path)
    assert opened == ["file"]


# --- the device that a process trains on --------------------------------------------------------------------------


@pytest.fixture
def world(monkeypatch):
    """Returns the arguments that `launched_world` gives to Accelerate, on a machine with this accelerator."""

    def start(accelerator: str | None, size: int = 1) -> dict:
        given: list[dict] = []
        found = None if accelerator is None else torch.device(accelerator)
        monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: found)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: found is not None)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: accelerator == "mps")
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
        of_ranks = {"RANK": "0", "WORLD_SIZE": str(size), "LOCAL_RANK": "0"} | address
        monkeypatch.setattr(launcher, "read_world", lambda environ: of_ranks if size > 1 else {})
        monkeypatch.setattr(launcher, "join", lambda world: {})

        class State:
            _shared_state: ClassVar[dict] = {}
            num_processes = size

            def __init__(self, **keywords):
                given.append(keywords)

        monkeypatch.setattr(launcher, "PartialState", State)
        launcher.launched_world()
        return given[0]

    PartialState._reset_state()
    with patch.dict(os.environ):  # a process puts the variables of its world there
        yield start


def test_a_mac_trains_on_its_gpu_and_several_processes_of_it_on_the_cpu(world):
    assert not world("mps")["cpu"]
    several = world("mps", 2)
    assert several["cpu"] and several["backend"] == "gloo"


@pytest.mark.parametrize("accelerator", ["cuda", "xpu"])
def test_processes_of_other_accelerators_use_them(world, accelerator):
    several = world(accelerator, 2)
    assert not several["cpu"] and "backend" not in several
    assert world(None, 2)["backend"] == "gloo"


def test_several_processes_on_windows_are_refused(world, monkeypatch, refused):
    monkeypatch.setattr(launcher.sys, "platform", "win32")
    assert refused(lambda: world(None, 2)) == [("WORLD_SIZE", "unsupported")]
