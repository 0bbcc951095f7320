"""The number of threads of a CPU process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from mnist_dist.distributed import devices, launcher
from mnist_dist.distributed.devices import choose_threads
from tests.processes import ROOT

ACCELERATE, TORCHRUN = {"ACCELERATE_MIXED_PRECISION": "no"}, {"TORCHELASTIC_RUN_ID": "none"}
SET_TO_ONE = {"OMP_NUM_THREADS": "1"}
"""`accelerate launch` and torchrun set this variable for their processes if the user did not."""


@pytest.mark.parametrize(
    ("variables", "launchers_own", "arguments", "threads"),
    [
        ({}, [], [], [8]),
        ({"OMP_NUM_THREADS": "3"}, [], [], []),
        (ACCELERATE | SET_TO_ONE, [], [], [8]),
        (ACCELERATE | SET_TO_ONE, ["OMP_NUM_THREADS=1"], [], []),
        (ACCELERATE | SET_TO_ONE, [], ["--num_cpu_threads_per_process=2"], []),
        (ACCELERATE | SET_TO_ONE | {"LOCAL_WORLD_SIZE": "2"}, [], [], [4]),
        (TORCHRUN | SET_TO_ONE | {"LOCAL_WORLD_SIZE": "3"}, ["PATH=/bin"], [], [2]),
        (TORCHRUN | SET_TO_ONE, ["OMP_NUM_THREADS=1"], [], []),
        ({"LOCAL_WORLD_SIZE": "16"}, [], [], [1]),
    ],
)
def test_threads_are_a_share_of_the_cores_unless_the_user_set_them(
    variables, launchers_own, arguments, threads, monkeypatch
):
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE", *ACCELERATE, *TORCHRUN):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    chosen = []
    monkeypatch.setattr(devices, "read_proc", lambda pid, file: launchers_own)
    monkeypatch.setattr(launcher, "read_proc", lambda pid, file: arguments)
    monkeypatch.setattr(devices.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(devices.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(devices.psutil, "cpu_count", lambda logical: 8)
    monkeypatch.setattr(devices, "cpu_quota", lambda: None)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    choose_threads(SimpleNamespace(device=torch.device("cpu"), num_processes=1))
    assert chosen == threads


@pytest.mark.parametrize(
    ("group", "files", "quota"),
    [
        ("0::/pod/app", {"pod/app/cpu.max": "400000 100000"}, 4),
        ("0::/pod/app", {"pod/app/cpu.max": "max 100000"}, None),
        ("0::/pod/app", {"pod/app/cpu.max": "max 100000", "pod/cpu.max": "250000 100000"}, 2),
        ("0::/pod/app", {"pod/app/cpu.max": "200000 100000", "pod/cpu.max": "800000 100000"}, 2),
        ("0::/", {"cpu.max": "50000 100000"}, 1),  # in a container, which sees its own group as the root
        ("0::/../../other", {"cpu.max": "300000 100000"}, 3),
        ("0::/pod", {"pod/cpu.max": "nonsense"}, None),
        ("4:cpu,cpuacct:/pod", {"cpu,cpuacct/pod/cpu.cfs_": "300000 100000"}, 3),
        ("4:cpu,cpuacct:/host/id", {"cpu/cpu.cfs_": "600000 100000"}, 6),  # the host's path, absent in the container
        ("4:cpu:/pod", {"cpu/pod/cpu.cfs_": "-1 100000"}, None),
        ("5:cpuset:/pod\n0::/", {}, None),
        (None, {}, None),
    ],
)
def test_the_cpu_quota_is_the_lowest_of_the_control_groups(group, files, quota, tmp_path):
    if group is not None:
        (tmp_path / "proc" / "self").mkdir(parents=True)
        (tmp_path / "proc" / "self" / "cgroup").write_text(f"9:memory:/x\n{group}\n")
    for name, content in files.items():
        path = tmp_path / "sys" / "fs" / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("cpu.max"):
            path.write_text(content + "\n")
        else:
            for part, value in zip(("quota", "period"), content.split(), strict=True):
                path.with_name(f"{path.name}{part}_us").write_text(value + "\n")
    assert devices.cpu_quota(tmp_path) == quota


def test_a_quota_of_four_cpus_on_a_large_machine_gives_four_threads(monkeypatch):
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE", *ACCELERATE, *TORCHRUN):
        monkeypatch.delenv(name, raising=False)
    chosen = []
    monkeypatch.setattr(devices.os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    monkeypatch.setattr(devices.os, "cpu_count", lambda: 64)
    monkeypatch.setattr(devices.psutil, "cpu_count", lambda logical: 32)
    monkeypatch.setattr(devices, "cpu_quota", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    choose_threads(SimpleNamespace(device=torch.device("cpu"), num_processes=1))
    assert chosen == [4]


PROGRAM = """
import torch
from mnist_dist.distributed.devices import choose_threads, device_name
from mnist_dist.distributed.launcher import launched_world
state = launched_world()
choose_threads(state)
print("threads", torch.get_num_threads(), device_name(state.device))
"""


def test_a_process_of_accelerate_launch_uses_all_cores(tmp_path: Path):
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    if cores < 2:
        pytest.skip("this machine has one core")
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--cpu", "--num_processes", "1"]
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [*command, str(tmp_path / "program.py")],
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    expected = max(1, min(cores, psutil.cpu_count(logical=False) or cores, devices.cpu_quota() or cores))
    assert f"threads {expected} " in done.stdout and f"{expected} thread" in done.stdout.partition("cpu (")[2]
