"""The cache of decoded images: a folder that is complete or absent."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor

UNFINISHED = ".part"
"""Ending of the name of a file or folder that a process is still writing."""

OLDEST_SECONDS = 24 * 3600.0
"""An unfinished cache of another machine that has not changed for this long is no longer being written."""


@dataclass(frozen=True)
class Decoded:
    """Decoded images.

    Attributes:
        images: uint8 (N, C, H, W), memory-mapped.
        kept: int64 (N,), the position of each image in the list of files.
    """

    images: Tensor
    kept: Tensor


def user_cache() -> Path:
    """Returns this user's folder for files that can be made or fetched again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mnist_dist"


def map_file(path: Path, shape: tuple[int, ...]) -> Tensor:
    """Returns a file of uint8 values as a memory-mapped tensor.

    Copy-on-write: the pages stay those of the file, and torch gets an array that it may write.
    """
    return torch.from_numpy(np.memmap(path, dtype=np.uint8, mode="c", shape=shape))


def cache_folders(root: Path | None) -> list[Path]:
    """Returns the folders that may hold caches: in the data's own folder, which nodes may share, and in the user's."""
    return [*([root / ".decoded"] if root else []), user_cache() / "decoded"]


def open_cache(folder: Path) -> Decoded | None:
    """Returns the images of a complete cache; None if there is none."""
    try:
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        path, shape = folder / "images.bin", tuple(about["shape"])
        if path.stat().st_size != int(np.prod(shape, dtype=np.int64)):
            return None
        images = map_file(path, shape)
        kept = np.load(folder / "kept.npy")
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Decoded(images, torch.from_numpy(kept)) if len(kept) == shape[0] else None


def writable_folder(folders: list[Path]) -> Path:
    """Returns the first folder that can be written."""
    for folder in folders[:-1]:
        with suppress(OSError):
            folder.mkdir(exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder
    folders[-1].mkdir(parents=True, exist_ok=True)
    return folders[-1]


def publish(staged: Path, target: Path) -> None:
    """Gives a complete cache its name, unless another run has just made the same one."""
    try:
        staged.replace(target)
    except OSError:  # the name is taken
        if open_cache(target) is None:
            shutil.rmtree(target, ignore_errors=True)
            staged.replace(target)


def describe_cache(folder: Path) -> str:
    """Returns a note for the user: path and size of a cache, and what the other caches of the same folder take."""
    others = [each for each in folder.parent.iterdir() if each != folder and open_cache(each)]
    note = f"{folder}, {_size_of([folder])}"
    if not others:
        return note
    caches = f"{len(others)} other cache{'s' * (len(others) > 1)}"
    return f"{note}; the folder also holds {caches}, {_size_of(others)}; you may delete any cache"


def _size_of(folders: list[Path]) -> str:
    return describe_bytes(sum(file.stat().st_size for folder in folders for file in folder.iterdir() if file.is_file()))


def describe_bytes(size: int) -> str:
    """Returns a number of bytes in a unit that shows it, e.g. 4.6 MB."""
    unit, name = next(((unit, name) for unit, name in ((1e9, "GB"), (1e6, "MB")) if size >= unit), (1e3, "kB"))
    return f"{size / unit:.1f} {name}"


def unfinished_path(target: Path) -> Path:
    """Returns the path at which this process writes what will become `target`, a file or a folder."""
    return target.with_name(f"{target.name}.{socket.gethostname()}.{os.getpid()}{UNFINISHED}")


def remove_unfinished(folder: Path) -> None:
    """Removes what killed processes have left at an `unfinished_path` in a folder.

    On this machine, the process must have ended. What another machine has left must be older than `OLDEST_SECONDS`.
    """
    host = socket.gethostname()
    for path in folder.glob(f"*{UNFINISHED}"):
        rest, _, number = path.name.removesuffix(UNFINISHED).rpartition(".")
        if rest.endswith(f".{host}") and number.isdigit():
            is_left = not psutil.pid_exists(int(number))
        else:
            is_left = _seconds_since_change(path) > OLDEST_SECONDS
        if is_left:
            shutil.rmtree(path, ignore_errors=True)
            with suppress(OSError):
                path.unlink()


def _seconds_since_change(path: Path) -> float:
    """Returns the time since the newest change of a file, or of a folder and the files in it."""
    times = [0.0]
    for each in (path, *path.glob("*")):
        with suppress(OSError):  # removed by another process
            times.append(each.stat().st_mtime)
    return time.time() - max(times)
