"""Finds out what this process may use of its machine: processor cores, memory, and the memory of a device.

A container on a cluster often sees all cores and all memory of its machine. Its control groups allow it less: the
kernel pauses a process that has used its share of CPU time, and kills one that takes more memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    import torch

ROOT = Path("/")


def count_cores() -> int:
    """Returns how many cores this process may use, within its CPU affinity and the quota of its control groups."""
    visible = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(visible, cpu_quota() or visible)


def count_all_cores() -> int:
    """Returns how many cores the machine has."""
    return psutil.cpu_count() or 1


def free_memory() -> int:
    """Returns how many bytes of memory this process can still take from the machine and from its control groups."""
    left = [max(0, limit - used) for limit, used in _memory_limits(ROOT)]
    return min([psutil.virtual_memory().available, *left])


def free_device_memory(device: torch.device) -> int | None:
    """Returns the free bytes of a GPU's memory; None if PyTorch does not know them."""
    import torch

    try:
        return getattr(torch, device.type).mem_get_info(device)[0]
    except (AttributeError, RuntimeError):  # Apple's GPUs share the host's memory; some of Intel's do not report it
        return None


# --- control groups -----------------------------------------------------------------------------------------------


def cpu_quota(root: Path = ROOT) -> int | None:
    """Returns how many whole CPUs, at least 1, the control groups of this process allow; None if there is no limit.

    A parent group may have a lower limit than the group of the process, so the lowest limit counts.

    Args:
        root: the root of the file system; only tests change it.
    """
    quotas = []
    for version, folder in _group_folders("cpu", root):
        if version == 2:  # "QUOTA PERIOD" or "max PERIOD"
            quota, period = (*_read(folder / "cpu.max").split(), "", "")[:2]
        else:  # a quota of -1 is no limit
            quota, period = (_read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
        if quota.isdigit() and period.isdigit() and int(period):
            quotas.append(int(quota) / int(period))
    return max(1, int(min(quotas))) if quotas else None


def memory_limit(root: Path = ROOT) -> int | None:
    """Returns the lowest memory limit of this process's control groups in bytes; None if there is no limit."""
    return min((limit for limit, _ in _memory_limits(root)), default=None)


def _memory_limits(root: Path) -> Iterator[tuple[int, int]]:
    """Yields each group's limit and its memory in use, without cached files, which the kernel can drop at once."""
    names = {
        2: ("memory.max", "memory.current", "inactive_file "),
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file "),
    }
    for version, folder in _group_folders("memory", root):
        of_limit, of_use, of_files = names[version]
        limit, used = (_read(folder / name).strip() for name in (of_limit, of_use))
        if limit.isdigit() and used.isdigit() and int(limit) < 1 << 60:  # version 1 writes "no limit" as 2**63
            lines = _read(folder / "memory.stat").splitlines()
            files = sum(int(line.removeprefix(of_files)) for line in lines if line.startswith(of_files))
            yield int(limit), max(0, int(used) - files)


def _group_folders(controller: str, root: Path) -> Iterator[tuple[int, Path]]:
    """Yields version and folder of each control group that this process is in, and of their parents."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2: "0::/group"
            version, mounts = 2, ["sys/fs/cgroup", "sys/fs/cgroup/unified"]
        elif controller in controllers.split(","):  # version 1: "4:cpu,cpuacct:/group"
            version, mounts = 1, [f"sys/fs/cgroup/{controllers}", f"sys/fs/cgroup/{controller}"]
        else:
            continue
        group = PurePosixPath(path.lstrip("/"))
        yield from ((version, root / mount / each) for mount in mounts for each in (group, *group.parents))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
