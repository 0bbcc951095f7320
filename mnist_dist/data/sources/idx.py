"""IDX files, the format of the MNIST family: how they are read and found, and what may stand for an image in them.

A file may be plain or gzip-packed, whatever its name. Its folder may be read-only.
"""

from __future__ import annotations

import gzip
import io
import math
import re
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
"""Third byte of an IDX file -> type of its values."""

GZIP = b"\x1f\x8b"
"""The first two bytes of gzip data."""

MOST_BYTES = 2**31
"""The largest number of bytes that the values of a packed file may take, unpacked."""

AGAIN = "a published data set can be downloaded again into another folder, with data.root"

# --- reading ------------------------------------------------------------------------------------------------------


def read_idx(path: Path) -> Tensor:
    """Reads an IDX file of one to four dimensions, of any type of value that the format knows.

    Raises:
        ValueError: the file is damaged: no IDX header, broken gzip data, or a size other than its header states.
    """
    content = path.read_bytes()
    try:
        if content.startswith(GZIP):
            content = _unpack(content)
    except (EOFError, OSError, zlib.error) as error:
        raise _damaged(path, f"its gzip data is broken: {error}") from error
    except ValueError as error:
        raise _damaged(path, str(error)) from error
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in TYPES or not 1 <= content[3] <= 4:
        raise _damaged(path, f"it starts with {content[:4]!r}, which is no header of an IDX file")
    dtype, dimensions = np.dtype(TYPES[content[2]]), content[3]
    start = 4 + 4 * dimensions
    shape = tuple(int.from_bytes(content[at : at + 4], "big") for at in range(4, start, 4))
    expected, found = start + math.prod(shape) * dtype.itemsize, len(content)
    if expected != found:
        states = f"{dtype.name} values of shape {shape}"
        raise _damaged(path, f"its header states {states}, which take {expected:,} bytes, but it has {found:,} bytes")
    values = np.frombuffer(content, dtype, offset=start).reshape(shape)
    return torch.from_numpy(values.astype(dtype.newbyteorder("=")))


def _unpack(data: bytes) -> bytes:
    """Returns the content of a gzip-packed IDX file: at most a byte more than its header states.

    A few packed bytes can hold more than the memory can.

    Raises:
        ValueError: the header states more than MOST_BYTES.
    """
    with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
        head = file.read(4)
        if len(head) < 4 or head[:2] != b"\0\0" or head[2] not in TYPES or not 1 <= head[3] <= 4:
            return head
        sizes = file.read(4 * head[3])
        shape = [int.from_bytes(sizes[at : at + 4], "big") for at in range(0, len(sizes), 4)]
        stated = math.prod(shape) * np.dtype(TYPES[head[2]]).itemsize
        if stated > MOST_BYTES:
            raise ValueError(f"its header states {stated:,} bytes, and at most {MOST_BYTES:,} are read")
        return head + sizes + file.read(stated + 1)


def _damaged(path: Path, message: str) -> ValueError:
    return ValueError(f"{path} is damaged: {message}; {AGAIN}")


# --- what the values mean -----------------------------------------------------------------------------------------


def as_images(values: Tensor, path: Path) -> Tensor:
    """Returns the images of a file as uint8 (N, H, W).

    One channel axis, first or last, is dropped; so are three equal channels of grey images. Rows of n² values are
    square images. Values of another type are accepted if they are whole numbers from 0 to 255, or fractions k / 255.

    Raises:
        ValueError: the values do not stand for grey images.
    """
    found = f"found {described(values)}"
    expected = f"{path}: expected grey images as whole numbers from 0 to 255"
    side = math.isqrt(values.shape[1]) if values.ndim == 2 else 0
    images = values.unflatten(1, (side, side)) if side and side**2 == values.shape[1] else values
    if images.ndim == 4:
        channels = next((axis for axis in (1, 3) if images.shape[axis] in (1, 3)), None)
        if channels is None:
            raise ValueError(f"{expected}, {found}")
        first = images.select(channels, 0)
        if any(not torch.equal(first, images.select(channels, at)) for at in range(1, images.shape[channels])):
            raise ValueError(f"{expected}, {found}: the {images.shape[channels]} channels differ, so it is in colour")
        images = first
    if images.ndim != 3 or 0 in images.shape[1:]:
        raise ValueError(f"{expected}, {found}")
    if images.dtype == torch.uint8 or not images.numel():
        return images.to(torch.uint8)
    if images.is_floating_point():
        images = images.double() * (255 if images.max() <= 1 else 1)
    whole = images.round() if images.is_floating_point() else images
    if not (images - whole).abs().max() < 1e-3 or whole.min() < 0 or whole.max() > 255:
        raise ValueError(f"{expected}, {found} with values from {values.min()} to {values.max()}")
    return whole.to(torch.uint8)


def as_labels(values: Tensor, path: Path) -> Tensor:
    """Returns the labels of a file as int64, in the shape that they have.

    Raises:
        ValueError: the values are not whole numbers.
    """
    if values.is_floating_point() and not torch.equal(values, values.round()):
        raise ValueError(f"{path}: expected labels, which are whole numbers, found {described(values)}")
    return values.long()


def described(values: Tensor) -> str:
    """Returns type and shape of values as text."""
    return f"{values.dtype} of shape {tuple(values.shape)}".removeprefix("torch.")


# --- finding ------------------------------------------------------------------------------------------------------


def find_files(folders: list[Path], stems: list[str]) -> list[Path] | None:
    """Returns the files of the first folder that holds all of them; None if no folder does."""
    for folder in folders:
        paths = [find_file(folder, stem) for stem in stems]
        if all(paths):
            return [path for path in paths if path]
    return None


def find_file(folder: Path, stem: str) -> Path | None:
    """Returns the file of a published name, e.g. `train-images-idx3-ubyte`; None if the folder lacks it.

    The file may be packed, and it may be spelled as `train-images.idx3-ubyte`, which some pages publish.
    """
    exact = next((path for path in (folder / stem, folder / f"{stem}.gz") if path.is_file()), None)
    if exact or not folder.is_dir():
        return exact
    spellings = {stem, stem.removesuffix("-ubyte").removesuffix("-int")}
    return next((path for path in sorted(folder.iterdir()) if _spelled(path) in spellings and path.is_file()), None)


def _spelled(path: Path) -> str:
    """Returns a file's name as the published ones are spelled: lower case, with hyphens, without `.gz`."""
    return re.sub(r"[._ ]+", "-", path.name.lower()).removesuffix("-gz")


def candidate_folders(root: Path, name: str, *, unmistakable: bool) -> list[Path]:
    """Returns the folders that may hold a data set's files, the published place first.

    Besides `root/NAME/raw` these are the places that a root one or two folders too deep, or one too high, points at.
    A folder that is not named after the data set is among them only if the names of the files are.

    Args:
        name: of the data set's folder, e.g. FashionMNIST.
        unmistakable: the names of the files say which data set they belong to. MNIST, FashionMNIST and KMNIST
            publish files of equal names.
    """
    here = root.absolute()
    inside = _is_called(here.name, name) or (here.name == "raw" and _is_called(here.parent.name, name))
    found = [root / name / "raw", *_folders(root, name)]
    found += [each for child in _children(root) for each in _folders(child, name)]
    found += [root / "raw", root] if inside or unmistakable else []
    return list(dict.fromkeys(each for folder in found for each in (folder, folder / "gzip")))


def _folders(folder: Path, name: str) -> list[Path]:
    """Returns the folders in `folder` that are called like the data set, and the folder `raw` in each."""
    return [each for child in _children(folder) if _is_called(child.name, name) for each in (child / "raw", child)]


def _children(folder: Path) -> list[Path]:
    try:
        return sorted(child for child in folder.iterdir() if child.is_dir())
    except OSError:
        return []


def _is_called(text: str, name: str) -> bool:
    return re.sub(r"[^a-z]", "", text.lower()) == name.lower()
