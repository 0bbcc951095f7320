"""Augmentation: random changes of a batch of images, all of them in a few operations on the device.

Geometry and colours are those of `torchvision.transforms.v2`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mnist_dist.data import colours, mixing
from mnist_dist.data.images import as_numbers, per_channel
from mnist_dist.data.randaugment import LARGEST_MAGNITUDE, OPERATIONS, apply_operation
from mnist_dist.data.warps import Size, affine_grid, affine_matrices, count_knots, elastic_shift, sample

LARGEST_ALPHA = 100.0

OTHERS = (
    "flip", "crop_padding", "brightness", "contrast", "saturation", "randaugment", "cutout", "mixup", "cutmix",
)  # fmt: skip
"""Names of the changes that are not warps."""


@dataclass(frozen=True)
class Augmentation:
    """A distribution of random changes, applied in this order: crop, flip, warp, colours, RandAugment, cutout, mixing.

    Args:
        flip: mirror every second image, left to right.
        crop_padding: pixels; the image is padded by its reflection on all sides, then cropped at a random place.
        rotation: degrees; the angle is uniform in ±rotation.
        translation: fraction of the image's side; the shift is uniform in ±translation, rounded to whole pixels as in
            torchvision.
        scale: (lowest, highest) zoom factor, uniform; None for no zoom.
        shear: degrees along x; the angle is uniform in ±shear.
        interpolation: "nearest" (torchvision's default) or "bilinear".
        fill: level, 0 to 255, of pixels that come from outside the image: one number, or one for each channel.
        elastic: pixels; the standard deviation of each pixel's displacement, along x and along y. The smoothed noise of
            Simard, Steinkraus, Platt, "Best practices for convolutional neural networks applied to visual document
            analysis", ICDAR 2003, has 1.4 pixels with their alpha of 34 and sigma of 4.
        elastic_sigma: pixels; the sigma of Simard et al., the width of the Gaussian that smooths the displacements.
        brightness, contrast, saturation: fractions; the factor of the change is uniform in 1 ± fraction.
        randaugment: (operations of an image, magnitude 0 to 30), as in torchvision's RandAugment; None for none.
        cutout: pixels; side of a square at a random place that gets the level `fill`.
        mixup, cutmix: alpha of Beta(alpha, alpha), the distribution of an image's share in the mixture with a partner
            from the same global batch; 0 for no mixture. With both, each image gets one of the two.

    Raises:
        ValueError: a value is out of range.
    """

    flip: bool = False
    crop_padding: int = 0
    rotation: float = 0.0
    translation: float = 0.0
    scale: tuple[float, float] | None = None
    shear: float = 0.0
    interpolation: str = "nearest"
    fill: float | Sequence[float] = 0.0
    elastic: float = 0.0
    elastic_sigma: float = 4.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    randaugment: tuple[int, int] | None = None
    cutout: int = 0
    mixup: float = 0.0
    cutmix: float = 0.0

    WARP_DRAWS: ClassVar[int] = 5
    """Random numbers of an affine warp: angle, shift along x, shift along y, zoom, shear."""
    OTHER_DRAWS: ClassVar[int] = 12
    """Random numbers of the other changes except RandAugment: flip, crop (2), colours (3), cutout (2), mixing (4)."""
    SIMPLE: ClassVar[int] = 8
    """Numbers that describe them, without mixing: whether to flip, crop's offset, factors, cutout's corner."""

    def __post_init__(self) -> None:
        for name, value, low, high, what in self._ranges():
            if not low <= value <= high:
                raise ValueError(f"{name}: expected {what}, got {value}")
        if self.scale is not None and not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale: expected [lowest, highest] with 0 < lowest <= highest, got {list(self.scale)}")
        if not 0 <= self.shear < 90:
            raise ValueError(f"shear: expected degrees from 0 to below 90, got {self.shear}")
        if self.interpolation not in ("nearest", "bilinear"):
            raise ValueError(f"interpolation: expected nearest or bilinear, got {self.interpolation!r}")
        if not (levels := as_numbers(self.fill)) or not all(0 <= level <= 255 for level in levels):
            raise ValueError(f"fill: expected a level from 0 to 255, or one for each channel, got {self.fill}")
        if self.randaugment is not None:
            operations, magnitude = self.randaugment
            if not (1 <= operations <= 10 and 0 <= magnitude <= LARGEST_MAGNITUDE):
                message = f"expected [operations, magnitude], 1 to 10 and 0 to {LARGEST_MAGNITUDE}"
                raise ValueError(f"randaugment: {message}, got {list(self.randaugment)}")

    def _ranges(self) -> Iterator[tuple[str, float, float, float, str]]:
        """Yields name, value, lowest value, highest value and a description of the range."""
        largest = 1e6  # below the largest finite number, so that sums stay finite
        yield "rotation", self.rotation, 0, 180, "0 to 180 degrees"
        yield "translation", self.translation, 0, 1, "a fraction of the image's side, 0 to 1"
        yield "elastic", self.elastic, 0, largest, "at least 0 pixels"
        # A smaller sigma needs too much memory for its random numbers.
        yield "elastic_sigma", self.elastic_sigma, 3, largest, "at least 3 pixels"
        yield "crop_padding", self.crop_padding, 0, largest, "at least 0 pixels"
        yield "cutout", self.cutout, 0, largest, "at least 0 pixels"
        for name in ("brightness", "contrast", "saturation"):
            yield name, getattr(self, name), 0, 1, "a fraction from 0 to 1"
        for name in ("mixup", "cutmix"):
            yield name, getattr(self, name), 0, LARGEST_ALPHA, f"0 to {LARGEST_ALPHA:g}"

    def misfits(self, shape: tuple[int, int, int]) -> Iterator[tuple[str, str]]:
        """Yields the name and what is wrong for each value that does not fit images of this shape (C, H, W)."""
        channels, *size = shape
        if len(levels := as_numbers(self.fill)) not in (1, channels):
            yield "fill", f"expected 1 or {channels} levels, one for each channel; got {len(levels)}"
        if self.crop_padding >= min(size):
            yield "crop_padding", f"expected less than the image's side, {min(size)} pixels; got {self.crop_padding}"
        if self.cutout > min(size):
            yield "cutout", f"expected at most the image's side, {min(size)} pixels; got {self.cutout}"

    @property
    def is_identity(self) -> bool:
        """Whether no image can change."""
        return not self.warps_images and not self._others

    @property
    def warps_images(self) -> bool:
        """Whether an affine or elastic warp can move a pixel."""
        moves = self.rotation or self.translation or self.shear or self.elastic
        return bool(moves) or self.scale not in (None, (1.0, 1.0), [1.0, 1.0])

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with a partner."""
        return bool(self.mixup or self.cutmix)

    @property
    def _operations(self) -> int:
        return self.randaugment[0] if self.randaugment else 0

    @property
    def _others(self) -> bool:
        """Whether there are other changes than warps."""
        return any(getattr(self, name) for name in OTHERS)

    # --- from random numbers to changes -------------------------------------------------------------------------------

    @property
    def first_draw(self) -> int:
        """The column of the first random number of an image; 0 is that of the warp's angle.

        The other changes have negative columns. So the numbers of a warp are the same with and without other changes.
        """
        return -(self.OTHER_DRAWS + 2 * self._operations) if self._others else 0

    def count_draws(self, size: Size) -> int:
        """Returns how many random numbers the changes of one image need."""
        height, width = size
        knots = count_knots(height, self.elastic_sigma) * count_knots(width, self.elastic_sigma) if self.elastic else 0
        return (self.WARP_DRAWS + 2 * knots if self.warps_images else 0) - self.first_draw

    def changes(self, draws: Tensor, size: Size) -> Tensor:
        """Converts random numbers to the changes of images.

        Args:
            draws: float32 in [0, 1), shape (N, count_draws(size)).

        Returns:
            float32 (N, …): for other changes than warps SIMPLE numbers, `mixing.COLUMNS` numbers, and operation and
            sign of each operation of RandAugment; then the warp, flattened.
        """
        others, parts = draws[:, : -self.first_draw], []
        if self._others:
            parts = [self._simple_changes(others, size)]
            parts.append(mixing.mixing_parameters(others[:, -12:-8], size, self.mixup, self.cutmix))
            operation, sign = others[:, : 2 * self._operations].chunk(2, dim=1)
            parts.append((operation * len(OPERATIONS)).floor().clamp(max=len(OPERATIONS) - 1))
            parts.append(1 - 2 * (sign < 0.5).float())
        if self.warps_images:
            parts.append(self.warps(draws[:, -self.first_draw :], size).flatten(1))
        return torch.cat(parts, dim=1)

    def _simple_changes(self, others: Tensor, size: Size) -> Tensor:
        def whole(draw: Tensor, count: int) -> Tensor:
            """Returns whole numbers below `count`; the product may be rounded up to `count`."""
            return (draw * count).floor().clamp(max=count - 1)

        columns = [(others[:, -1] < 0.5).float()]
        columns += [whole(others[:, column], 2 * self.crop_padding + 1) for column in (-2, -3)]
        for column, fraction in ((-4, self.brightness), (-5, self.contrast), (-6, self.saturation)):
            draw = others[:, column]  # an unused factor takes one kernel instead of four
            columns.append(1 + fraction * (2 * draw - 1) if fraction else torch.ones_like(draw))
        for column, side in ((-7, size[0]), (-8, size[1])):
            columns.append(whole(others[:, column], side) - self.cutout // 2)
        return torch.stack(columns, dim=1)

    def warps(self, draws: Tensor, size: Size) -> Tensor:
        """Converts random numbers to warps.

        Args:
            draws: float32 in [0, 1), shape (N, 5), with `elastic` (N, 5 + 2 K).

        Returns:
            float32 (N, 2, 3): matrices from output to input, in coordinates from -1 to 1. Angles are clockwise and the
            order is shear, rotate, zoom, translate, as in torchvision. With `elastic`: (N, 2, 3 + K), where the last K
            columns hold the displacements of the knots for `elastic_shift`.
        """
        height, width = size
        signed = 2 * draws - 1
        angle = signed[:, 0] * math.radians(self.rotation)
        shifts = [signed[:, 1] * (self.translation * width), signed[:, 2] * (self.translation * height)]
        low, high = self.scale or (1.0, 1.0)
        zoom = low + (high - low) * draws[:, 3]
        shear = torch.tan(signed[:, 4] * math.radians(self.shear))
        matrices = affine_matrices(angle, torch.round(torch.stack(shifts, dim=1)), zoom, shear, size)
        if not self.elastic:
            return matrices
        # A uniform number in ±1 has standard deviation 1/√3. One pixel is 2/side in coordinates from -1 to 1.
        along_x, along_y = signed[:, self.WARP_DRAWS :].chunk(2, dim=1)
        deviation = math.sqrt(3) * self.elastic
        knots = torch.stack([along_x * (deviation * 2 / width), along_y * (deviation * 2 / height)], dim=1)
        return torch.cat([matrices, knots], dim=2)

    # --- from changes to images ---------------------------------------------------------------------------------------

    def apply(self, images: Tensor, changes: Tensor) -> Tensor:
        """Changes images, without mixing them.

        Args:
            images: uint8 or floating-point (N, C, H, W) of levels 0 to 255.
            changes: the return value of the method `changes`, a row for each image.

        Returns:
            The changed images, float32 (N, C, H, W).
        """
        simple, rest = changes[:, : self.SIMPLE], changes[:, self.SIMPLE + mixing.COLUMNS :]
        if not self._others:
            return self.warp(images.float(), changes.unflatten(1, (2, -1)))
        if self.flip or self.crop_padding:
            flip, rows, columns = simple[:, 0] > 0, simple[:, 1], simple[:, 2]
            images = crop_and_flip(images, rows, columns, self.crop_padding, flip if self.flip else None)
        images = images.float()
        if self.warps_images:
            images = self.warp(images, rest[:, 2 * self._operations :].unflatten(1, (2, -1)))
        if self.brightness:
            images = colours.adjust_brightness(images, simple[:, 3])
        if self.contrast:
            images = colours.adjust_contrast(images, simple[:, 4])
        if self.saturation:
            images = colours.adjust_saturation(images, simple[:, 5])
        if self.randaugment:
            images = images.round()
            for number in range(self._operations):
                operation, sign = rest[:, number], rest[:, self._operations + number]
                magnitude = self.randaugment[1]
                images = apply_operation(images, operation, sign, magnitude, self.interpolation, self.fill)
        if self.cutout:
            images = cut_out(images, simple[:, 6:8], self.cutout, self.fill)
        return images

    def warp(self, images: Tensor, warps: Tensor) -> Tensor:
        """Warps images.

        Args:
            images: floating-point (N, C, H, W) of levels 0 to 255.
            warps: the return value of the method `warps`, one for each image.
        """
        size = (images.shape[2], images.shape[3])
        grid = affine_grid(warps[:, :, :3], size)
        if self.elastic:
            grid = grid + elastic_shift(warps[:, :, 3:], size, self.elastic_sigma)
        return sample(images, grid, self.interpolation, self.fill)

    def mix(self, images: Tensor, partners: Tensor, changes: Tensor) -> Tensor:
        """Returns images mixed with their partners, both changed before; float32 (N, C, H, W)."""
        return mixing.mix_images(images, partners, self._mixing(changes))

    def mix_labels(self, labels: Tensor, partners: Tensor, changes: Tensor, classes: int) -> Tensor:
        """Returns the classes' probabilities, float32 (N, classes), for labels and partners' labels, int64 (N,)."""
        return mixing.mix_labels(labels, partners, self._mixing(changes), classes)

    def _mixing(self, changes: Tensor) -> Tensor:
        return changes[:, self.SIMPLE : self.SIMPLE + mixing.COLUMNS]


def crop_and_flip(images: Tensor, rows: Tensor, columns: Tensor, padding: int, flip: Tensor | None) -> Tensor:
    """Pads images by their reflection, crops them to their size, then mirrors some of them.

    Args:
        images: (N, C, H, W), any dtype.
        rows, columns: (N,), the crop's offset in the padded image, 0 to 2 × padding.
        padding: pixels, less than height and width.
        flip: bool (N,); None: no image is mirrored.
    """
    count, channels, height, width = images.shape

    def reflect(position: Tensor, side: int) -> Tensor:
        return (side - 1) - ((side - 1) - position.abs()).abs()

    y = torch.arange(height, device=images.device)
    x = torch.arange(width, device=images.device)[None]
    if flip is not None:
        x = torch.where(flip[:, None], width - 1 - x, x)
    y = reflect(y + (rows.long() - padding)[:, None], height)
    x = reflect(x + (columns.long() - padding)[:, None], width)
    source = (y[:, :, None] * width + x[:, None, :]).view(count, 1, height * width).expand(-1, channels, -1)
    return images.flatten(2).gather(2, source).view(images.shape)


def cut_out(images: Tensor, corners: Tensor, side: int, fill: float | Sequence[float]) -> Tensor:
    """Fills a square of each image, whose upper left corner may lie outside the image (DeVries, Taylor 2017).

    Args:
        images: float (N, C, H, W).
        corners: (N, 2), the row and the column of each corner in pixels.
        side: pixels.
    """
    height, width = images.shape[2:]
    distance = torch.arange(max(height, width), device=images.device) - corners[:, :, None]
    inside = (distance >= 0) & (distance < side)  # both axes at once: half the kernels on a GPU
    square = inside[:, 0, None, :height, None] & inside[:, 1, None, None, :width]
    return torch.where(square, per_channel(as_numbers(fill), images.device), images)
