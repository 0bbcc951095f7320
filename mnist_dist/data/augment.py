"""Random affine and elastic warps of a whole batch at once, with torchvision's affine geometry; then normalisation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Augmentation:
    """A distribution over affine warps about the image's centre, and elastic ones on top.

    Args:
        rotation: degrees; the angle is uniform in ±rotation.
        translation: fraction of the image's side; uniform in ±, rounded to whole pixels as torchvision does.
        scale: (lowest, highest) zoom, uniform; None for none.
        shear: degrees along x, uniform in ±.
        interpolation: "nearest" (torchvision's default) or "bilinear".
        fill: grey level, 0 to 255, of what comes in from outside the image.
        elastic: pixels; standard deviation of each pixel's displacement, along x and along y (Simard, Steinkraus,
            Platt, "Best practices for convolutional neural networks applied to visual document analysis", ICDAR 2003;
            their smoothed noise with alpha 34 and sigma 4 has 1.4).
        elastic_sigma: pixels; their sigma, the width of the Gaussian that makes neighbours move alike.

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

    DRAWS: ClassVar[int] = 5  # random numbers an affine warp needs: angle, x, y, zoom, shear

    def __post_init__(self) -> None:
        if not 0 <= self.rotation <= 180:
            raise ValueError(f"rotation is in degrees, 0 to 180, not {self.rotation}")
        if not 0 <= self.translation <= 1:
            raise ValueError(f"translation is a fraction of the side, 0 to 1, not {self.translation}")
        if self.scale is not None and not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale is [lowest, highest] with 0 < lowest <= highest, not {list(self.scale)}")
        if not 0 <= self.shear < 90:
            raise ValueError(f"shear is in degrees, 0 to below 90, not {self.shear}")
        if self.interpolation not in ("nearest", "bilinear"):
            raise ValueError(f"interpolation is nearest or bilinear, not {self.interpolation!r}")
        if not 0 <= self.fill <= 255:
            raise ValueError(f"fill is a grey level, 0 to 255, not {self.fill}")
        if not 0 <= self.elastic < math.inf:
            raise ValueError(f"elastic is in pixels, at least 0, not {self.elastic}")
        if not 3 <= self.elastic_sigma < math.inf:  # below, the random numbers of an epoch would fill the memory
            raise ValueError(f"elastic_sigma is in pixels, at least 3, not {self.elastic_sigma}")

    @property
    def is_identity(self) -> bool:
        moves = self.rotation or self.translation or self.shear or self.elastic
        return not moves and self.scale in (None, (1.0, 1.0))

    def count_draws(self, side: int) -> int:
        """Random numbers that a sample needs."""
        return self.DRAWS + 2 * count_knots(side, self.elastic_sigma) ** 2 if self.elastic else self.DRAWS

    def warps(self, draws: Tensor, side: int) -> Tensor:
        """Turns random numbers into warps.

        Args:
            draws: float32 in [0, 1), shape (N, count_draws(side)).
            side: pixels along one side of the square image.

        Returns:
            float32 (N, 2, 3): for `affine_grid`, from output to input in coordinates of -1 to 1. Angles run clockwise
            and the order is shear, rotate, zoom, translate, as in `torchvision.transforms.functional.affine`. With
            elastic (N, 2, 3 + K²), for `elastic_shift`: the displacements of K × K knots.
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
        # Uniform in ±1 has a deviation of 1/√3; a pixel is 2/side.
        knots = signed[:, self.DRAWS :] * (math.sqrt(3) * self.elastic * 2 / side)
        return torch.cat([matrices, knots.view(len(draws), 2, -1)], dim=2)

    def apply(self, images: Tensor, warps: Tensor) -> Tensor:
        """Warps float images (N, 1, H, W) of grey levels 0..255 by what `warps` gave; same shape and dtype."""
        side = images.shape[-1]
        grid = affine_grid(warps[:, :, :3], side)
        if self.elastic:
            grid = grid + elastic_shift(warps[:, :, 3:], side, self.elastic_sigma)
        # grid_sample pads with zeros: shift the grey scale so that zero is the fill.
        moved = images - self.fill if self.fill else images
        warped = F.grid_sample(moved, grid, mode=self.interpolation, padding_mode="zeros", align_corners=False)
        return warped + self.fill if self.fill else warped


def affine_matrices(angle: Tensor, shift: Tensor, zoom: Tensor, shear: Tensor, side: int) -> Tensor:
    """Inverse affine matrices, float32 (N, 2, 3), in coordinates of -1 to 1.

    Args:
        angle: radians, clockwise, (N,). shift: pixels (x, y), (N, 2). zoom: factor, (N,). shear: tangent along x, (N,).
    """
    cosine, sine = torch.cos(angle), torch.sin(angle)
    # Inverse of rotation × x-shear (determinant one), then of the zoom.
    inverse = torch.stack([cosine - sine * shear, sine + cosine * shear, -sine, cosine], dim=1).view(-1, 2, 2)
    inverse = inverse / zoom[:, None, None]
    offset = -(inverse @ shift[:, :, None]) / (side / 2)
    return torch.cat([inverse, offset], dim=2)


def affine_grid(warps: Tensor, side: int) -> Tensor:
    """`F.affine_grid` of square images without aligned corners, to the rounding, in a quarter of its time on a CPU.

    That one multiplies matrices of three columns, too narrow for it to pay; here planes are scaled and added.

    Args:
        warps: (N, 2, 3).

    Returns:
        (N, side, side, 2), the planes of x and y one after the other in memory.
    """
    centres = (2 * torch.arange(side, device=warps.device) + 1) / side - 1
    along_x, along_y, offset = warps[..., None, None].unbind(dim=2)
    return torch.addcmul(torch.addcmul(offset, along_y, centres[:, None]), along_x, centres).permute(0, 2, 3, 1)


def count_knots(side: int, sigma: float) -> int:
    """Knots along one side, at most `sigma` pixels from one to the next."""
    return math.ceil((side - 1) / sigma) + 1


def elastic_shift(knots: Tensor, side: int, sigma: float) -> Tensor:
    """A smooth field from the displacements of a coarse square grid: Gaussian noise filtered at a sixth of the cost.

    Simard et al. draw a number a pixel and smooth by a Gaussian. A knot every `sigma` pixels gives a field of the same
    correlation, exp(-distance² / 4 sigma²). The weights are scaled so that a field of independent knots has their
    deviation at every pixel, at the border too.

    Args:
        knots: (N, 2, K²), K as `count_knots` says.

    Returns:
        (N, side, side, 2), as `affine_grid`, in the unit of the knots.
    """
    count = count_knots(side, sigma)
    pixels = torch.arange(side, device=knots.device, dtype=knots.dtype)
    places = torch.arange(count, device=knots.device, dtype=knots.dtype) * ((side - 1) / (count - 1))
    weights = F.normalize(torch.exp(-0.5 * ((pixels[:, None] - places) / sigma) ** 2), dim=1)
    return (weights @ knots.view(len(knots), 2, count, count) @ weights.T).permute(0, 2, 3, 1)


def normalize(images: Tensor, mean: float, std: float) -> Tensor:
    """Grey levels 0..255, any dtype, to float32 with the training set's mean 0 and standard deviation 1."""
    return (images.to(torch.float32) - 255 * mean) * (1 / (255 * std))
