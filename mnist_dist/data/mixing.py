"""Mixes each image and its label with a partner from the same global batch: mixup and CutMix.

Zhang et al., "mixup: Beyond empirical risk minimization", 2018; Yun et al., "CutMix: Regularization strategy to train
strong classifiers with localizable features", 2019. The geometry is that of `torchvision.transforms.v2.CutMix`.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from mnist_dist.data.warps import Size

COLUMNS = 6
"""Numbers that describe the mixing of an image: its share of each pixel outside the box (1 with CutMix); top, left,
bottom and right of the box, which shows the partner alone; weight of its own label."""

TABLE = 4096
"""Intervals of the table of a distribution function."""


def mixing_parameters(draws: Tensor, size: Size, mixup: float, cutmix: float) -> Tensor:
    """Returns how each image is mixed, float32 (N, COLUMNS). With both methods, each image gets one of them.

    Args:
        draws: float32 in [0, 1), shape (N, 4): choice of the method, column and row of the box's centre, share.
        mixup, cutmix: alpha of the distribution Beta(alpha, alpha) of the share; 0: not this method.
    """
    height, width = size
    nothing = torch.zeros_like(draws[:, 0])
    share = beta_quantiles(draws[:, 3], mixup) if mixup else nothing
    mixed = torch.stack([share, nothing, nothing, nothing, nothing, share], dim=1)
    if not cutmix:
        return mixed
    radius = 0.5 * torch.sqrt(1 - beta_quantiles(draws[:, 3], cutmix))
    edges = []
    for side, draw in ((height, draws[:, 2]), (width, draws[:, 1])):
        centre, half = (draw * side).floor().clamp(max=side - 1), (radius * side).floor()
        edges.append(((centre - half).clamp(min=0), (centre + half).clamp(max=side)))
    (top, bottom), (left, right) = edges
    weight = 1 - (bottom - top) * (right - left) / (height * width)
    cut = torch.stack([torch.ones_like(weight), top, left, bottom, right, weight], dim=1)
    return torch.where((draws[:, 0] < 0.5)[:, None], mixed, cut) if mixup else cut


def mix_images(images: Tensor, partners: Tensor, parameters: Tensor) -> Tensor:
    """Returns the mixed images, float (N, C, H, W).

    Args:
        parameters: (N, COLUMNS), as `mixing_parameters` returns them.
    """
    share, top, left, bottom, right, _ = parameters[..., None, None].unbind(dim=1)
    y = torch.arange(images.shape[2], device=images.device)[:, None]
    x = torch.arange(images.shape[3], device=images.device)
    in_box = (y >= top) & (y < bottom) & (x >= left) & (x < right)
    own = torch.where(in_box, 0.0, share)[:, None]
    return own * images + (1 - own) * partners


def mix_labels(labels: Tensor, partners: Tensor, parameters: Tensor, classes: int) -> Tensor:
    """Returns the probability of each class, float32 (N, classes).

    Args:
        labels, partners: int64 (N,).
    """
    numbers, weight = torch.arange(classes, device=labels.device), parameters[:, -1:]
    own, other = (numbers == labels[:, None]).float(), (numbers == partners[:, None]).float()
    return weight * own + (1 - weight) * other


def beta_quantiles(draws: Tensor, alpha: float) -> Tensor:
    """Converts uniform random numbers to random numbers of Beta(alpha, alpha), by the inverse distribution function."""
    table = _probabilities(alpha, draws.device)
    lower = torch.minimum(draws, 1 - draws)  # the distribution is symmetric about 1/2
    after = torch.searchsorted(table, lower, right=True).clamp(1, TABLE)
    start, end = table[after - 1], table[after]
    quantile = _from_grid((after - 1 + (lower - start) / (end - start)) * (1 / TABLE), alpha)
    return torch.where(draws < 0.5, quantile, 1 - quantile)


def _from_grid(position: Tensor, alpha: float) -> Tensor:
    """Converts positions from 0 to 1 to quantiles from 0 to 1/2.

    With alpha below 1 the density of the quantiles is infinite at 0. The power makes that of the positions finite.
    """
    return 0.5 * position ** max(1.0, 1 / alpha)


@lru_cache(maxsize=16)  # a copy to a GPU at every batch would wait for the GPU
def _probabilities(alpha: float, device: torch.device) -> Tensor:
    """Returns the probability below each of TABLE + 1 positions, float32; the last one is 1/2.

    The density is integrated by the trapezoidal rule.
    """
    position = torch.linspace(0, 1, TABLE + 1, dtype=torch.float64)
    # Density x^(alpha - 1) (1 - x)^(alpha - 1) times dx/dposition, up to a constant.
    density = position ** max(0.0, alpha - 1) * (1 - _from_grid(position, alpha)) ** (alpha - 1)
    areas = torch.cat([torch.zeros(1, dtype=torch.float64), (density[1:] + density[:-1]).cumsum(dim=0)])
    return (areas / (2 * areas[-1])).float().to(device)
