"""The MNIST family: IDX files, read directly; torchvision downloads missing ones.

The files may be plain or gzip-packed, and their folder may be read-only. torchvision verifies the MD5 of a download; a
packed file also contains a checksum of its own.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mnist_dist.data.images import SIDE, Images

DIGITS = tuple("0123456789")
"""The class names of data sets of digits."""


def read_mnist_like(class_name: str, root: Path, download: bool) -> tuple[Images, Images]:
    """Reads training and test set of MNIST, FashionMNIST or KMNIST, which have one file format.

    Args:
        class_name: the name of torchvision's class, which is also the name of the folder in `root`.
    """

    def torchvision_class():  # importing torchvision takes a second, which MNIST without a download does not need
        from torchvision import datasets

        return getattr(datasets, class_name)

    stems = [f"{part}-{content}-ubyte" for part in ("train", "t10k") for content in ("images-idx3", "labels-idx1")]
    folder = root / class_name / "raw"
    tensors = _read_files(root, folder, stems, download, lambda: torchvision_class()(root, download=True))
    classes = DIGITS if class_name == "MNIST" else tuple(torchvision_class().classes)
    return _train_and_test(tensors, classes, folder)


def read_qmnist(root: Path, download: bool) -> tuple[Images, Images]:
    """Reads QMNIST's training set and its test set of 60,000 images."""
    from torchvision import datasets

    contents = ("images-idx3-ubyte", "labels-idx2-int")
    stems = [f"qmnist-{part}-{content}" for part in ("train", "test") for content in contents]
    folder = root / "QMNIST" / "raw"

    def fetch() -> None:
        for part in ("train", "test"):
            datasets.QMNIST(root, what=part, download=True)

    tensors = _read_files(root, folder, stems, download, fetch)
    # A row of QMNIST's label files has eight columns about the image and its writer; the first is the digit.
    if any(tensors[i].ndim != 2 or not tensors[i].shape[1] for i in (1, 3)):
        raise ValueError(f"{folder}: expected QMNIST's labels as a table with the digit in its first column")
    return _train_and_test([tensors[0], tensors[1][:, 0], tensors[2], tensors[3][:, 0]], DIGITS, folder)


def read_emnist(root: Path, split: str, download: bool) -> tuple[Images, Images]:
    """Reads training and test set of one of EMNIST's splits."""
    from torchvision import datasets

    if split not in datasets.EMNIST.splits:
        raise ValueError(f"unknown EMNIST split {split!r}; known: {', '.join(datasets.EMNIST.splits)}")
    contents = ("images-idx3", "labels-idx1")
    stems = [f"emnist-{split}-{part}-{content}-ubyte" for part in ("train", "test") for content in contents]
    folder = root / "EMNIST" / "raw"
    tensors = _read_files(root, folder, stems, download, lambda: datasets.EMNIST(root, split=split, download=True))
    classes = tuple(name for name in datasets.EMNIST.classes_split_dict[split] if name != "N/A")
    # EMNIST stores its images transposed. Its split `letters` numbers the labels from 1.
    first = 1 if split == "letters" else 0
    train_images, train_labels, test_images, test_labels = tensors
    upright = [train_images.mT, train_labels.long() - first, test_images.mT, test_labels.long() - first]
    return _train_and_test(upright, classes, folder)


# --- files --------------------------------------------------------------------------------------------------------


def read_idx(path: Path) -> Tensor:
    """Reads an IDX file, plain or gzip-packed: uint8 or int32, of one to three dimensions.

    Raises:
        ValueError: the file is damaged: no IDX header, broken gzip data, or a size other than its header states.
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
        raise ValueError(f"{path} is damaged ({error}); delete it, and the next run downloads it again") from error


def _read_files(
    root: Path, folder: Path, stems: list[str], download: bool, fetch: Callable[[], object]
) -> list[Tensor]:
    """Reads four IDX files: training images, training labels, test images, test labels.

    Args:
        stems: the file names without `.gz`.
        fetch: downloads the files into `folder`.
    """
    if download and not all(_find(folder, stem) for stem in stems):
        new_folders = [each for each in (folder, folder.parent, root) if not each.exists()]
        try:
            fetch()
        except (OSError, RuntimeError) as error:
            for each in new_folders:  # torchvision creates its folders before it downloads
                with suppress(OSError):
                    each.rmdir()
            names = ", ".join(stems)
            raise FileNotFoundError(
                f"{folder} does not hold all of {names} (plain or .gz), and the download failed: {error}"
            ) from error
    paths = [_find(folder, stem) for stem in stems]
    if missing := [stem for stem, path in zip(stems, paths, strict=True) if path is None]:
        raise FileNotFoundError(f"{folder} does not hold {', '.join(missing)} (plain or .gz)")
    return [read_idx(path) for path in paths if path is not None]


def _find(folder: Path, stem: str) -> Path | None:
    return next((path for path in (folder / stem, folder / f"{stem}.gz") if path.is_file()), None)


def _train_and_test(tensors: list[Tensor], classes: tuple[str, ...], folder: Path) -> tuple[Images, Images]:
    """Returns training and test set from the tensors of the four files."""
    train, test = (_pair(tensors[i], tensors[i + 1], classes, folder) for i in (0, 2))
    return train, test


def _pair(images: Tensor, labels: Tensor, classes: tuple[str, ...], folder: Path) -> Images:
    """Joins images (N, 28, 28) and labels (N,) after checking that they match."""
    if images.ndim != 3 or images.shape[1:] != (SIDE, SIDE) or images.dtype != torch.uint8:
        found = f"{images.dtype} {tuple(images.shape)}".removeprefix("torch.")
        raise ValueError(f"{folder}: expected uint8 images of {SIDE}×{SIDE}, found {found}")
    if labels.ndim != 1:
        raise ValueError(f"{folder}: expected one label for each image, found a table of {tuple(labels.shape)}")
    if not len(labels):
        raise ValueError(f"{folder}: a file holds no labels")
    if len(images) != len(labels):
        raise ValueError(f"{folder}: {len(images)} images but {len(labels)} labels")
    if not 0 <= int(labels.min()) <= int(labels.max()) < len(classes):
        raise ValueError(
            f"{folder}: expected labels from 0 to {len(classes) - 1}, found {labels.min()} to {labels.max()}"
        )
    return Images(images[:, None].contiguous(), labels.long(), classes)
