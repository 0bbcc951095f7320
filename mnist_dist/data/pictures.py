"""Reads picture files into the format of MNIST.

MNIST scales a figure into 20×20 pixels and puts its centre of mass into the centre of 28×28 (LeCun et al.,
"Gradient-based learning applied to document recognition", 1998). The same is done here to a picture of any size, colour
or transparency, dark on light or light on dark.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from mnist_dist.data.images import SIDE

INK_SIDE = 20
"""Pixels of the longer side of the figure. export/draw.html computes the same with the same constants."""

FAINT = 0.2
"""Fraction of the strongest ink. Weaker pixels are paper, shadow or noise and do not count for the figure's extent."""

LEAST_CONTRAST = 16
"""Grey levels between background and strongest ink; blank paper has less."""

MOST_PIXELS = 100_000_000
"""Larger pictures are refused, because they would fill the memory."""


def read_picture(path: str | Path) -> Tensor:
    """Reads a picture file in the format of MNIST: uint8 (1, 28, 28), a bright figure on a dark ground.

    Raises:
        ValueError: the file cannot be read, is no picture, or is damaged, blank or too large; the message names which.
    """
    try:
        with Image.open(path) as file:
            if file.width * file.height > MOST_PIXELS:
                raise ValueError(f"too many pixels: {file.width:,}×{file.height:,}; at most {MOST_PIXELS:,}")
            picture = ImageOps.exif_transpose(file)
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise ValueError(error.strerror) from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"too many pixels; at most {MOST_PIXELS:,}") from error
    except ValueError:
        raise
    except Exception as error:  # Pillow raises exceptions of many types for damaged files
        raise ValueError("not a picture, or a damaged one") from error
    return _to_mnist(_extract_ink(_read_grey(picture)))


def _read_grey(picture: Image.Image) -> np.ndarray:
    """Returns the grey levels 0 to 255 of a picture, float32 (height, width)."""
    if picture.has_transparency_data:
        picture = _fill_transparency(picture.convert("RGBA"))
    if picture.mode.startswith("I"):  # 16 bits per pixel, which Pillow's conversion would clip at 255
        return np.asarray(picture).astype(np.float32) / np.float32(257)
    return np.asarray(picture.convert("RGB").convert("L"), dtype=np.float32)


def _fill_transparency(picture: Image.Image) -> Image.Image:
    """Puts an RGBA picture on a white background if its figure is dark, on black if its figure is light."""
    opacity = np.asarray(picture, dtype=np.float32)[..., 3]
    if opacity.min() == 255:
        return picture
    grey = np.asarray(picture.convert("RGB").convert("L"), dtype=np.float32)
    is_dark = (grey * opacity).sum() < 127.5 * opacity.sum()
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white" if is_dark else "black"), picture)


def _extract_ink(grey: np.ndarray) -> np.ndarray:
    """Returns the distance of each pixel from the background; the background is the median grey level of the border.

    Ink is darker or lighter than the background, whichever there is more of. The other is glare or shadow.
    """
    border = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    background = float(np.median(border))
    darker, lighter = np.clip(background - grey, 0, None), np.clip(grey - background, 0, None)
    return darker if darker.sum() > lighter.sum() else lighter


def _to_mnist(ink: np.ndarray) -> Tensor:
    """Scales the figure into 20×20 pixels and centres its mass in 28×28."""
    strongest = float(ink.max())
    if strongest < LEAST_CONTRAST:
        raise ValueError("the picture is blank")
    ink = np.clip(ink / strongest, 0, 1)
    rows, columns = np.nonzero(ink.max(axis=1) > FAINT)[0], np.nonzero(ink.max(axis=0) > FAINT)[0]
    figure = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = INK_SIDE / max(figure.shape)
    size = (max(1, round(figure.shape[1] * scale)), max(1, round(figure.shape[0] * scale)))
    small = Image.fromarray((255 * figure).astype(np.uint8)).resize(size, Image.Resampling.LANCZOS)
    values = np.asarray(small, dtype=np.float64)
    if not values.any():
        raise ValueError("the picture shows only specks, no figure")
    weights = values / values.sum()
    centre = [(weights.sum(axis=1 - axis) * np.arange(values.shape[axis])).sum() for axis in (0, 1)]
    canvas = np.zeros((SIDE, SIDE), dtype=np.uint8)
    top, left = (int(np.clip(round((SIDE - 1) / 2 - centre[axis]), 0, SIDE - values.shape[axis])) for axis in (0, 1))
    canvas[top : top + values.shape[0], left : left + values.shape[1]] = values
    return torch.from_numpy(canvas)[None]
