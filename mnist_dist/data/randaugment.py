"""RandAugment (Cubuk et al., "RandAugment: Practical automated data augmentation", 2019) of a batch of images.

Each image gets its own operations. They are those of `torchvision.transforms.v2.RandAugment`, with its magnitudes. All
operations are computed for all images and one is selected for each: a selection of images would make a GPU wait.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from mnist_dist.data import colours
from mnist_dist.data.warps import Size, affine_grid, sample, scale_coordinates

OPERATIONS = (
    "Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate",
    "Brightness", "Color", "Contrast", "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize",
)  # fmt: skip
"""The operations, in torchvision's order."""

LARGEST_MAGNITUDE = 30


@lru_cache
def _between(low: float, high: float, magnitude: int) -> float:
    """Returns a value between `low` (magnitude 0) and `high` (magnitude 30), rounded as `torch.linspace` rounds it.

    Computed by NumPy: to read the content of a tensor is not possible while a step is traced.
    """
    step = np.float32((high - low) / LARGEST_MAGNITUDE)
    if magnitude <= LARGEST_MAGNITUDE // 2:
        return float(np.float32(low) + step * np.float32(magnitude))
    return float(np.float32(high) - step * np.float32(LARGEST_MAGNITUDE - magnitude))


def apply_operation(
    images: Tensor, numbers: Tensor, signs: Tensor, magnitude: int, interpolation: str, fill: float | Sequence[float]
) -> Tensor:
    """Applies one operation to each image.

    Args:
        images: float (N, C, H, W), whole levels 0 to 255.
        numbers: (N,), positions in `OPERATIONS`.
        signs: (N,), -1 or 1, the directions of shears, shifts and rotations and of changes of colour.
        magnitude: 0 to 30.

    Returns:
        The changed images, again whole levels with `nearest`.
    """

    def chosen(name: str) -> Tensor:
        return numbers == OPERATIONS.index(name)

    size = (images.shape[2], images.shape[3])
    grid = affine_grid(_matrices(numbers, signs, magnitude, size), size)
    moves = (numbers >= OPERATIONS.index("ShearX")) & (numbers <= OPERATIONS.index("Rotate"))
    result = torch.where(_wide(moves), sample(images, grid, interpolation, fill).round(), images)

    grey, change = colours.to_grey(images).floor(), _between(0.0, 0.9, magnitude)
    factor = torch.where(signs > 0, 1 + change, 1 - change)
    blends: dict[str, Tensor | float] = {"Brightness": 0.0, "Contrast": grey.mean(dim=(1, 2, 3), keepdim=True)}
    for name, other in (blends | ({"Color": grey} if images.shape[1] == 3 else {})).items():
        result = torch.where(_wide(chosen(name)), colours.blend(images, other, factor).floor(), result)
    sharper = images + _wide(1 - factor) * (colours.blur(images) - images)
    result = torch.where(_wide(chosen("Sharpness")), sharper.clamp(0, 255).floor(), result)

    bits = round(8 - magnitude / (LARGEST_MAGNITUDE / 4))
    for name, changed in {
        "Posterize": colours.posterize(images, bits),
        "Solarize": colours.solarize(images, 255 * _between(1.0, 0.0, magnitude)),
        "AutoContrast": colours.autocontrast(images).floor(),
        "Equalize": colours.equalize(images),
    }.items():
        result = torch.where(_wide(chosen(name)), changed, result)
    return result


def _wide(each: Tensor) -> Tensor:
    return each[:, None, None, None]


def _matrices(numbers: Tensor, signs: Tensor, magnitude: int, size: Size) -> Tensor:
    """Returns the warps of the geometric operations, (N, 2, 3); the identity for the other operations."""
    height, width = size

    def value(name: str, amount: float) -> Tensor:
        return torch.where(numbers == OPERATIONS.index(name), signs * amount, 0.0)

    shear = _between(0.0, 0.3, magnitude)
    shear_x, shear_y = value("ShearX", shear), value("ShearY", shear)
    shift_x = value("TranslateX", int(_between(0.0, 150.0 / 331.0 * width, magnitude)))
    shift_y = value("TranslateY", int(_between(0.0, 150.0 / 331.0 * height, magnitude)))
    angle = value("Rotate", math.radians(_between(0.0, 30.0, magnitude)))
    cosine, sine = torch.cos(angle), torch.sin(angle)
    # A shear keeps the upper left corner where it is, a rotation (anticlockwise) the centre.
    to_x = [cosine, shear_x - sine, shear_x * (height / 2) - shift_x]
    to_y = [shear_y + sine, cosine, shear_y * (width / 2) - shift_y]
    return scale_coordinates(torch.stack([*to_x, *to_y], dim=1).view(-1, 2, 3), size)
