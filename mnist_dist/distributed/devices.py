"""Devices and threads of this process."""

from __future__ import annotations

import os
import platform
import re
import sys
from pathlib import Path

import psutil
import torch
from accelerate import PartialState

from mnist_dist.distributed.launcher import launched_by_accelerate, launcher_words, read_proc


def choose_threads(state: PartialState) -> None:
    """Gives each CPU process its share of this machine's cores, unless somebody chose OMP_NUM_THREADS.

    `accelerate launch` and torchrun set it to 1 when nobody did, which on a CPU halves the speed of two cores and
    wastes sixty-three of sixty-four. Whether somebody did shows in the launcher's own environment.
    """
    if state.device.type != "cpu":
        return
    launched = launched_by_accelerate() or "TORCHELASTIC_RUN_ID" in os.environ
    launchers_own = (
        {entry.partition("=")[0] for entry in read_proc(os.getppid(), "environ")} if launched else set(os.environ)
    )
    if "OMP_NUM_THREADS" in launchers_own or any("num_cpu_threads" in word for word in launcher_words()):
        return
    mine = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    cores = min(mine, psutil.cpu_count(logical=False) or mine)
    torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))))


def device_name(device: torch.device) -> str:
    """The GPU's own name, or the CPU's with its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return str(device)
    threads = torch.get_num_threads()
    return f"cpu ({processor()}, {threads} thread{'s'[: threads > 1]})"


def processor() -> str:
    """What the CPU calls itself, short of its trademarks: "AMD EPYC"; its architecture where it does not say."""
    information = Path("/proc/cpuinfo")
    text = information.read_text(encoding="utf-8") if information.is_file() else ""
    found = re.search(r"(?m)^model name\s*:\s*(.+)$", text)
    return re.sub(r"\s*(\((R|TM)\)|CPU.*|@.*|Processor)", "", found[1]).strip() if found else platform.machine()
