"""The number of threads of a CPU process, and what devices can do."""

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
from mnist_dist.distributed.devices import (
    emulates_bf16,
    peak_memory,
    share_cores,
    sum_dtype,
    supports_precision,
    unused_gpu,
)
from mnist_dist.machine import limits
from mnist_dist.machine.limits import count_cores
from tests.processes import ROOT, run

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
    monkeypatch.setattr(limits, "cpu_quota", lambda: None)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    share_cores(SimpleNamespace(device=torch.device("cpu"), num_processes=1))
    assert chosen == threads


def test_a_quota_of_four_cpus_on_a_large_machine_gives_four_threads(monkeypatch):
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE", *ACCELERATE, *TORCHRUN):
        monkeypatch.delenv(name, raising=False)
    chosen = []
    monkeypatch.setattr(devices.os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    monkeypatch.setattr(devices.os, "cpu_count", lambda: 64)
    monkeypatch.setattr(devices.psutil, "cpu_count", lambda logical: 32)
    monkeypatch.setattr(limits, "cpu_quota", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    share_cores(SimpleNamespace(device=torch.device("cpu"), num_processes=1))
    assert chosen == [4]


POLICIES = """
import os, threading, time
from types import SimpleNamespace
import torch
from mnist_dist.distributed import devices
devices.count_cores = lambda: 2
torch.set_num_threads(1)
started_before = threading.Thread(target=time.sleep, args=(60,), daemon=True)
started_before.start()
for device, processes in (("cpu", 1), ("cuda", 4), ("cpu", 2), ("cpu", 3)):
    devices.share_cores(SimpleNamespace(device=torch.device(device), num_processes=processes))
    policies = {os.sched_getscheduler(int(thread)) for thread in os.listdir("/proc/self/task")}
    assert policies == {os.SCHED_BATCH if (device, processes) == ("cpu", 3) else os.SCHED_OTHER}, (device, processes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has SCHED_BATCH")
def test_processes_that_outnumber_the_cores_compute_in_longer_turns():
    environment = {name: value for name, value in os.environ.items() if name != "LOCAL_WORLD_SIZE"}
    done = run([sys.executable, "-c", POLICIES], env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has SCHED_BATCH")
def test_a_container_that_forbids_the_policy_does_not_stop_the_run(monkeypatch):
    def forbid(*arguments: object) -> None:
        raise PermissionError

    monkeypatch.setattr(devices.os, "sched_setscheduler", forbid)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # this process keeps its threads
    devices.share_cores(SimpleNamespace(device=torch.device("cpu"), num_processes=10_000))


PROGRAM = """
import torch
from mnist_dist.distributed.devices import device_name, share_cores
from mnist_dist.distributed.launcher import launched_world
state = launched_world()
share_cores(state)
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
    expected = max(1, min(psutil.cpu_count(logical=False) or cores, count_cores()))
    assert f"threads {expected} " in done.stdout and f"{expected} thread" in done.stdout.partition("cpu (")[2]


# --- what devices can do ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("has_fp64", "dtype"), [(True, torch.float64), (False, torch.float32)])
def test_counters_are_float64_only_where_the_device_has_it(has_fp64, dtype, monkeypatch):
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: SimpleNamespace(has_fp64=has_fp64))
    assert sum_dtype(torch.device("xpu")) == dtype
    assert sum_dtype(torch.device("mps")) == torch.float32
    assert sum_dtype(torch.device("cpu")) == sum_dtype(torch.device("cuda")) == torch.float64


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_bf16_needs_a_gpu_that_computes_in_it(kind, monkeypatch):
    """PyTorch says by default that a T4 supports bf16, because it emulates it."""
    monkeypatch.setattr(getattr(torch, kind), "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert not supports_precision(torch.device(kind), "bf16")
    assert supports_precision(torch.device(kind), "fp16") and supports_precision(torch.device("cpu"), "bf16")


def test_a_cpu_without_instructions_for_bf16_emulates_it(monkeypatch):
    monkeypatch.setattr(devices.torch.backends.mkldnn, "is_available", lambda: True)
    for native in (True, False):
        monkeypatch.setattr(devices.torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda native=native: native)
        assert emulates_bf16(torch.device("cpu")) == (not native)
        assert not emulates_bf16(torch.device("cuda"))


@pytest.fixture
def a_gpu(monkeypatch, tmp_path):
    """A machine with one NVIDIA GPU, whose user has not asked for the CPU."""
    (tmp_path / "nvidia0").touch()
    (tmp_path / "nvidiactl").touch()
    monkeypatch.setattr(devices, "DEVICE_FILES", tmp_path)
    for name in ("ACCELERATE_USE_CPU", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_a_gpu_that_pytorch_cannot_use_is_named_with_the_reason(a_gpu, monkeypatch):
    def too_old():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nUpdate it")

    monkeypatch.setattr(torch.cuda, "init", too_old)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert unused_gpu(torch.device("cpu")).endswith("too old (found version 11040).")
    assert unused_gpu(torch.device("cuda")) == ""
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in unused_gpu(torch.device("cpu"))
    (a_gpu / "nvidia0").unlink()
    assert unused_gpu(torch.device("cpu")) == ""


@pytest.mark.parametrize("asked", [("ACCELERATE_USE_CPU", "true"), ("CUDA_VISIBLE_DEVICES", "")])
def test_a_gpu_is_not_named_if_the_user_asked_for_the_cpu(a_gpu, monkeypatch, asked):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert unused_gpu(torch.device("cpu"))
    monkeypatch.setenv(*asked)
    assert unused_gpu(torch.device("cpu")) == ""


def test_the_peak_memory_is_that_of_tensors_where_the_gpu_counts_them(monkeypatch):
    monkeypatch.setattr(torch.xpu, "max_memory_allocated", lambda device: 7)
    assert peak_memory(torch.device("xpu")) == 7
    assert peak_memory(torch.device("cpu")) >= psutil.Process().memory_info().rss // 2 > 2**20
    assert peak_memory(torch.device("mps")) > 2**20
