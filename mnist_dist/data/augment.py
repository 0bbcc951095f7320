"""Augmentation: random affine and elastic warps of a batch of images in one operation.

The affine geometry is that of `torchvision.transforms.functional.affine`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Augmentation:
    """A distribution of random warps: an affine warp about the image's centre plus an elastic displacement.

    Args:
        rotation: degrees; the angle is uniform in ±rotation.
        translation: fraction of the image's side; the shift is uniform in ±translation, rounded to whole pixels as in
            torchvision.
        scale: (lowest, highest) zoom factor, uniform; None for no zoom.
        shear: degrees along x; the angle is uniform in ±shear.
        interpolation: "nearest" (torchvision's default) or "bilinear".
        fill: grey level, 0 to 255, of pixels that come from outside the image.
        elastic: pixels; the standard deviation of each pixel's displacement, along x and along y. The smoothed noise of
            Simard, Steinkraus, Platt, "Best practices for convolutional neural networks applied to visual document
            analysis", ICDAR 2003, has 1.4 pixels with their alpha of 34 and sigma of 4.
        elastic_sigma: pixels; the sigma of Simard et al., the width of the Gaussian that smooths the displacements.

    Raises:
        ValueError: a value is out of range.
    """

    rotation: float = 0.0
    translation: float = 0.0
    scale: tuple[float, float] | None = None
    shear: float = 0.0
    interpolation: str = "nearest"
    fill: float = 0.0
    elastic: float = 0.0
    elastic_sigma: float = 4.0

    DRAWS: ClassVar[int] = 5
    """Random numbers of an affine warp: angle, shift along x, shift along y, zoom, shear."""

    def __post_init__(self) -> None:
        if not 0 <= self.rotation <= 180:
            raise ValueError(f"rotation: expected 0 to 180 degrees, got {self.rotation}")
        if not 0 <= self.translation <= 1:
            raise ValueError(f"translation: expected a fraction of the image's side, 0 to 1, got {self.translation}")
        if self.scale is not None and not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale: expected [lowest, highest] with 0 < lowest <= highest, got {list(self.scale)}")
        if not 0 <= self.shear < 90:
            raise ValueError(f"shear: expected degrees from 0 to below 90, got {self.shear}")
        if self.interpolation not in ("nearest", "bilinear"):
            raise ValueError(f"interpolation: expected nearest or bilinear, got {self.interpolation!r}")
        if not 0 <= self.fill <= 255:
            raise ValueError(f"fill: expected a grey level from 0 to 255, got {self.fill}")
        if not 0 <= self.elastic < math.inf:
            raise ValueError(f"elastic: expected at least 0 pixels, got {self.elastic}")
        if not 3 <= self.elastic_sigma < math.inf:  # a smaller sigma needs too much memory for an epoch's draws
            raise ValueError(f"elastic_sigma: expected at least 3 pixels, got {self.elastic_sigma}")

    @property
    def is_identity(self) -> bool:
        """Whether no warp can move a pixel."""
        moves = self.rotation or self.translation or self.shear or self.elastic
        return not moves and self.scale in (None, (1.0, 1.0))

    def count_draws(self, side: int) -> int:
        """Returns how many random numbers the warp of one image needs."""
        return self.DRAWS + 2 * count_knots(side, self.elastic_sigma) ** 2 if self.elastic else self.DRAWS

    def warps(self, draws: Tensor, side: int) -> Tensor:
        """Converts random numbers to warps.

        Args:
            draws: float32 in [0, 1), shape (N, count_draws(side)).
            side: height and width of the images in pixels.

        Returns:
            float32 (N, 2, 3) for `affine_grid`: matrices from output to input, in coordinates from -1 to 1. Angles are
            clockwise and the order is shear, rotate, zoom, translate, as in torchvision. With `elastic`:
            (N, 2, 3 + K²), where the last K² columns hold the displacements of K × K knots for `elastic_shift`.
        """
        signed = 2 * draws - 1
        angle = signed[:, 0] * math.radians(self.rotation)
        shift = torch.round(signed[:, 1:3] * (self.translation * side))
        low, high = self.scale or (1.0, 1.0)
        zoom = low + (high - low) * draws[:, 3]
        shear = torch.tan(signed[:, 4] * math.radians(self.shear))
        matrices = affine_matrices(angle, shift, zoom, shear, side)
        if not self.elastic:
            return matrices
        # A uniform number in ±1 has standard deviation 1/√3. One pixel is 2/side in coordinates from -1 to 1.
        knots = signed[:, self.DRAWS :] * (math.sqrt(3) * self.elastic * 2 / side)
        return torch.cat([matrices, knots.view(len(draws), 2, -1)], dim=2)

    def apply(self, images: Tensor, warps: Tensor) -> Tensor:
        """Warps images.

        Args:
            images: floating-point (N, 1, side, side) of grey levels 0 to 255.
            warps: the return value of the method `warps`, one for each image.

        Returns:
            The warped images, with the shape and dtype of `images`.
        """
        side = images.shape[-1]
        grid = affine_grid(warps[:, :, :3], side)
        if self.elastic:
            grid = grid + elastic_shift(warps[:, :, 3:], side, self.elastic_sigma)
        # grid_sample pads with zeros, so the grey levels are shifted until zero is the fill.
        moved = images - self.fill if self.fill else images
        warped = F.grid_sample(moved, grid, mode=self.interpolation, padding_mode="zeros", align_corners=False)
        return warped + self.fill if self.fill else warped


def affine_matrices(angle: Tensor, shift: Tensor, zoom: Tensor, shear: Tensor, side: int) -> Tensor:
    """Returns matrices from output to input coordinates, float32 (N, 2, 3), in coordinates from -1 to 1.

    Args:
        angle: (N,), radians clockwise.
        shift: (N, 2), pixels along x and along y.
        zoom: (N,), factor.
        shear: (N,), tangent of the angle along x.
        side: height and width of the images in pixels.
    """
    cosine, sine = torch.cos(angle), torch.sin(angle)
    # The inverse of rotation × shear, whose determinant is 1; the next line inverts the zoom.
    inverse = torch.stack([cosine - sine * shear, sine + cosine * shear, -sine, cosine], dim=1).view(-1, 2, 2)
    inverse = inverse / zoom[:, None, None]
    offset = -(inverse @ shift[:, :, None]) / (side / 2)
    return torch.cat([inverse, offset], dim=2)


def affine_grid(warps: Tensor, side: int) -> Tensor:
    """Returns the sampling grid of affine warps.

    Equals `F.affine_grid(warps, (N, 1, side, side), align_corners=False)` up to rounding, in a quarter of its time on a
    CPU: `F.affine_grid` multiplies matrices of three columns, which are too narrow for a fast matrix product. This
    function scales and adds whole planes.

    Args:
        warps: (N, 2, 3), matrices from output to input, in coordinates from -1 to 1.

    Returns:
        (N, side, side, 2). In memory the plane of all x comes before the plane of all y.
    """
    centres = (2 * torch.arange(side, device=warps.device) + 1) / side - 1
    along_x, along_y, offset = warps[..., None, None].unbind(dim=2)
    return torch.addcmul(torch.addcmul(offset, along_y, centres[:, None]), along_x, centres).permute(0, 2, 3, 1)


def count_knots(side: int, sigma: float) -> int:
    """Returns the number of knots along one side, with at most `sigma` pixels between neighbours."""
    return math.ceil((side - 1) / sigma) + 1


def elastic_shift(knots: Tensor, side: int, sigma: float) -> Tensor:
    """Returns a smooth field of displacements from the displacements of the knots of a coarse square grid.

    Simard et al. draw one random number per pixel and smooth the image of numbers with a Gaussian. One knot every
    `sigma` pixels gives a field with the same correlation between pixels, exp(-distance² / (4 sigma²)), at a sixth of
    the cost. The weights are normalised so that every pixel, even at the border, has the knots' standard deviation.

    Args:
        knots: (N, 2, K²) with K = count_knots(side, sigma); independent displacements along x and along y.

    Returns:
        (N, side, side, 2), in the unit of the knots; to be added to the grid of `affine_grid`.
    """
    count = count_knots(side, sigma)
    pixels = torch.arange(side, device=knots.device, dtype=knots.dtype)
    positions = torch.arange(count, device=knots.device, dtype=knots.dtype) * ((side - 1) / (count - 1))
    weights = F.normalize(torch.exp(-0.5 * ((pixels[:, None] - positions) / sigma) ** 2), dim=1)
    return (weights @ knots.view(len(knots), 2, count, count) @ weights.T).permute(0, 2, 3, 1)
