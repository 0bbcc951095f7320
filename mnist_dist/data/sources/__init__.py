"""Data sets by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mnist_dist.data.images import Dataset, Loader, grey_level_statistics
from mnist_dist.data.sources.generated import digits, synthetic
from mnist_dist.data.sources.mnist import emnist, mnist_like, qmnist


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
    """Reads a data set whole, downloading it into `root` first if it is missing and `download` allows.

    Args:
        name: one of `DATASETS`.
        root: the folder that holds `MNIST/raw` and its kin, as torchvision lays it out.
        split: EMNIST's split (balanced, byclass, bymerge, letters, digits, mnist).
        validation: the last so many training images are held out to be judged on instead of the test set.
        limit_train, limit_test: keep only the first so many images (after the validation part was taken away).

    Raises:
        ValueError: unknown name or split, sizes that leave nothing, a damaged file.
        FileNotFoundError: files are missing and could not be downloaded.
        ImportError: digits without scikit-learn.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}; known: {', '.join(DATASETS)}")
    if split is not None and name != "emnist":
        raise ValueError(f"only emnist has splits; {name} was asked for split {split!r}")
    if validation < 0 or any(limit is not None and limit < 1 for limit in (limit_train, limit_test)):
        raise ValueError(f"{validation=} is at least 0, {limit_train=} and {limit_test=} are at least 1")
    train, test = DATASETS[name](Path(root), split or "balanced", download)
    if validation >= len(train):
        raise ValueError(f"validation={validation} leaves nothing of the {len(train):,} training images")
    # Before anything is cut away: a smaller training set must not mean another normalisation.
    mean, std = grey_level_statistics(train.images)
    train, test = (replace(part, mean=mean, std=std) for part in (train, test))
    test = test[slice(limit_test)]
    held_out = train[slice(len(train) - validation, None)] if validation else test
    train = train[slice(len(train) - validation)][slice(limit_train)]
    return Dataset(train, held_out, test)


DATASETS: dict[str, Loader] = {
    "mnist": mnist_like("MNIST"),
    "fashion_mnist": mnist_like("FashionMNIST"),
    "kmnist": mnist_like("KMNIST"),
    "qmnist": qmnist,
    "emnist": emnist,
    "digits": digits,
    "synthetic": synthetic,
}
