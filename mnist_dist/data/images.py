"""The types of a data set: labelled images as one uint8 tensor, and the parts a run trains and evaluates on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

SIDE = 28
"""Height and width of the MNIST family's images, in pixels."""

SHAPE = (1, SIDE, SIDE)
"""Channels, height and width of the MNIST family's images; weights files without a shape are of such images."""


@dataclass(frozen=True)
class Images:
    """Labelled images with the statistics that normalise them.

    Attributes:
        images: uint8 (N, C, H, W); may be memory-mapped, and then is read-only.
        labels: int64 (N,); positions in `classes`.
        classes: the name of each class.
        mean, std: of each channel of the complete training set, as fractions of 255: C numbers each.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of each image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def __getitem__(self, rows: slice | Tensor) -> Images:
        return replace(self, images=self.images[rows], labels=self.labels[rows])

    def to(self, device: torch.device | str) -> Images:
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def normalize(self, images: Tensor) -> Tensor:
        """Normalises levels with this set's `mean` and `std`; see the function `normalize`."""
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


def describe_shape(shape: Sequence[int]) -> str:
    """Returns e.g. "28×28 pixels and 1 channel" for channels, height and width."""
    channels, height, width = shape
    return f"{height}×{width} pixels and {channels} channel{'s' * (channels > 1)}"


def normalize(images: Tensor, mean: float | Sequence[float], std: float | Sequence[float]) -> Tensor:
    """Shifts and scales levels so that each channel of the training set has mean 0 and standard deviation 1.

    Args:
        images: levels 0 to 255, any dtype, shape (…, C, H, W); any shape if there is only one mean.
        mean, std: of the training set, as fractions of 255: one number, or one for each channel.

    Returns:
        float32, the shape of `images`.
    """
    shift = per_channel([255 * each for each in as_numbers(mean)], images.device)
    scale = per_channel([1 / (255 * each) for each in as_numbers(std)], images.device)
    return (images.to(torch.float32) - shift) * scale


def as_numbers(values: float | Sequence[float]) -> tuple[float, ...]:
    """Returns the numbers of a list, or the number alone."""
    return (float(values),) if isinstance(values, int | float) else tuple(values)


def per_channel(values: Sequence[float], device: torch.device) -> float | Tensor:
    """Returns values in a form that can be combined with images (…, C, H, W): a single number, or float32 (C, 1, 1)."""
    if len(values) == 1:
        return values[0]
    # While a program is traced, a new tensor may be a fake one, which the cache must not keep.
    build = _channel_tensor.__wrapped__ if torch.compiler.is_compiling() else _channel_tensor
    return build(tuple(values), device)


@lru_cache(maxsize=64)
def _channel_tensor(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Returns float32 (C, 1, 1). It is cached, because a training step that copies to a GPU waits for the GPU."""
    with torch.inference_mode(False):
        return torch.tensor(values, device=device).view(-1, 1, 1)


def balanced_weights(labels: Tensor, classes: int) -> tuple[float, ...]:
    """Returns a weight for each class, so that all classes have the same share of the loss.

    The mean weight of an image is 1.

    Args:
        labels: int64 (N,).
    """
    counts = torch.bincount(labels.cpu(), minlength=classes).double()
    return tuple((len(labels) / (classes * counts.clamp(min=1))).tolist())


CHUNK = 2**26
"""Bytes of images that are counted at once."""


def level_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns mean and standard deviation of each channel as fractions of 255, rounded to four decimals.

    Four decimals are customary: 0.1307 and 0.3081 for MNIST's training set. A channel of one level has the deviation 1,
    because a division by 0 would follow.

    Args:
        images: uint8 (N, C, H, W).
    """
    channels = images.shape[1]
    counts = torch.zeros(channels, 256, dtype=torch.float64)
    for part in images.split(max(1, CHUNK // max(1, images[:1].numel()))):
        for channel in range(channels):
            counts[channel] += torch.bincount(part[:, channel].flatten(), minlength=256).cpu()
    levels = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for count in counts:
        mean = float((count * levels).sum() / count.sum())
        variance = float((count * (levels - mean) ** 2).sum() / count.sum())
        means.append(round(mean, 4))
        stds.append(round(variance**0.5, 4) or 1.0)
    return tuple(means), tuple(stds)
