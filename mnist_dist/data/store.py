"""Where the images of a training run lie: on the device, in host memory, or in a memory-mapped file on disk.

The place changes speed and memory, never a value: all three places hold the same bytes.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import sys
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from mnist_dist.data.cache import describe_bytes, map_file, remove_unfinished, unfinished_path, user_cache
from mnist_dist.data.images import Images
from mnist_dist.machine.limits import free_device_memory, free_memory

Place = Literal["device", "host", "disk"]

PLACES: dict[Place, str] = {"device": "on the device", "host": "in host memory", "disk": "on disk, memory-mapped"}
"""Place -> its name in messages."""

LARGEST_SHARE = 0.5
"""Share of the free memory that images may take with `data.place: auto`. The network needs the rest."""

CHUNK = 2**24
"""Bytes that are hashed and written at once."""


def choose_place(images: Tensor, device: torch.device, processes: int = 1) -> tuple[Place, str]:
    """Returns the fastest place whose memory can hold the images, and the reason if it is not the device.

    Args:
        images: uint8 (N, C, H, W), on the CPU.
        processes: processes of this machine, each of which has its own images.
    """
    size, reasons = images.numel(), []
    if device.type == "cpu" and not is_memory_mapped(images):
        return "device", ""  # they are in memory already
    if device.type != "cpu":
        on_device = free_device_memory(device)
        if on_device is None or size <= LARGEST_SHARE * on_device:
            return "device", ""
        reasons.append(f"the device has {describe_bytes(on_device)} of free memory")
    free = free_memory()
    if processes * size <= LARGEST_SHARE * free:
        return ("device" if device.type == "cpu" else "host"), "; ".join(reasons)
    copies = f" for {processes} processes" if processes > 1 else ""
    return "disk", "; ".join([*reasons, f"the host has {describe_bytes(free)}{copies}"])


def fits_on_device(images: Tensor, wanted: Place | Literal["auto"], device: torch.device) -> bool:
    """Returns whether images for an evaluation are moved to the device at once, given the recipe's `data.place`."""
    return wanted == "device" or (wanted == "auto" and choose_place(images, device)[0] == "device")


def describe_place(place: Place, images: Tensor, reason: str) -> str:
    """Returns a note for the user: where the images lie, their size, and the reason."""
    return f"data.place: the {describe_bytes(images.numel())} of images stay {PLACES[place]}{reason and ': '}{reason}"


def place_images(data: Images, place: Place, device: torch.device, cache: Path | None = None) -> Images:
    """Returns the images in their place; with `device`, the labels move to the device too.

    Args:
        data: on the CPU.
        cache: folder for the file of images that have none; None for the user's cache folder.

    Raises:
        OSError: the cache cannot be written.
    """
    if place == "disk":
        mapped = is_memory_mapped(data.images)
        return data if mapped else replace(data, images=write_mapped(data.images, cache or cache_folder()))
    if is_memory_mapped(data.images) and (place == "host" or device.type == "cpu"):
        return replace(data, images=data.images.clone())
    return data if place == "host" else data.to(device)


def cache_folder() -> Path:
    """Returns the folder of this user for images of sources that have no file of their own."""
    return user_cache() / "images"


def write_mapped(images: Tensor, folder: Path) -> Tensor:
    """Returns the images as a memory-mapped file in `folder`, named by a hash of its content.

    The file is written under another name and renamed when it is complete, so several processes may write it at once.

    Args:
        images: uint8 (N, C, H, W), on the CPU.
    """
    parts = images.split(max(1, CHUNK // max(1, images[:1].numel())))
    digest = hashlib.blake2b(repr(tuple(images.shape)).encode(), digest_size=16)
    for part in parts:
        digest.update(part.contiguous().numpy())
    path = folder / f"{digest.hexdigest()}.bin"
    if not path.is_file() or path.stat().st_size != images.numel():
        folder.mkdir(parents=True, exist_ok=True)
        remove_unfinished(folder)
        staged = unfinished_path(path)
        try:
            with staged.open("wb") as file:
                for part in parts:
                    file.write(part.contiguous().numpy())
                file.flush()
                os.fsync(file.fileno())
            staged.replace(path)
        finally:
            with suppress(OSError):
                staged.unlink(missing_ok=True)
    return map_file(path, tuple(images.shape))


def is_memory_mapped(images: Tensor) -> bool:
    """Returns whether a CPU tensor lies in a memory-mapped file. Known on Linux only; elsewhere False."""
    if images.device.type != "cpu" or not images.numel() or not sys.platform.startswith("linux"):
        return False
    address = images.data_ptr()
    with suppress(OSError):
        for line in Path("/proc/self/maps").read_text().splitlines():
            span, _, _, _, inode, *_ = line.split(maxsplit=5)
            start, end = (int(each, 16) for each in span.split("-"))
            if start <= address < end:
                return inode != "0"
    return False


def read_ahead(images: Tensor, rows: Tensor) -> int:
    """Asks the operating system to read rows of a memory-mapped tensor, all at once; does not wait for them.

    Without it, the first access to each row waits for its own read of the disk, and that read includes 128 kB of
    neighbours that no one has asked for. On a file that is not in the cache, a batch took fifty times as long.

    Args:
        images: contiguous (N, …), memory-mapped.
        rows: int64 (n,), on the CPU.

    Returns:
        The number of rows that are being read or are in memory.
    """
    start, size, page = images.data_ptr(), images[0].nbytes, mmap.PAGESIZE
    count, madvise = 0, _c_library().madvise
    for row in rows.tolist():
        first = (start + row * size) // page * page
        length = start + (row + 1) * size - first
        count += madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), mmap.MADV_WILLNEED) == 0
    return count


@lru_cache
def _c_library() -> ctypes.CDLL:
    return ctypes.CDLL(None)
