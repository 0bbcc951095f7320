"""What a process may use of its machine: the limits of its control groups."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from mnist_dist.data import decoding
from mnist_dist.machine import limits
from mnist_dist.machine.limits import count_cores, cpu_quota, free_device_memory, free_memory, memory_limit


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
    assert cpu_quota(tmp_path) == quota


def write_groups(root: Path, groups: str, files: dict[str, str]) -> None:
    for name, content in {
        "proc/self/cgroup": groups,
        **{f"sys/fs/cgroup/{name}": files[name] for name in files},
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content + "\n")


V2 = {
    "pod/memory.max": "4000000000",
    "pod/memory.current": "3000000000",
    "pod/memory.stat": "anon 1\ninactive_file 500",
}
V1 = {
    "memory/pod/memory.limit_in_bytes": "4000000000",
    "memory/pod/memory.usage_in_bytes": "3000000000",
    "memory/pod/memory.stat": "inactive_file 1\ntotal_inactive_file 500",
    "memory/memory.limit_in_bytes": "9223372036854771712",
    "memory/memory.usage_in_bytes": "1",
}


@pytest.mark.parametrize(
    ("groups", "files", "limit", "left"),
    [
        ("0::/pod", V2, 4_000_000_000, 1_000_000_500),
        (
            "0::/pod/app",
            V2 | {"pod/app/memory.max": "max", "pod/app/memory.current": "5"},
            4_000_000_000,
            1_000_000_500,
        ),
        ("5:memory:/pod", V1, 4_000_000_000, 1_000_000_500),
        ("0::/pod", {"pod/memory.max": "max", "pod/memory.current": "5"}, None, 9_000_000_000),
        ("0::/pod", {"pod/memory.max": "100", "pod/memory.current": "900"}, 100, 0),
        ("5:cpu:/pod", V1, None, 9_000_000_000),
    ],
)
def test_free_memory_ends_at_the_limit_of_the_control_group(groups, files, limit, left, tmp_path, monkeypatch):
    write_groups(tmp_path, groups, files)
    monkeypatch.setattr(limits, "ROOT", tmp_path)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=9_000_000_000))
    assert memory_limit(tmp_path) == limit
    assert free_memory() == left


def test_every_part_of_the_package_counts_the_cores_of_the_quota(monkeypatch):
    monkeypatch.setattr(limits.os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    monkeypatch.setattr(limits, "cpu_quota", lambda: 4)
    assert count_cores() == 4
    threads = []
    monkeypatch.setattr(decoding, "ThreadPoolExecutor", lambda count: threads.append(count) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(decoding._in_threads(lambda rows: {}, [1], ""))
    assert threads == [4]


def test_no_other_module_counts_cores_by_itself():
    package = Path(limits.__file__).parents[1]
    words = ("cpu_count()", "sched_getaffinity", "cpu.max")
    found = {path.name for path in package.rglob("*.py") if any(word in path.read_text() for word in words)}
    assert found == {"limits.py"}


def test_the_free_memory_of_a_device_is_unknown_where_pytorch_does_not_know_it(monkeypatch):
    def fails(device: torch.device) -> tuple[int, int]:
        raise RuntimeError("The device does not support querying its free memory")

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5, 9))
    monkeypatch.setattr(torch.xpu, "mem_get_info", fails)
    assert free_device_memory(torch.device("cuda")) == 5
    assert free_device_memory(torch.device("xpu")) is free_device_memory(torch.device("mps")) is None
