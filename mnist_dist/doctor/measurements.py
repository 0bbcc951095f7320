"""Measurements on one rank or between ranks. Each returns JSON-serializable figures; `checks` evaluates them."""

from __future__ import annotations

import os
import platform
import shutil
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mnist_dist.distributed.devices import synchronize
from mnist_dist.doctor.ranks import Ranks
from mnist_dist.machine.limits import count_all_cores, count_cores, free_device_memory, free_memory, memory_limit

# --- the machine --------------------------------------------------------------------------------------------------


SHARED_MEMORY = Path("/dev/shm")
"""NCCL's processes on one node communicate through it."""


def free_space(device: torch.device, run_dir: Path) -> dict[str, int]:
    """Returns free bytes of host memory, GPU memory, shared memory, and the disk of the run folder.

    Host memory is what the control groups of this process leave. The folder need not exist.
    """
    free = {"memory": free_memory()}
    if device.type != "cpu" and (on_device := free_device_memory(device)) is not None:
        free["GPU memory"] = on_device
    if SHARED_MEMORY.is_dir():
        free[str(SHARED_MEMORY)] = shutil.disk_usage(SHARED_MEMORY).free
    folder = next(path for path in (run_dir, *run_dir.parents) if path.is_dir())
    return free | {"disk": shutil.disk_usage(folder).free}


def limits() -> dict[str, Any]:
    """Returns the `cores` of this process, those of the `machine`, and the `memory` limit in bytes or None."""
    return {"cores": count_cores(), "machine": count_all_cores(), "memory": memory_limit()}


VISIBLE_WITHIN = 5.0
"""Seconds after which the file of one rank must be visible to the others: network file systems show new files late."""


class FolderMeasurement:
    """Writes a file in the same way as a checkpoint, in a folder that need not exist, and removes it again."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._file = folder / f".doctor-{platform.node()}-{os.getpid()}"
        self._staged = self._file.with_name(self._file.name + ".tmp")
        self._created_folders: list[Path] = []

    def write(self) -> dict[str, Any]:
        """Writes a temporary file, flushes it to the disk and renames it.

        Returns:
            `name` of the file, `node`, and the `seconds` that this took.

        Raises:
            OSError: the folder cannot be written.
        """
        self._created_folders = [path for path in (self._folder, *self._folder.parents) if not path.exists()]
        self._folder.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        with self._staged.open("w", encoding="utf-8") as file:
            file.write(self._file.name)
            file.flush()
            os.fsync(file.fileno())
        self._staged.replace(self._file)
        return {"name": self._file.name, "node": platform.node(), "seconds": time.perf_counter() - started}

    def find_missing(self, names: list[str]) -> list[int]:
        """Returns the ranks whose file is not visible here, or not complete.

        Args:
            names: the file names of all ranks, from `write`.
        """
        deadline, missing = time.monotonic() + VISIBLE_WITHIN, list(range(len(names)))
        while missing := [rank for rank in missing if not self._is_complete(names[rank])]:
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        return missing

    def _is_complete(self, name: str) -> bool:
        try:
            return (self._folder / name).read_text(encoding="utf-8") == name
        except OSError:
            return False

    def remove_file(self) -> None:
        """Removes the file of this rank."""
        for path in (self._staged, self._file):
            with suppress(OSError):
                path.unlink()

    def remove_folders(self) -> None:
        """Removes the folders that `write` created, if they are empty."""
        for path in self._created_folders:
            with suppress(OSError):
                path.rmdir()


WANDB_SECONDS = 3.0


def time_request(server: str) -> tuple[float, str]:
    """Returns the seconds until a server sends any response, and an empty string; or 0 and the reason why none came."""
    started = time.perf_counter()
    try:
        with suppress(urllib.error.HTTPError):  # an HTTP error is a response too
            urllib.request.urlopen(server, timeout=WANDB_SECONDS).close()
    except (OSError, ValueError) as error:
        return 0.0, str(getattr(error, "reason", error))
    return time.perf_counter() - started, ""


# --- between ranks: collective, call on every rank -----------------------------------------------------------------

SIZES = {"1 KB": 2**10, "32 KB": 2**15, "1 MB": 2**20, "64 MB": 2**26}
REPETITIONS = {"1 KB": 200, "32 KB": 200, "1 MB": 20, "64 MB": 3}
"""Number of messages per size. The shortest time counts: other load on the machine only adds to it."""


def read_clock(device: torch.device) -> list[tuple[float, float]]:
    """Returns the time of day before and after each of 16 all-reduces."""
    stamps, values = [], torch.zeros(1, device=device)
    for _ in range(16):
        before = time.time()
        dist.all_reduce(values)
        synchronize(device)
        stamps.append((before, time.time()))
    return stamps


def clock_offset(mine: list[tuple[float, float]], zero: list[tuple[float, float]]) -> tuple[float, float]:
    """Returns the seconds by which a clock is ahead of rank 0's, and the uncertainty (±) of that figure.

    The method is NTP's, with an all-reduce as the round trip, so that all ranks measure at the same time. An all-reduce
    ends on no rank before it has started on all ranks. So each interval of `mine` ended after the interval of `zero`
    started, and started before the interval of `zero` ended. The uncertainty is half the shortest round trip.

    Args:
        mine: from `read_clock` on this rank.
        zero: from `read_clock` on rank 0.
    """
    least = max(my_start - end for (my_start, _), (_, end) in zip(mine, zero, strict=True))
    most = min(my_end - start for (_, my_end), (start, _) in zip(mine, zero, strict=True))
    return (least + most) / 2, abs(most - least) / 2


LINK_SECONDS = 2.0
"""Time limit for the round trips of one size. It keeps the measurement short over a cable at 100 Mbit/s."""


def measure_links(ranks: Ranks) -> dict[str, Any]:
    """Measures round trips from each rank to the next one, in rounds in which no rank has two links.

    Returns:
        `seconds` for one way to the next rank by size (half the shortest round trip), the sizes that arrived `damaged`,
        and the `node`.
    """
    previous, following = (ranks.rank - 1) % ranks.size, (ranks.rank + 1) % ranks.size
    seconds, damaged = {}, set()
    for current in range(3 if ranks.size % 2 else 2):
        sends, echoes = (link_round(rank, ranks.size) == current for rank in (ranks.rank, previous))
        if not sends and not echoes:
            continue
        for size, count in SIZES.items():
            numbers = torch.arange(count // 4, dtype=torch.int32, device=ranks.device)
            sent = numbers + (ranks.rank if sends else previous)
            if sends:
                seconds[size], received = _time_round_trips(sent, following, REPETITIONS[size])
            else:
                received = _echo(torch.zeros_like(numbers), previous)
            if not torch.equal(received, sent):
                damaged.add(size)
    return {"seconds": seconds, "damaged": sorted(damaged), "node": platform.node()}


def _time_round_trips(sent: Tensor, peer: int, repetitions: int) -> tuple[float, Tensor]:
    """Sends a tensor to `peer`, which sends it back; returns the shortest time for one way and the last tensor."""
    received, times = torch.zeros_like(sent), list[float]()
    while len(times) < repetitions and sum(times) < LINK_SECONDS:
        dist.send(torch.ones(1, device=sent.device), peer)  # 1: another message follows
        synchronize(sent.device)
        started = time.perf_counter()
        dist.send(sent, peer)
        dist.recv(received, peer)
        synchronize(sent.device)
        times.append(time.perf_counter() - started)
    dist.send(torch.zeros(1, device=sent.device), peer)
    return min(times) / 2, received


def _echo(received: Tensor, peer: int) -> Tensor:
    """Sends every tensor from `peer` back until no other follows; returns the last one."""
    more = torch.empty(1, device=received.device)
    while True:
        dist.recv(more, peer)
        if not more.item():
            return received
        dist.recv(received, peer)
        dist.send(received, peer)


def link_round(rank: int, size: int) -> int:
    """Returns the round in which the link from a rank to the next is measured. Links of a round share no rank."""
    return 2 if size % 2 and rank == size - 1 else rank % 2


def measure_all_reduce(ranks: Ranks) -> dict[str, Any]:
    """Returns the shortest `seconds` of a sum over all ranks by size, and the sizes whose sum is `wrong`."""
    seconds, wrong = {}, []
    for size, count in SIZES.items():
        times, values = [], torch.empty(count // 4, device=ranks.device)
        for _ in range(REPETITIONS[size]):
            values.fill_(ranks.rank + 1)
            synchronize(ranks.device)
            started = time.perf_counter()
            dist.all_reduce(values)
            synchronize(ranks.device)
            times.append(time.perf_counter() - started)
        seconds[size] = min(times)
        if bool((values != ranks.size * (ranks.size + 1) // 2).any()):
            wrong.append(size)
    return {"seconds": seconds, "wrong": wrong}
