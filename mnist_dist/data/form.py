"""The form of a data set's images, channels and size, and how images of another form are brought into it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mnist_dist.errors import Kind

Resize = Literal["crop", "stretch", "pad"]

CHUNK = 2**26
"""Bytes of float32 images that are resized at once."""

LARGEST_LABEL = 2**53
"""Larger numbers are refused: they are not classes, and a float64 cannot hold all of them exactly."""

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in a grey level (ITU-R BT.601), as Pillow uses them."""


class DataError(ValueError):
    """Raised if the data cannot be used.

    Attributes:
        key: the recipe key concerned, below `data`; empty for `data` itself.
        kind: the kind of the problem.
    """

    def __init__(self, key: str, message: str, kind: Kind = "damaged"):
        super().__init__(message)
        self.key, self.kind = key, kind


@dataclass(frozen=True)
class Form:
    """Channels and size that the images of a data set get. None keeps those of the source.

    Attributes:
        size: height and width in pixels.
        channels: 1 (grey) or 3 (red, green, blue).
        resize: how an image of another size gets this size. "crop" scales it until it covers the size and cuts off what
            is outside. "stretch" scales height and width separately. "pad" puts it into the middle of a black image; a
            larger one is reduced first, a smaller one is not enlarged.
    """

    size: tuple[int, int] | None = None
    channels: int | None = None
    resize: Resize = "crop"

    @property
    def is_free(self) -> bool:
        """Whether images of every form are left unchanged."""
        return self.size is None and self.channels is None


def boxes(size: tuple[int, int], target: tuple[int, int], resize: Resize) -> tuple[tuple[int, int, int, int], ...]:
    """Returns the part of an image that is used, and the part of the result that it fills.

    Args:
        size: height and width of the image.
        target: height and width of the result.

    Returns:
        Two boxes of whole pixels, each (top, left, height, width).
    """
    (height, width), (high, wide) = size, target
    if resize == "crop":
        scale = max(high / height, wide / width)
        used = max(1, min(height, round(high / scale))), max(1, min(width, round(wide / scale)))
        return _centred(used, size), (0, 0, high, wide)
    if resize == "pad":
        scale = min(1.0, high / height, wide / width)
        filled = max(1, round(height * scale)), max(1, round(width * scale))
        return (0, 0, height, width), _centred(filled, target)
    return (0, 0, height, width), (0, 0, high, wide)


def _centred(inner: tuple[int, int], outer: tuple[int, int]) -> tuple[int, int, int, int]:
    return (outer[0] - inner[0]) // 2, (outer[1] - inner[1]) // 2, *inner


def convert_picture(picture: Image.Image, channels: int) -> Image.Image:
    """Returns a picture in mode L (1 channel) or RGB (3 channels), on black where it is transparent."""
    if picture.has_transparency_data:
        opaque = Image.new("RGBA", picture.size, "black")
        picture = Image.alpha_composite(opaque, picture.convert("RGBA"))
    if picture.mode[0] in "IF":
        picture = _eight_bits(picture)
    return picture.convert("L" if channels == 1 else "RGB")


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Returns a picture of integers or floating-point numbers with 8 bits per pixel.

    The level of white is 65535 in modes of 16 bits. In the others it is the smallest of 1, 255 and 65535 that is not
    below the picture's largest level.
    """
    levels = np.asarray(picture).astype(np.float64)
    if not np.isfinite(levels).all():
        raise ValueError("a pixel is not finite")
    largest = 65535.0 if picture.mode.startswith("I;16") else max(float(levels.max()), 1.0)
    scale = 255 / (65535 if largest > 255 else 255 if largest > 1 else 1)
    return Image.fromarray(np.clip(np.rint(levels * scale), 0, 255).astype(np.uint8))


def fit_picture(picture: Image.Image, size: tuple[int, int], channels: int, resize: Resize) -> np.ndarray:
    """Returns a picture in a form, uint8 (C, H, W).

    Args:
        picture: in mode L or RGB.
        size: height and width of the result.
        channels: 1 or 3.
    """
    picture = picture.convert("L" if channels == 1 else "RGB")
    if (picture.height, picture.width) != size:
        (top, left, height, width), filled = boxes((picture.height, picture.width), size, resize)
        picture = picture.crop((left, top, left + width, top + height))
        if (height, width) != filled[2:]:
            picture = picture.resize(filled[:1:-1], Image.Resampling.BILINEAR)
        if filled[2:] != size:
            canvas = Image.new(picture.mode, size[::-1])
            canvas.paste(picture, (filled[1], filled[0]))
            picture = canvas
    levels = np.asarray(picture)
    return levels[None] if channels == 1 else levels.transpose(2, 0, 1)


def fit_images(images: Tensor, form: Form) -> Tensor:
    """Returns images in a form, uint8 (N, C, H, W).

    Args:
        images: uint8 (N, C, H, W) with 1 or 3 channels.
    """
    _, channels, height, width = images.shape
    size, wanted = form.size or (height, width), form.channels or channels
    if (size, wanted) == ((height, width), channels):
        return images
    found = torch.zeros(len(images), wanted, *size, dtype=torch.uint8)
    (top, left, high, wide), (y, x, tall, broad) = boxes((height, width), size, form.resize)
    step = max(1, CHUNK // (4 * channels * max(height * width, size[0] * size[1])))
    for start in range(0, len(images), step):
        part = images[start : start + step, :, top : top + high, left : left + wide]
        if (high, wide) != (tall, broad):
            scaled = F.interpolate(part.float(), (tall, broad), mode="bilinear", antialias=True)
            part = scaled.round_().clamp_(0, 255).to(torch.uint8)
        found[start : start + step, :, y : y + tall, x : x + broad] = _convert_channels(part, wanted)
    return found


def _convert_channels(images: Tensor, channels: int) -> Tensor:
    """Returns uint8 images (N, C, H, W) with 1 or 3 channels."""
    if images.shape[1] == channels:
        return images
    if channels == 3:
        return images.expand(-1, 3, -1, -1)
    weights = torch.tensor(LUMA).view(3, 1, 1)
    return (images.float() * weights).sum(dim=1, keepdim=True).round_().to(torch.uint8)


def as_image_arrays(values: Sequence[tuple[Any, str]], key: str = "root") -> list[Tensor]:
    """Returns the images of each part of a data set as uint8 (N, C, H, W).

    Args:
        values: for each part its images and the name of their array, for a message. Images are (N, H, W), (N, H, W, C)
            or (N, C, H, W) with 1 or 3 channels: whole numbers from 0 to 255 of any type, or fractions of 1 in all
            parts.
        key: the recipe key that names the arrays, below `data`.

    Raises:
        DataError: the values are not images.
    """
    given = [_to_numpy(each, name, key) for each, name in values]
    found = [f"{name}: found {each.dtype} of shape {each.shape}" for each, (_, name) in zip(given, values, strict=True)]
    arrays = [_with_channels(each, text, key) for each, text in zip(given, found, strict=True)]
    largest = max((float(each.max()) for each in arrays if each.dtype.kind == "f"), default=0.0)
    return [_as_levels(each, text, key, are_fractions=largest <= 1) for each, text in zip(arrays, found, strict=True)]


def _to_numpy(values: Any, name: str, key: str) -> np.ndarray:
    try:
        return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:  # e.g. images of several sizes, or a tensor in bfloat16
        raise DataError(key, f"{name}: expected an array: {str(error).splitlines()[0]}", "type") from error


def _with_channels(array: np.ndarray, found: str, key: str) -> np.ndarray:
    """Returns numbers of the shape (N, C, H, W). `found` is what the array is, for a message."""
    if array.dtype.kind not in "biuf":
        raise DataError(key, f"{found}; expected an array of real numbers: images of one size")
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and array.shape[-1] in (1, 3) and array.shape[1] not in (1, 3):
        array = np.moveaxis(array, -1, 1)
    if array.ndim != 4 or array.shape[1] not in (1, 3) or min(array.shape) < 1:
        raise DataError(key, f"{found}; expected images (N, H, W), (N, H, W, C) or (N, C, H, W) of 1 or 3 channels")
    return array


def _as_levels(array: np.ndarray, found: str, key: str, are_fractions: bool) -> Tensor:
    """Returns the values as uint8 from 0 to 255.

    Args:
        found: what the array is, for a message.
        are_fractions: whether floating-point values are fractions of 1.
    """
    if array.dtype != np.uint8:
        low, high = array.min(), array.max()
        if not (np.isfinite(low) and np.isfinite(high)):
            raise DataError(key, f"{found} with values that are not finite")
        levels = array.astype(np.float64)
        if array.dtype.kind == "b" or (array.dtype.kind == "f" and are_fractions):
            levels *= 255
        elif array.dtype.kind == "f" and not np.allclose(array, np.rint(array)):
            message = "expected whole levels from 0 to 255, or fractions from 0 to 1"
            raise DataError(key, f"{found} with values from {low:.6g} to {high:.6g}, not whole; {message}")
        if low < 0 or levels.max() > 255:
            message = "expected 0 to 255, or fractions from 0 to 1"
            raise DataError(key, f"{found} with values from {low:.6g} to {high:.6g}; {message}")
        array = np.rint(levels).astype(np.uint8)
    return torch.from_numpy(np.require(array, requirements=("C", "W")))


def as_label_array(
    values: Sequence[object] | np.ndarray | Tensor, count: int, name: str, key: str = "root"
) -> np.ndarray:
    """Returns labels as an array (N,) of whole numbers or of text.

    Args:
        count: number of images.
        name: of the array, for a message.
        key: the recipe key that names the array, below `data`.

    Raises:
        DataError: there is not one label for each image.
    """
    labels = _to_numpy(values, name, key)
    if labels.ndim == 2 and labels.shape[1] == 1:  # MedMNIST's layout
        labels = labels[:, 0]
    if labels.ndim != 1:
        message = f"{name}: expected one label for each image, found a table of {labels.shape}"
        raise DataError(key, f"{message}; images with several labels are not supported")
    if len(labels) != count:
        raise DataError(key, f"{name}: {count:,} images but {len(labels):,} labels")
    if labels.dtype.kind == "f" and np.isfinite(labels).all() and np.array_equal(labels, np.rint(labels)):
        labels = labels.astype(np.int64)
    if labels.dtype.kind not in "iubUSO":
        raise DataError(key, f"{name}: expected labels, which are whole numbers or names, found {labels.dtype}")
    if labels.dtype.kind in "USO":
        return _as_names(labels, name, key)
    low, high = labels.min(), labels.max()
    if low < 0 or high > LARGEST_LABEL:
        message = "expected whole numbers from 0 on; leave out images without a label"
        raise DataError(key, f"{name}: found labels from {low} to {high}; {message}")
    return labels.astype(np.int64)


def _as_names(labels: np.ndarray, name: str, key: str) -> np.ndarray:
    """Returns labels as text. In an array of objects, None or NaN is a missing label."""
    names = []
    for each in labels.tolist():
        if isinstance(each, bytes):
            each = each.decode("utf-8", errors="replace")
        if not isinstance(each, str | Integral):
            raise DataError(key, f"{name}: expected a whole number or a name for each image, found {each!r}")
        names.append(str(each))
    return np.array(names)
