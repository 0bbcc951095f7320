"""Changes of the colours of a batch of images, with one parameter for each image.

They compute what `torchvision.transforms.v2.functional` computes for one image. Images are floating-point (N, C, H, W)
of levels 0 to 255.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = 256


def blend(images: Tensor, other: Tensor | float, factor: Tensor) -> Tensor:
    """Returns factor × images + (1 - factor) × other, limited to 0 to 255.

    Args:
        factor: (N,); 1 changes nothing.
    """
    factor = factor[:, None, None, None]
    return (images * factor + (1 - factor) * other).clamp(0, 255)


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Multiplies the levels by a factor, (N,)."""
    return (images * factor[:, None, None, None]).clamp(0, 255)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Multiplies the distance to the image's mean grey level by a factor, (N,)."""
    return blend(images, to_grey(images).mean(dim=(1, 2, 3), keepdim=True), factor)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Multiplies the distance to the grey image by a factor, (N,). Images without three channels are unchanged."""
    return blend(images, to_grey(images), factor) if images.shape[1] == 3 else images


def to_grey(images: Tensor) -> Tensor:
    """Returns the luminance (N, 1, H, W) of images with three channels, else the images."""
    if images.shape[1] != 3:
        return images
    red, green, blue = images.split(1, dim=1)
    return 0.2989 * red + 0.587 * green + 0.114 * blue


def blur(images: Tensor) -> Tensor:
    """Returns images smoothed by a 3×3 kernel whose centre weighs five times as much; the border is unchanged."""
    if min(images.shape[2:]) <= 2:
        return images
    inner = images[..., 1:-1, 1:-1]
    blurred = images.clone()
    blurred[..., 1:-1, 1:-1] = ((9 * F.avg_pool2d(images, 3, stride=1) + 4 * inner) / 13).round()
    return blurred


def posterize(images: Tensor, bits: int) -> Tensor:
    """Keeps the upper `bits` of the 8 bits of whole levels, and sets the others to 0."""
    step = 1 << (8 - bits)
    return (images / step).floor() * step


def solarize(images: Tensor, threshold: float) -> Tensor:
    """Inverts the levels that are not below a threshold."""
    return torch.where(images >= threshold, 255 - images, images)


def autocontrast(images: Tensor) -> Tensor:
    """Stretches the levels of each channel to 0 to 255."""
    low, high = images.amin(dim=(2, 3), keepdim=True), images.amax(dim=(2, 3), keepdim=True)
    flat = low == high
    scale = torch.where(flat, 1.0, (high - low) * (1 / 255))
    return ((images - torch.where(flat, 0.0, low)) / scale).clamp(0, 255)


def equalize(images: Tensor) -> Tensor:
    """Spreads the whole levels of each channel so that all are about equally frequent, as Pillow does."""
    pixels = images.flatten(2).long()
    counts = torch.zeros(*pixels.shape[:2], LEVELS, dtype=torch.int64, device=images.device)
    counts.scatter_add_(2, pixels, torch.ones_like(pixels))
    below = counts.cumsum(dim=2)
    brightest = counts.gather(2, below.argmax(dim=2, keepdim=True))
    step = (pixels.shape[2] - brightest) // 255
    table = ((below + step // 2) // step.clamp(min=1)).clamp(0, 255)
    table = F.pad(table[..., :-1], (1, 0))  # a level's new value depends on the pixels that are darker
    found = table.gather(2, pixels).view(images.shape).to(images.dtype)
    return torch.where((step > 0)[..., None], found, images)
