"""The MNIST family: IDX files, read directly, downloaded by torchvision if they are missing."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mnist_dist.data.images import SIDE, Images, Loader, Splits

# --- the MNIST family ---------------------------------------------------------------------------------------------


def read_idx(path: Path) -> Tensor:
    """Reads an IDX file, plain or gzip-packed: uint8 or int32 of any shape.

    Raises:
        ValueError: the file is damaged: not IDX, packed data broken, or longer or shorter than its header says.
    """
    data = path.read_bytes()
    try:
        content = gzip.decompress(data) if path.suffix == ".gz" else data
        zero, kind, dimensions = int.from_bytes(content[:2], "big"), content[2], content[3]
        dtype = np.dtype({0x08: "u1", 0x0C: ">i4"}[kind])
        shape = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions)]
        values = np.frombuffer(content, dtype, offset=4 + 4 * dimensions)
        if zero != 0 or not 1 <= dimensions <= 3:
            raise ValueError("no IDX header")
        return torch.from_numpy(values.reshape(shape).astype(dtype.newbyteorder("=")))
    except (ValueError, KeyError, IndexError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it to have it downloaded again") from error


def _locate(folder: Path, stem: str) -> Path | None:
    return next((path for path in (folder / stem, folder / f"{stem}.gz") if path.is_file()), None)


def _load_idx_family(
    root: Path, folder_name: str, stems: list[str], download_with: Callable[[], object], download: bool
) -> list[Tensor]:
    """The tensors of four IDX files: training images and labels, test images and labels."""
    folder = root / folder_name / "raw"
    if download and not all(_locate(folder, stem) for stem in stems):
        new = [place for place in (folder, folder.parent, root) if not place.exists()]
        try:
            download_with()
        except (OSError, RuntimeError) as error:
            for place in new:  # torchvision makes its folders before it downloads
                with suppress(OSError):
                    place.rmdir()
            raise FileNotFoundError(
                f"{folder} lacks some of {', '.join(stems)} (plain or .gz), and the download failed: {error}"
            ) from error
    paths = [_locate(folder, stem) for stem in stems]
    missing = [stem for stem, path in zip(stems, paths, strict=True) if path is None]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)} (plain or .gz)")
    return [read_idx(path) for path in paths if path is not None]


def _check_pairs(images: Tensor, labels: Tensor, classes: tuple[str, ...], folder: Path) -> Images:
    if images.ndim != 3 or images.shape[1:] != (SIDE, SIDE) or images.dtype != torch.uint8:
        raise ValueError(f"{folder}: expected uint8 images of {SIDE}×{SIDE}, found {tuple(images.shape)}")
    if labels.ndim != 1:
        raise ValueError(f"{folder}: expected one label an image, found a table of {tuple(labels.shape)}")
    if not len(labels):
        raise ValueError(f"{folder}: a file holds no labels")
    if len(images) != len(labels):
        raise ValueError(f"{folder}: {len(images)} images but {len(labels)} labels")
    if not 0 <= int(labels.min()) <= int(labels.max()) < len(classes):
        raise ValueError(
            f"{folder}: labels run from {labels.min()} to {labels.max()}, not from 0 to {len(classes) - 1}"
        )
    return Images(images[:, None].contiguous(), labels.long(), classes)


def _both_parts(tensors: list[Tensor], classes: tuple[str, ...], folder: Path) -> Splits:
    train, test = (_check_pairs(tensors[i], tensors[i + 1], classes, folder) for i in (0, 2))
    return train, test


DIGITS = tuple("0123456789")


def mnist_like(class_name: str) -> Loader:
    def load(root: Path, split: str, download: bool) -> Splits:
        def torchvision_class():  # its import costs a second, which MNIST at hand need not pay
            from torchvision import datasets

            return getattr(datasets, class_name)

        stems = [f"{part}-{what}-ubyte" for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1")]
        tensors = _load_idx_family(root, class_name, stems, lambda: torchvision_class()(root, download=True), download)
        folder = root / class_name / "raw"
        classes = DIGITS if class_name == "MNIST" else tuple(torchvision_class().classes)
        return _both_parts(tensors, classes, folder)

    return load


def qmnist(root: Path, split: str, download: bool) -> Splits:
    from torchvision import datasets

    stems = [f"qmnist-{part}-{what}" for part in ("train", "test") for what in ("images-idx3-ubyte", "labels-idx2-int")]

    def fetch() -> None:
        for what in ("train", "test"):
            datasets.QMNIST(root, what=what, download=True)

    tensors = _load_idx_family(root, "QMNIST", stems, fetch, download)
    folder = root / "QMNIST" / "raw"
    # Its label files carry eight columns about the writer; the first is the digit.
    if any(tensors[i].ndim != 2 or not tensors[i].shape[1] for i in (1, 3)):
        raise ValueError(f"{folder}: QMNIST's labels are a table, the digit in its first column; these are not")
    return _both_parts([tensors[0], tensors[1][:, 0], tensors[2], tensors[3][:, 0]], DIGITS, folder)


def emnist(root: Path, split: str, download: bool) -> Splits:
    from torchvision import datasets

    if split not in datasets.EMNIST.splits:
        raise ValueError(f"unknown EMNIST split {split!r}; known: {', '.join(datasets.EMNIST.splits)}")
    stems = [
        f"emnist-{split}-{part}-{what}-ubyte" for part in ("train", "test") for what in ("images-idx3", "labels-idx1")
    ]
    tensors = _load_idx_family(
        root, "EMNIST", stems, lambda: datasets.EMNIST(root, split=split, download=True), download
    )
    folder = root / "EMNIST" / "raw"
    # EMNIST stores its images transposed, and counts its letters from 1.
    classes = tuple(kind for kind in datasets.EMNIST.classes_split_dict[split] if kind != "N/A")
    first = 1 if split == "letters" else 0
    train_images, train_labels, test_images, test_labels = tensors
    upright = [train_images.mT, train_labels.long() - first, test_images.mT, test_labels.long() - first]
    return _both_parts(upright, classes, folder)
