"""The number of CPU threads and the names of devices."""

from __future__ import annotations

import os
import platform
import re
import sys
import time
from pathlib import Path, PurePosixPath

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import is_bf16_available

from mnist_dist.distributed.launcher import launched_by_accelerate, launcher_arguments, read_proc


def choose_threads(state: PartialState) -> None:
    """Gives a process on the CPU an equal share of the cores of its machine, unless the user set the number of threads.

    The cores are those that the affinity and the CPU quota of the process's control groups allow.
    The user sets the number with OMP_NUM_THREADS or `accelerate launch --num_cpu_threads_per_process`. If neither is
    given, `accelerate launch` and torchrun set OMP_NUM_THREADS=1 for their processes, which leaves most cores idle. So
    under a launcher this function reads the launcher's own environment instead of the environment of this process.
    """
    if state.device.type != "cpu":
        return
    launched = launched_by_accelerate() or "TORCHELASTIC_RUN_ID" in os.environ
    user_variables = (
        {entry.partition("=")[0] for entry in read_proc(os.getppid(), "environ")} if launched else set(os.environ)
    )
    if "OMP_NUM_THREADS" in user_variables or any("num_cpu_threads" in word for word in launcher_arguments()):
        return
    usable = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    cores = min(usable, psutil.cpu_count(logical=False) or usable, cpu_quota() or usable)
    torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))))


def cpu_quota(root: Path = Path("/")) -> int | None:
    """Returns how many whole CPUs, at least 1, the control groups of this process allow; None if there is no limit.

    A container on a cluster often sees all cores of its machine, but the kernel pauses it when it has used its share of
    CPU time. A parent group may have a lower limit than the group of the process, so the lowest limit counts.

    Args:
        root: the root of the file system; only tests change it.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    quotas = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2: "0::/group"
            mounts, read = ["sys/fs/cgroup", "sys/fs/cgroup/unified"], _read_quota_v2
        elif "cpu" in controllers.split(","):  # version 1: "4:cpu,cpuacct:/group"
            mounts, read = [f"sys/fs/cgroup/{controllers}", "sys/fs/cgroup/cpu"], _read_quota_v1
        else:
            continue
        group = PurePosixPath(path.lstrip("/"))
        folders = [root / mount / each for mount in mounts for each in (group, *group.parents)]
        quotas += [quota for folder in folders if (quota := read(folder))]
    return max(1, int(min(quotas))) if quotas else None


def _read_quota_v2(folder: Path) -> float | None:
    """Returns the number of CPUs in cpu.max, "QUOTA PERIOD" or "max PERIOD"; None if there is no limit or no file."""
    try:
        quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
        return int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _read_quota_v1(folder: Path) -> float | None:
    """Returns the number of CPUs in cpu.cfs_quota_us, in which -1 is no limit; None if there is no limit or no file."""
    try:
        quota, period = (
            int((folder / f"cpu.cfs_{name}_us").read_text(encoding="utf-8")) for name in ("quota", "period")
        )
        return quota / period if quota > 0 else None
    except (OSError, ValueError):
        return None


def device_name(device: torch.device) -> str:
    """Returns the name of the GPU, or the name of the CPU with the number of threads of this process."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return str(device)
    threads = torch.get_num_threads()
    return f"cpu ({processor()}, {threads} thread{'s'[: threads > 1]})"


def processor() -> str:
    """Returns the model name of the CPU without trademark signs ("AMD EPYC"), or its architecture if it has no name."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.is_file() else ""
    found = re.search(r"(?m)^model name\s*:\s*(.+)$", text)
    return re.sub(r"\s*(\((R|TM)\)|CPU.*|@.*|Processor)", "", found[1]).strip() if found else platform.machine()


def supports_precision(device: torch.device, precision: str) -> bool:
    """Returns whether Accelerate computes in a precision, a value of `mixed_precision`, on a device."""
    if precision == "fp16":
        return device.type != "cpu"  # a CPU would compute in fp32 without a warning
    return precision != "bf16" or device.type == "cpu" or is_bf16_available(ignore_tpu=True)


def synchronize(device: torch.device) -> None:
    """Waits until a GPU has finished its work. On a CPU every operation has finished when its call returns."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type != "cpu":
        getattr(torch, device.type).synchronize()


def runs_behind(device: torch.device) -> bool:
    """Returns whether the device works behind the host, and can mark a `Moment` without a wait of the host."""
    return device.type == "cuda"


class Moment:
    """The moment at which a device finishes the work that was queued before. On other devices than CUDA: now.

    Marking a moment does not make the host wait for a CUDA device.
    """

    def __init__(self, device: torch.device):
        # A fake tensor's device may be one that this machine lacks.
        exists = device.type != "cuda" or torch.cuda.is_available()
        self._event = torch.cuda.Event(enable_timing=True) if runs_behind(device) and exists else None
        if self._event is None and exists:
            synchronize(device)
        elif self._event is not None:
            self._event.record(torch.cuda.current_stream(device))
        self._time = time.perf_counter()

    def wait(self) -> None:
        """Waits until the moment has come."""
        if self._event is not None:
            self._event.synchronize()

    def seconds_since(self, earlier: Moment) -> float:
        """Returns the seconds from an earlier moment to this one. Waits until this moment has come."""
        if self._event is None or earlier._event is None:
            return self._time - earlier._time
        self.wait()
        return earlier._event.elapsed_time(self._event) / 1000
