"""Sets the number of CPU threads, describes devices, and marks moments at which a device finishes its work."""

from __future__ import annotations

import os
import platform
import re
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import is_bf16_available, parse_flag_from_env

from mnist_dist.distributed.launcher import launched_by_accelerate, launcher_arguments, read_proc
from mnist_dist.errors import first_line
from mnist_dist.machine.limits import count_cores


def share_cores(state: PartialState) -> None:
    """Gives a process on the CPU an equal share of the cores of its machine. Does nothing on a GPU.

    The process computes with as many threads as cores fall to it, unless the user set the number of threads. If the
    processes outnumber the cores, each computes in longer turns (SCHED_BATCH, Linux): a process that wakes up does not
    interrupt one that computes. All processes wait for the slowest one in every step, so they lose much time if they
    interrupt each other.
    """
    if state.device.type != "cpu":
        return
    _choose_threads(state.num_processes)
    crowded = state.num_processes > 1 and not has_core_per_thread(state.num_processes)
    if crowded and sys.platform == "linux" and os.sched_getscheduler(0) == os.SCHED_OTHER:
        for thread in Path("/proc/self/task").iterdir():  # threads that start later inherit the policy
            with suppress(OSError):  # the thread has just ended, or a container forbids it: the run is only slower
                os.sched_setscheduler(int(thread.name), os.SCHED_BATCH, os.sched_param(0))


def _choose_threads(world_size: int) -> None:
    """Sets the number of threads of this process, unless the user set it.

    The user sets the number with OMP_NUM_THREADS or `accelerate launch --num_cpu_threads_per_process`. If neither is
    given, `accelerate launch` and torchrun set OMP_NUM_THREADS=1 for their processes, which leaves most cores idle. So
    under a launcher this function reads the launcher's own environment instead of the environment of this process.
    """
    launched = launched_by_accelerate() or "TORCHELASTIC_RUN_ID" in os.environ
    user_variables = (
        {entry.partition("=")[0] for entry in read_proc(os.getppid(), "environ")} if launched else set(os.environ)
    )
    if "OMP_NUM_THREADS" in user_variables or any("num_cpu_threads" in word for word in launcher_arguments()):
        return
    usable = count_cores()
    cores = min(usable, psutil.cpu_count(logical=False) or usable)
    torch.set_num_threads(max(1, cores // count_local_processes(world_size)))


def has_core_per_thread(world_size: int) -> bool:
    """Returns whether this machine has a core for every thread of all processes of the world on it."""
    return torch.get_num_threads() * count_local_processes(world_size) <= count_cores()


def count_local_processes(world_size: int) -> int:
    """Returns the number of the world's processes on this machine; `world_size` if the launcher does not say it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size))


DEVICE_FILES = Path("/dev")
"""Folder in which NVIDIA's driver for Linux makes one file per GPU: nvidia0, nvidia1, …"""


def unused_gpu(device: torch.device) -> str:
    """Returns why a process on the CPU of a machine with NVIDIA GPUs uses none of them.

    The text is empty if the device is not the CPU, there is no GPU, or the user asked for the CPU or hid the GPUs.
    """
    asked = parse_flag_from_env("ACCELERATE_USE_CPU") or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if device.type != "cpu" or asked or not any(DEVICE_FILES.glob("nvidia[0-9]*")):
        return ""
    if torch.version.cuda is None:
        return f"this PyTorch ({torch.__version__}) is built without CUDA; see https://pytorch.org/get-started/locally"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f"PyTorch ({torch.__version__}) cannot use it: {first_line(error)}"
    return ""


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
    """Returns whether a device computes in a precision, a value of `mixed_precision`, without emulation."""
    if precision == "fp16":
        return device.type != "cpu"  # a CPU would compute in fp32 without a warning
    if precision != "bf16" or device.type == "cpu":
        return True
    if device.type in ("cuda", "xpu"):  # PyTorch emulates bf16 on older GPUs (T4, V100), which is slower than fp32
        return getattr(torch, device.type).is_bf16_supported(including_emulation=False)
    return is_bf16_available(ignore_tpu=True)


def emulates_bf16(device: torch.device) -> bool:
    """Returns whether a CPU computes bf16 without vector instructions for it: then fp32 is many times faster."""
    has_instructions = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return device.type == "cpu" and not has_instructions


def sum_dtype(device: torch.device) -> torch.dtype:
    """Returns the dtype of counters on a device: float64, or float32 on a GPU that has no float64.

    Apple's GPUs and Intel's GPUs for desktops have none. In float32 a count is exact up to 16.7 million, and the sum of
    n losses has a relative error below n × 6e-8. At every log line, both are read and added up in float64.
    """
    if device.type == "mps":
        return torch.float32
    if device.type == "xpu" and not torch.xpu.get_device_properties(device).has_fp64:
        return torch.float32
    return torch.float64


def peak_memory(device: torch.device) -> int:
    """Returns the peak memory in bytes: that of the tensors on a GPU that counts them, else that of this process."""
    if hasattr(backend := getattr(torch, device.type), "max_memory_allocated"):
        return backend.max_memory_allocated(device)
    try:
        import resource  # Windows has no such module
    except ImportError:
        return psutil.Process().memory_info().peak_wset
    unit = 1 if sys.platform == "darwin" else 2**10  # ru_maxrss counts bytes on macOS, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def synchronize(device: torch.device) -> None:
    """Waits until a GPU has finished its work. On a CPU every operation has finished when its call returns."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type != "cpu":
        getattr(torch, device.type).synchronize()


def runs_behind(device: torch.device) -> bool:
    """Returns whether the device computes asynchronously and can mark a `Moment` without making the host wait."""
    return device.type == "cuda"


class Moment:
    """The moment at which a device finishes the work that was queued before. On devices other than CUDA: now.

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
