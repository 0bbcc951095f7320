"""The data sets by name, and how one is read, divided and limited."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from mnist_dist.data.form import DataError, Form, Resize, fit_images
from mnist_dist.data.images import SHAPE, Dataset, Images, describe_shape, level_statistics
from mnist_dist.data.sources.arrays import TORCHVISION, call_function, is_data_code, read_npz, read_torchvision
from mnist_dist.data.sources.folder import read_csv, read_folder
from mnist_dist.data.sources.generated import make_digits, make_synthetic
from mnist_dist.data.sources.hub import PREFIX, read_hub
from mnist_dist.data.sources.mnist import read_emnist, read_mnist_like, read_qmnist, read_qmnist_50k
from mnist_dist.data.sources.request import Request, Splits, mixed_order
from mnist_dist.errors import did_you_mean

Source = Callable[[Request], Splits]
"""What to read -> training and test set, not yet normalised."""


def _published(read: Callable[[Request], tuple[Images, Images]]) -> Source:
    return lambda request: Splits(*read(request))


DATASETS: dict[str, Source] = {
    "mnist": _published(lambda request: read_mnist_like("MNIST", request.root, request.download)),
    "fashion_mnist": _published(lambda request: read_mnist_like("FashionMNIST", request.root, request.download)),
    "kmnist": _published(lambda request: read_mnist_like("KMNIST", request.root, request.download)),
    "qmnist": _published(lambda request: read_qmnist(request.root, request.download)),
    "emnist": _published(lambda request: read_emnist(request.root, request.split, request.download)),
    "digits": _published(lambda request: make_digits()),
    "synthetic": _published(lambda request: make_synthetic()),
    **dict.fromkeys(TORCHVISION, read_torchvision),
    "folder": read_folder,
    "npz": read_npz,
    "csv": read_csv,
}
"""Name in a recipe (`data.dataset`) -> source."""

TEST_SETS: dict[str, Callable[[Path, bool], Images]] = {"qmnist50k": read_qmnist_50k}
"""Name in a recipe (`data.test`) -> what reads these test images from a folder, and whether it may download them."""

OWN = ("folder", "npz", "csv")
"""Sources whose images are what `data.root` names, so this key changes the result."""

SHAPES: dict[str, tuple[int, int, int]] = {
    **{name: SHAPE for name in DATASETS if name not in OWN},
    **dict.fromkeys(TORCHVISION, (3, 32, 32)),
    "stl10": (3, 96, 96),
}
"""Channels, height and width of the images of published data sets."""


def find_source(name: str) -> Source:
    """Returns the source of a data set: a name of `DATASETS`, `hub:NAME`, or `package.module:function`.

    Only a person may name a function, never a file that a command reads.

    Raises:
        ValueError: there is no such data set.
    """
    if name in DATASETS:
        return DATASETS[name]
    if name.startswith(PREFIX) and len(name) > len(PREFIX):
        return read_hub
    if is_data_code(name):
        return call_function
    known = f"{', '.join(DATASETS)}; hub:NAME; your own function as my_package.data:load"
    raise ValueError(f"unknown data set {name!r}{did_you_mean(name, DATASETS)}\nknown: {known}")


def load_dataset(
    name: str,
    *,
    root: str | Path = "data",
    split: str | None = None,
    test: str | None = None,
    validation: int = 0,
    limit_train: int | None = None,
    limit_test: int | None = None,
    download: bool = True,
    image_size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    resize: Resize = "crop",
    on_bad_image: Literal["stop", "skip"] = "stop",
) -> Dataset:
    """Reads a data set into memory, or maps its decoded images into memory.

    Args:
        name: see `find_source`.
        root: the folder that holds `MNIST/raw`, `EMNIST/raw` and so on, in torchvision's layout; for `folder`, `npz`
            and `csv` the folder or the file itself.
        split: EMNIST's split: balanced, byclass, bymerge, letters, digits or mnist. None for balanced.
        test: a name of `TEST_SETS`, which replaces the test images. None for the data set's own.
        validation: number of images at the end of the training set that become the validation set.
        limit_train: maximum number of training images, counted after the validation images are taken away.
        limit_test: maximum number of test images.
            A set that is sorted by class is brought into `mixed_order` before a part of it is taken.
        download: download missing files into `root`.
        image_size, channels, resize: see `Form`; a number is the side of a square.
        on_bad_image: see `Request`.

    Raises:
        ValueError: the name or the split is unknown, a size leaves no images, or a file is damaged. A `DataError` names
            the recipe key.
        FileNotFoundError: files are missing and were not downloaded.
        ImportError: the data set `digits` without scikit-learn, or one of the hub without `datasets`.
    """
    source = find_source(name)
    if split is not None and name != "emnist":
        raise ValueError(f"only emnist has splits; {name} has no split {split!r}")
    if validation < 0 or any(limit is not None and limit < 1 for limit in (limit_train, limit_test)):
        raise ValueError(
            f"expected validation >= 0, limit_train >= 1 and limit_test >= 1, "
            f"got {validation=}, {limit_train=}, {limit_test=}"
        )
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    form = Form(size, channels, resize)
    splits = source(Request(name, Path(root), split or "balanced", download, form, on_bad_image))
    if test is not None:
        splits = replace(splits, test=TEST_SETS[test](Path(root), download))
    return _arrange(_fitted(splits, form), name, validation, limit_train, limit_test)


def _fitted(splits: Splits, form: Form) -> Splits:
    """Brings all parts into the form and gives them the statistics of the training images.

    Raises:
        DataError: the parts have images of different shapes.
    """
    parts = [replace(part, images=fit_images(part.images, form)) for part in splits.parts]
    shapes = dict.fromkeys(part.shape for part in parts)
    if len(shapes) > 1:
        described = " and ".join(describe_shape(shape) for shape in shapes)
        message = f"training and test images differ: {described}; set data.image_size and data.channels"
        raise DataError("image_size", message, "missing")
    # Computed before the set is divided and limited: fewer training images must not change the normalisation.
    mean, std = level_statistics(parts[0].images)
    train, test, *validation = (replace(part, mean=mean, std=std) for part in parts)
    return replace(splits, train=train, test=test, validation=validation[0] if validation else None)


def _arrange(splits: Splits, name: str, validation: int, limit_train: int | None, limit_test: int | None) -> Dataset:
    """Divides the training set into training and validation images, and applies the limits."""
    train, test = splits.train, splits.test
    if validation and splits.validation is not None:
        message = f"{name} brings {len(splits.validation):,} validation images of its own; remove this key"
        raise DataError("validation", message, "conflict")
    if validation >= len(train):
        message = f"validation={validation} leaves none of the {len(train):,} training images to train on"
        raise DataError("validation", message, "conflict")
    if not splits.mixed:
        if limit_test and is_sorted_by_class(test.labels):
            test = test[mixed_order(test.labels)]
        if (validation or limit_train) and is_sorted_by_class(train.labels):
            train = train[mixed_order(train.labels)]
    test = test[slice(limit_test)]
    held_out = train[slice(len(train) - validation, None)] if validation else splits.validation or test
    train = train[slice(len(train) - validation)][slice(limit_train)]
    return Dataset(train, held_out, test)


def is_sorted_by_class(labels: Tensor) -> bool:
    """Returns whether neighbours are of the same class much more often than by chance."""
    shares = torch.bincount(labels).double() / max(len(labels), 1)
    changes = int((labels[1:] != labels[:-1]).sum())
    return changes < (len(labels) - 1) * float(1 - (shares**2).sum()) / 2
