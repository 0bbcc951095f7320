"""Picture files as MNIST images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

SIDE, INK_SIDE = 28, 20


FAINT = 0.2
"""Of the darkest ink: what is weaker is paper, shadow or noise, and no part of the figure's extent."""


LARGEST = 100_000_000
"""Pixels of a picture that is still opened."""


def read_picture(path: str | Path) -> Tensor:
    """A picture file as MNIST would have it: uint8 (1, 28, 28), ink bright on dark.

    Raises:
        ValueError: no picture, a damaged, a blank or a huge one; the message says which.
    """
    try:
        with Image.open(path) as file:
            if file.width * file.height > LARGEST:
                raise ValueError(f"{file.width:,}×{file.height:,} are too many pixels; at most {LARGEST:,}")
            picture = ImageOps.exif_transpose(file)
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise ValueError(error.strerror) from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"too many pixels; at most {LARGEST:,}") from error
    except ValueError:
        raise
    except Exception as error:  # Pillow raises a kind of its own for every sort of damage
        raise ValueError("not a picture, or a damaged one") from error
    return _as_mnist(_ink(picture))


def _ink(picture: Image.Image) -> np.ndarray:
    """float32 (height, width): how far each pixel is from the background, which is what most of the border shows."""
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        pixels = np.asarray(picture, dtype=np.float32)
        opacity = pixels[..., 3]
        if opacity.min() < 255:
            # Ink on nothing: put it on white if it is dark, on black if it is light.
            grey = np.asarray(picture.convert("RGB").convert("L"), dtype=np.float32)
            dark = (grey * opacity).sum() < 127.5 * opacity.sum()
            under = Image.new("RGBA", picture.size, "white" if dark else "black")
            picture = Image.alpha_composite(under, picture)
    if picture.mode.startswith("I"):  # 16 bits a pixel: Pillow would cut them off at 255
        grey = np.asarray(picture).astype(np.float32) / np.float32(257)
    else:
        grey = np.asarray(picture.convert("RGB").convert("L"), dtype=np.float32)
    border = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    background = float(np.median(border))
    # Ink is on one side of the background; what is beyond the other is glare or shadow.
    darker, lighter = np.clip(background - grey, 0, None), np.clip(grey - background, 0, None)
    return darker if darker.sum() > lighter.sum() else lighter


def _as_mnist(ink: np.ndarray) -> Tensor:
    strongest = float(ink.max())
    if strongest < 16:  # grey levels: less contrast than paper has with itself
        raise ValueError("no figure in it: the picture is blank")
    ink = np.clip(ink / strongest, 0, 1)
    rows, columns = np.nonzero(ink.max(axis=1) > FAINT)[0], np.nonzero(ink.max(axis=0) > FAINT)[0]
    figure = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = INK_SIDE / max(figure.shape)
    size = (max(1, round(figure.shape[1] * scale)), max(1, round(figure.shape[0] * scale)))
    small = Image.fromarray((255 * figure).astype(np.uint8)).resize(size, Image.Resampling.LANCZOS)
    values = np.asarray(small, dtype=np.float64)
    if not values.any():
        raise ValueError("no figure in it: only specks")
    weights = values / values.sum()
    centre = [(weights.sum(axis=1 - axis) * np.arange(values.shape[axis])).sum() for axis in (0, 1)]
    canvas = np.zeros((SIDE, SIDE), dtype=np.uint8)
    top, left = (int(np.clip(round((SIDE - 1) / 2 - centre[axis]), 0, SIDE - values.shape[axis])) for axis in (0, 1))
    canvas[top : top + values.shape[0], left : left + values.shape[1]] = values
    return torch.from_numpy(canvas)[None]
