"""The MNIST family: IDX files, read directly; torchvision downloads missing ones and verifies their MD5."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from mnist_dist.data.images import Images
from mnist_dist.data.sources.idx import (
    as_images,
    as_labels,
    candidate_folders,
    described,
    find_file,
    find_files,
    read_idx,
)

DIGITS = tuple("0123456789")
"""The class names of data sets of digits."""

MNIST_TEST = 10_000
"""Test images of MNIST."""


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
    tensors = _read_files(root, folder, stems, download, lambda to: torchvision_class()(to, download=True))
    classes = DIGITS if class_name == "MNIST" else tuple(torchvision_class().classes)
    return _train_and_test(tensors, classes, folder)


def read_qmnist(root: Path, download: bool) -> tuple[Images, Images]:
    """Reads QMNIST's training set and its test set of 60,000 images."""
    train, test = _read_qmnist(root, download, ("train", "test"))
    return train, test


def read_qmnist_50k(root: Path, download: bool) -> Images:
    """Reads the 50,000 test digits that QMNIST recovered, and that MNIST never published.

    Yadav and Bottou, "Cold Case: the Lost MNIST Digits", 2019, arXiv:1905.10498. The first 10,000 of QMNIST's 60,000
    test images are those of MNIST.
    """
    [test] = _read_qmnist(root, download, ("test",))
    if len(test) <= MNIST_TEST:
        folder = root / "QMNIST" / "raw"
        raise ValueError(f"{folder}: expected more than {MNIST_TEST:,} test images, found {len(test):,}")
    return test[MNIST_TEST:]


def _read_qmnist(root: Path, download: bool, parts: tuple[str, ...]) -> list[Images]:
    from torchvision import datasets

    contents = ("images-idx3-ubyte", "labels-idx2-int")
    stems = [f"qmnist-{part}-{content}" for part in parts for content in contents]
    folder = root / "QMNIST" / "raw"

    def fetch(to: Path) -> None:
        for part in parts:
            datasets.QMNIST(to, what=part, download=True)

    tensors = _read_files(root, folder, stems, download, fetch)
    # A row of QMNIST's label files has eight columns about the image and its writer; the first is the digit.
    if any(labels.ndim != 2 or not labels.shape[1] for labels in tensors[1::2]):
        raise ValueError(f"{folder}: expected QMNIST's labels as a table with the digit in its first column")
    pairs = zip(tensors[::2], tensors[1::2], strict=True)
    return [_pair(images, labels[:, 0], DIGITS, folder) for images, labels in pairs]


def read_emnist(root: Path, split: str, download: bool) -> tuple[Images, Images]:
    """Reads training and test set of one of EMNIST's splits."""
    from torchvision import datasets

    if split not in datasets.EMNIST.splits:
        raise ValueError(f"unknown EMNIST split {split!r}; known: {', '.join(datasets.EMNIST.splits)}")
    contents = ("images-idx3", "labels-idx1")
    stems = [f"emnist-{split}-{part}-{content}-ubyte" for part in ("train", "test") for content in contents]
    folder = root / "EMNIST" / "raw"
    tensors = _read_files(root, folder, stems, download, lambda to: datasets.EMNIST(to, split=split, download=True))
    classes = tuple(name for name in datasets.EMNIST.classes_split_dict[split] if name != "N/A")
    # EMNIST stores its images transposed. Its split `letters` numbers the labels from 1.
    first = 1 if split == "letters" else 0
    train_images, train_labels, test_images, test_labels = tensors
    upright = [train_images.mT, train_labels - first, test_images.mT, test_labels - first]
    return _train_and_test(upright, classes, folder)


# --- files --------------------------------------------------------------------------------------------------------


def _read_files(
    root: Path, folder: Path, stems: list[str], download: bool, fetch: Callable[[Path], object]
) -> list[Tensor]:
    """Reads IDX files: images and labels of each part, the training set first.

    Args:
        folder: the published place of the files, `root/NAME/raw`.
        stems: the published file names without `.gz`.
        fetch: downloads the files as torchvision does, into `folder` relative to a root that it takes.

    Returns:
        Images as uint8 (N, H, W); labels as int64, of the shape that their file has.
    """
    name = folder.parent.name
    folders = candidate_folders(root, name, unmistakable=stems[0].startswith(f"{name.lower()}-"))
    paths = find_files(folders, stems)
    if paths is None:
        failure = _download(root, folder, fetch) if download else ""
        paths = find_files([folder], stems)
        if paths is None:
            missing = ", ".join(stem for stem in stems if find_file(folder, stem) is None)
            raise FileNotFoundError(
                f"{folder} does not hold {missing} (plain or .gz){failure}{_elsewhere(root, name, stems)}"
            )
    contents = [read_idx(path) for path in paths]
    tensors = [
        as_labels(content, path) if index % 2 else as_images(content, path)
        for index, (content, path) in enumerate(zip(contents, paths, strict=True))
    ]
    if len({images.shape[1:] for images in tensors[::2]}) > 1:
        shapes = [f"{path}: found {described(content)}" for content, path in zip(contents, paths, strict=True)]
        raise ValueError(f"{shapes[0]}, but {shapes[2]}; training and test images need one size")
    return tensors


def _download(root: Path, folder: Path, fetch: Callable[[Path], object]) -> str:
    """Downloads the files; returns why that failed, with a comma and a blank before it, or an empty string."""
    new_folders = [each for each in (folder, folder.parent, root) if not each.exists()]
    try:
        _fetch_atomically(root, folder, fetch)
    except (OSError, RuntimeError) as error:
        for each in new_folders:  # torchvision creates its folders before it downloads
            with suppress(OSError):
                each.rmdir()
        return f", and the download failed: {error}"
    return ""


def _elsewhere(root: Path, name: str, stems: list[str]) -> str:
    """Returns a line about files of these names in a folder that is not named after the data set; or nothing."""
    paths = find_files([root, root / "raw"], stems)
    if paths is None:
        return ""
    message = f"{paths[0].parent} holds files of these names, but MNIST, FashionMNIST and KMNIST share the names"
    return f"\n{message}; if the files are those of {name}, move them to {root / name / 'raw'}"


def _fetch_atomically(root: Path, folder: Path, fetch: Callable[[Path], object]) -> None:
    """Downloads into a temporary folder in `root`, then renames the files: another process never reads half of one.

    Existing files are kept.
    """
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=root, ignore_cleanup_errors=True) as staged:
        fetch(Path(staged))
        folder.mkdir(parents=True, exist_ok=True)
        for source in sorted((Path(staged) / folder.relative_to(root)).iterdir()):
            if source.is_file() and not (folder / source.name).exists():
                with source.open("rb") as file:
                    os.fsync(file.fileno())  # a power failure after the rename would leave an empty file
                source.replace(folder / source.name)


def _train_and_test(tensors: list[Tensor], classes: tuple[str, ...], folder: Path) -> tuple[Images, Images]:
    """Returns training and test set from the tensors of the four files."""
    train, test = (_pair(tensors[i], tensors[i + 1], classes, folder) for i in (0, 2))
    return train, test


def _pair(images: Tensor, labels: Tensor, classes: tuple[str, ...], folder: Path) -> Images:
    """Joins images uint8 (N, H, W) and labels int64 (N,) after checking that they match."""
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
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
    return Images(images[:, None].contiguous(), labels, classes)
