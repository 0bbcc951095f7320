"""The data sets by name, and how one is read, divided and limited."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mnist_dist.data.images import Dataset, Images, level_statistics
from mnist_dist.data.sources.generated import make_digits, make_synthetic
from mnist_dist.data.sources.mnist import read_emnist, read_mnist_like, read_qmnist

Source = Callable[[Path, str, bool], tuple[Images, Images]]
"""(root, EMNIST split, whether a download is allowed) -> training and test set, not yet normalised."""

# An entry passes on only the arguments that its data set needs.
DATASETS: dict[str, Source] = {
    "mnist": lambda root, split, download: read_mnist_like("MNIST", root, download),
    "fashion_mnist": lambda root, split, download: read_mnist_like("FashionMNIST", root, download),
    "kmnist": lambda root, split, download: read_mnist_like("KMNIST", root, download),
    "qmnist": lambda root, split, download: read_qmnist(root, download),
    "emnist": read_emnist,
    "digits": lambda root, split, download: make_digits(),
    "synthetic": lambda root, split, download: make_synthetic(),
}
"""Name in a recipe (`data.dataset`) -> source."""


def load_dataset(
    name: str,
    *,
    root: str | Path = "data",
    split: str | None = None,
    validation: int = 0,
    limit_train: int | None = None,
    limit_test: int | None = None,
    download: bool = True,
) -> Dataset:
    """Reads a data set into memory.

    Args:
        name: a key of `DATASETS`.
        root: the folder that holds `MNIST/raw`, `EMNIST/raw` and so on, in torchvision's layout.
        split: EMNIST's split: balanced, byclass, bymerge, letters, digits or mnist. None for balanced.
        validation: number of images at the end of the training set that become the validation set.
        limit_train: maximum number of training images, counted after the validation images are taken away.
        limit_test: maximum number of test images.
            A set that is sorted by class is brought into `mixed_order` before a part of it is taken.
        download: download missing files into `root`.

    Raises:
        ValueError: the name or the split is unknown, a size leaves no images, or a file is damaged.
        FileNotFoundError: files are missing and were not downloaded.
        ImportError: the data set `digits` without scikit-learn.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}; known: {', '.join(DATASETS)}")
    if split is not None and name != "emnist":
        raise ValueError(f"only emnist has splits; {name} has no split {split!r}")
    if validation < 0 or any(limit is not None and limit < 1 for limit in (limit_train, limit_test)):
        raise ValueError(
            f"expected validation >= 0, limit_train >= 1 and limit_test >= 1, "
            f"got {validation=}, {limit_train=}, {limit_test=}"
        )
    train, test = DATASETS[name](Path(root), split or "balanced", download)
    if validation >= len(train):
        raise ValueError(f"validation={validation} leaves none of the {len(train):,} training images to train on")
    # Computed before the set is divided and limited: fewer training images must not change the normalisation.
    mean, std = level_statistics(train.images)
    train, test = (replace(part, mean=mean, std=std) for part in (train, test))
    if limit_test and is_sorted_by_class(test.labels):
        test = test[mixed_order(test.labels)]
    if (validation or limit_train) and is_sorted_by_class(train.labels):
        train = train[mixed_order(train.labels)]
    test = test[slice(limit_test)]
    held_out = train[slice(len(train) - validation, None)] if validation else test
    train = train[slice(len(train) - validation)][slice(limit_train)]
    return Dataset(train, held_out, test)


def is_sorted_by_class(labels: Tensor) -> bool:
    """Returns whether neighbours are of the same class much more often than by chance."""
    shares = torch.bincount(labels).double() / max(len(labels), 1)
    changes = int((labels[1:] != labels[:-1]).sum())
    return changes < (len(labels) - 1) * float(1 - (shares**2).sum()) / 2


def mixed_order(labels: Tensor) -> Tensor:
    """Returns an order of rows in which every part, from either end, holds all classes in their shares of the set.

    Args:
        labels: int64 (N,).

    Returns:
        int64 (N,), a permutation; a function of the labels.
    """
    generator = torch.Generator().manual_seed(20_231)
    place = torch.empty(len(labels), dtype=torch.float64)
    for label in labels.unique().tolist():
        rows = (labels == label).nonzero()[:, 0]
        # The rows of a class, shuffled and spread evenly over the range from 0 to 1.
        ranks = torch.randperm(len(rows), generator=generator) + torch.rand(1, generator=generator)
        place[rows] = ranks.double() / len(rows)
    return place.argsort(stable=True)
