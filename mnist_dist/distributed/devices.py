"""The number of CPU threads and the names of devices."""

from __future__ import annotations

import os
import platform
import re
import sys
from pathlib import Path

import psutil
import torch
from accelerate import PartialState

from mnist_dist.distributed.launcher import launched_by_accelerate, launcher_arguments, read_proc


def choose_threads(state: PartialState) -> None:
    """Gives a process on the CPU an equal share of the cores of its machine, unless the user set the number of threads.

    The user sets the number with OMP_NUM_THREADS or `accelerate launch --num_cpu_threads_per_process`. If neither is
    given, `accelerate launch` and torchrun set OMP_NUM_THREADS=1 for their processes, which leaves most cores idle. So
    under a launcher this function reads the launcher's own environment instead of the environment of this process.
    """
    if state.device.type != "cpu":
        return
    launched = launched_by_accelerate() or "TORCHELASTIC_RUN_ID" in os.environ
    set_by_user = (
        {entry.partition("=")[0] for entry in read_proc(os.getppid(), "environ")} if launched else set(os.environ)
    )
    if "OMP_NUM_THREADS" in set_by_user or any("num_cpu_threads" in word for word in launcher_arguments()):
        return
    usable = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    cores = min(usable, psutil.cpu_count(logical=False) or usable)
    torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))))


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


def synchronize(device: torch.device) -> None:
    """Waits until a GPU has finished its work. A CPU has finished when a call returns."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
