"""Data sets as uint8 tensors: the MNIST family through torchvision, scikit-learn's digits, and synthetic images.

Files are read straight from the IDX files, packed or not, so a read-only folder serves as well as a downloaded one.
torchvision downloads what is missing and checks the published sums; a packed file carries its own checksum besides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from mnist_dist.data.augment import normalize

SIDE = 28


@dataclass(frozen=True)
class Images:
    """A set of labelled images that knows how it is normalised.

    `images`: uint8 (N, 1, 28, 28), ink bright on dark. `labels`: int64 (N,), positions in `classes`. `mean` and `std`
    are those of the whole training set's grey levels as fractions of 255.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    mean: float = 0.0
    std: float = 1.0

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: slice) -> Images:
        return replace(self, images=self.images[rows], labels=self.labels[rows])

    def to(self, device: torch.device | str) -> Images:
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def normalize(self, images: Tensor) -> Tensor:
        """Grey levels 0..255, any dtype, to float32 with the training set's mean 0 and standard deviation 1."""
        return normalize(images, self.mean, self.std)


@dataclass(frozen=True)
class Dataset:
    """A training set, what it is judged on while training (`held_out`), and the test set.

    `held_out` is the validation part of the training set where one was asked for, else the test set itself.
    """

    train: Images
    held_out: Images
    test: Images

    @property
    def has_validation(self) -> bool:
        return self.held_out is not self.test


Splits = tuple[Images, Images]  # training, test


Loader = Callable[[Path, str, bool], Splits]  # of (root, split, download)


def grey_level_statistics(images: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of uint8 images as fractions of 255, to the four decimals the field quotes.

    For MNIST's training set these are the customary 0.1307 and 0.3081.
    """
    counts = torch.bincount(images.flatten(), minlength=256).double()
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean = float((counts * levels).sum() / counts.sum())
    variance = float((counts * (levels - mean) ** 2).sum() / counts.sum())
    return round(mean, 4), round(variance**0.5, 4)
