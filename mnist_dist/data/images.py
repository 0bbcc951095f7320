"""The types of a data set: labelled images as one uint8 tensor, and the parts a run trains and evaluates on."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

SIDE = 28
"""Height and width of every image, in pixels."""


@dataclass(frozen=True)
class Images:
    """Labelled images with the statistics that normalise them.

    Attributes:
        images: uint8 (N, 1, 28, 28); a bright figure on a dark ground, as in MNIST.
        labels: int64 (N,); positions in `classes`.
        classes: the name of each class.
        mean, std: of the grey levels of the complete training set, as fractions of 255.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    mean: float = 0.0
    std: float = 1.0

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: slice | Tensor) -> Images:
        return replace(self, images=self.images[rows], labels=self.labels[rows])

    def to(self, device: torch.device | str) -> Images:
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def normalize(self, images: Tensor) -> Tensor:
        """Normalises grey levels with this set's `mean` and `std`; see the function `normalize`."""
        return normalize(images, self.mean, self.std)


@dataclass(frozen=True)
class Dataset:
    """The parts of a data set.

    Attributes:
        train: the images to train on.
        held_out: the images for evaluation during training: the validation part of the training set if the recipe asks
            for one, else the test set.
        test: the test set.
    """

    train: Images
    held_out: Images
    test: Images

    @property
    def has_validation(self) -> bool:
        return self.held_out is not self.test


def normalize(images: Tensor, mean: float, std: float) -> Tensor:
    """Shifts and scales grey levels so that the training set has mean 0 and standard deviation 1.

    Args:
        images: grey levels 0 to 255, any dtype and shape.
        mean, std: of the training set, as fractions of 255.

    Returns:
        float32, the shape of `images`.
    """
    return (images.to(torch.float32) - 255 * mean) * (1 / (255 * std))


def grey_level_statistics(images: Tensor) -> tuple[float, float]:
    """Returns mean and standard deviation of uint8 images as fractions of 255, rounded to four decimals.

    Four decimals are customary: 0.1307 and 0.3081 for MNIST's training set.
    """
    counts = torch.bincount(images.flatten(), minlength=256).double()
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean = float((counts * levels).sum() / counts.sum())
    variance = float((counts * (levels - mean) ** 2).sum() / counts.sum())
    return round(mean, 4), round(variance**0.5, 4)
