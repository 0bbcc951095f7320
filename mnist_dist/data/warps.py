"""Warps of a batch of images: affine matrices, elastic displacements, and the sampling of warped images.

The affine geometry is that of `torchvision.transforms.v2.functional.affine`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mnist_dist.data.images import as_numbers, per_channel

Size = tuple[int, int]
"""Height and width in pixels."""


def affine_matrices(angle: Tensor, shift: Tensor, zoom: Tensor, shear: Tensor, size: Size) -> Tensor:
    """Returns matrices from output to input coordinates, float32 (N, 2, 3), in coordinates from -1 to 1.

    Args:
        angle: (N,), radians clockwise.
        shift: (N, 2), pixels along x and along y.
        zoom: (N,), factor.
        shear: (N,), tangent of the angle along x.
    """
    cosine, sine = torch.cos(angle), torch.sin(angle)
    # The inverse of rotation × shear, whose determinant is 1; the next line inverts the zoom.
    inverse = torch.stack([cosine - sine * shear, sine + cosine * shear, -sine, cosine], dim=1).view(-1, 2, 2)
    inverse = inverse / zoom[:, None, None]
    return scale_coordinates(torch.cat([inverse, -(inverse @ shift[:, :, None])], dim=2), size)


def scale_coordinates(matrices: Tensor, size: Size) -> Tensor:
    """Converts matrices (N, 2, 3) between pixels from the image's centre to matrices in coordinates from -1 to 1."""
    height, width = size
    (xx, xy, x), (yx, yy, y) = (row.unbind(dim=1) for row in matrices.unbind(dim=1))
    if height != width:
        xy, yx = xy * (height / width), yx * (width / height)
    return torch.stack([xx, xy, x / (width / 2), yx, yy, y / (height / 2)], dim=1).view(-1, 2, 3)


def affine_grid(warps: Tensor, size: Size) -> Tensor:
    """Returns the sampling grid of affine warps.

    Equals `F.affine_grid(warps, (N, 1, *size), align_corners=False)` up to rounding, in a quarter of its time on a CPU:
    `F.affine_grid` multiplies matrices of three columns, which are too narrow for a fast matrix product. This function
    scales and adds whole planes.

    Args:
        warps: (N, 2, 3), matrices from output to input, in coordinates from -1 to 1.

    Returns:
        (N, height, width, 2). In memory the plane of all x comes before the plane of all y.
    """
    y, x = ((2 * torch.arange(side, device=warps.device) + 1) / side - 1 for side in size)
    along_x, along_y, offset = warps[..., None, None].unbind(dim=2)
    return torch.addcmul(torch.addcmul(offset, along_y, y[:, None]), along_x, x).permute(0, 2, 3, 1)


def count_knots(side: int, sigma: float) -> int:
    """Returns the number of knots along one side, with at most `sigma` pixels between neighbours."""
    return math.ceil((side - 1) / sigma) + 1


def elastic_shift(knots: Tensor, size: Size, sigma: float) -> Tensor:
    """Returns a smooth field of displacements from the displacements of the knots of a coarse grid.

    Simard et al. draw one random number per pixel and smooth the image of numbers with a Gaussian. One knot every
    `sigma` pixels gives a field with the same correlation between pixels, exp(-distance² / (4 sigma²)), at a sixth of
    the cost. The weights are normalised so that every pixel, even at the border, has the knots' standard deviation.

    Args:
        knots: (N, 2, K) with K = the product of `count_knots` for height and width; independent displacements along x
            and along y.

    Returns:
        (N, height, width, 2), in the unit of the knots; to be added to the grid of `affine_grid`.
    """

    def weights(side: int) -> Tensor:
        count = count_knots(side, sigma)
        pixels = torch.arange(side, device=knots.device, dtype=knots.dtype)
        positions = torch.arange(count, device=knots.device, dtype=knots.dtype) * ((side - 1) / max(1, count - 1))
        return F.normalize(torch.exp(-0.5 * ((pixels[:, None] - positions) / sigma) ** 2), dim=1)

    vertical, horizontal = weights(size[0]), weights(size[1])
    grid = knots.view(len(knots), 2, vertical.shape[1], horizontal.shape[1])
    return (vertical @ grid @ horizontal.T).permute(0, 2, 3, 1)


def sample(images: Tensor, grid: Tensor, interpolation: str, fill: float | Sequence[float]) -> Tensor:
    """Returns the images sampled at a grid.

    Args:
        images: floating-point (N, C, H, W) of levels 0 to 255.
        grid: (N, H, W, 2), coordinates from -1 to 1.
        interpolation: "nearest" or "bilinear".
        fill: level outside the image: one number, or one for each channel.
    """
    levels = as_numbers(fill)
    if not any(levels):
        return F.grid_sample(images, grid, mode=interpolation, padding_mode="zeros", align_corners=False)
    # grid_sample pads with zeros, so the levels are shifted until zero is the fill.
    level = per_channel(levels, images.device)
    return F.grid_sample(images - level, grid, mode=interpolation, padding_mode="zeros", align_corners=False) + level
