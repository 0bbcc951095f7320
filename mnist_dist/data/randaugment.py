"""RandAugment (Cubuk et al., "RandAugment: Practical automated data augmentation", 2019) of a batch of images.

Each image gets its own operations. They are those of `torchvision.transforms.v2.RandAugment`, with its magnitudes. On a
CPU, each operation is computed for the images that drew it. On a GPU the host would wait for such a selection,
so there every operation is computed for all images, and one result is chosen for each.
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

GEOMETRY = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
"""Operations that are computed together, in one warp."""

COLOURS = ("Brightness", "Color", "Contrast", "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize")

OPERATIONS = ("Identity", *GEOMETRY, *COLOURS)
"""The operations, in torchvision's order."""

LARGEST_MAGNITUDE = 30

SELECTING_DEVICES = ("cpu",)
"""Devices on which an operation is computed only for the images that drew it. A GPU computes all operations for all
images: the host would wait for the number of selected images."""


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
    result = images.clone()
    selects = images.device.type in SELECTING_DEVICES and not torch.compiler.is_compiling()
    for first, last in ((GEOMETRY[0], GEOMETRY[-1]), *zip(COLOURS, COLOURS, strict=True)):
        chosen = (numbers >= OPERATIONS.index(first)) & (numbers <= OPERATIONS.index(last))
        rows = chosen.nonzero()[:, 0] if selects else slice(None)
        given = images[rows]
        if not len(given):
            continue
        if first in GEOMETRY:
            size = (images.shape[2], images.shape[3])
            grid = affine_grid(_matrices(numbers[rows], signs[rows], magnitude, size), size)
            changed = sample(given, grid, interpolation, fill).round()
        else:
            changed = _change_colours(first, given, signs[rows], magnitude)
        if selects:
            result[rows] = changed
        else:
            result = torch.where(_wide(chosen), changed, result)
    return result


def _change_colours(name: str, images: Tensor, signs: Tensor, magnitude: int) -> Tensor:
    """Applies an operation of `COLOURS` to all images."""
    change = _between(0.0, 0.9, magnitude)
    factor = torch.where(signs > 0, 1 + change, 1 - change)
    match name:
        case "Brightness":
            return colours.blend(images, 0.0, factor).floor()
        case "Color":
            grey = colours.to_grey(images).floor()
            return colours.blend(images, grey, factor).floor() if images.shape[1] == 3 else images
        case "Contrast":
            grey = colours.to_grey(images).floor()
            return colours.blend(images, grey.mean(dim=(1, 2, 3), keepdim=True), factor).floor()
        case "Sharpness":
            sharper = images + _wide(1 - factor) * (colours.blur(images) - images)
            return sharper.clamp(0, 255).floor()
        case "Posterize":
            return colours.posterize(images, round(8 - magnitude / (LARGEST_MAGNITUDE / 4)))
        case "Solarize":
            return colours.solarize(images, 255 * _between(1.0, 0.0, magnitude))
        case "AutoContrast":
            return colours.autocontrast(images).floor()
        case _:
            return colours.equalize(images)


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
