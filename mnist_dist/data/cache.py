"""The cache of decoded images: a folder that is complete or absent."""

from __future__ import annotations

import json
import os
import shutil
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor


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


def cache_folders(root: Path) -> list[Path]:
    """Returns the folders that may hold caches: in the data's own folder, which nodes may share, and in the user's."""
    return [root / ".decoded", user_cache() / "decoded"]


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


def remove_stale(target: Path) -> None:
    """Removes what killed decodings on this machine have left."""
    for left in target.parent.glob(f"{target.name}.{socket.gethostname()}.*.part"):
        number = left.name.split(".")[-2]
        if number.isdigit() and not psutil.pid_exists(int(number)):
            shutil.rmtree(left, ignore_errors=True)
