"""Reads picture files and prepares them like the images of a training set.

A picture may have any size, colour, bit depth or transparency, and may be dark on light or light on dark.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from mnist_dist.data.foreground import find_figure
from mnist_dist.data.form import convert_picture, fit_picture
from mnist_dist.data.geometry import Geometry

PROGRAMS = ("EPS", "WMF")
"""Formats for which Pillow would start another program."""

MOST_PIXELS = 100_000_000
"""Larger pictures are refused, because they would fill the memory."""

FULL_SCALES = (255, 1023, 4095, 65535)
"""Largest grey levels of 8, 10, 12 and 16 bits."""


@dataclass(frozen=True)
class Prepared:
    """A picture as a network's input.

    Attributes:
        image: uint8 (C, H, W), like the images of the training set.
        doubts: short reasons why a prediction may be wrong; empty if the figure is clear.
    """

    image: Tensor
    doubts: tuple[str, ...]


def prepare_picture(path: str | Path, geometry: Geometry | None = None) -> Prepared:
    """Reads a picture file and prepares it like the images of the training set.

    Args:
        path: the file.
        geometry: geometry of the training set; None for MNIST's.

    Raises:
        ValueError: the file cannot be read, is not a picture, or is damaged, blank or too large, as the message states.
    """
    geometry = geometry or Geometry()
    picture = _open(path)
    if geometry.ground == "none":
        return Prepared(_fit(picture, geometry), ())
    if geometry.resize and geometry.fits((image := _fit(picture, geometry))[0].numpy()):
        return Prepared(image, ())  # prepared as the training images were, it has their geometry
    grey = _read_grey(picture)
    if geometry.fits(grey):
        return Prepared(torch.from_numpy(np.round(grey).astype(np.uint8))[None], ())
    figure = find_figure(grey)
    return Prepared(geometry.place(figure.ink), figure.doubts)


def _fit(picture: Image.Image, geometry: Geometry) -> Tensor:
    """Returns a picture in the form of the training images, uint8 (C, H, W), as `data.decoding` reads image files."""
    channels, height, width = geometry.shape
    levels = fit_picture(convert_picture(picture, channels), (height, width), channels, geometry.resize or "crop")
    return torch.from_numpy(np.array(levels))


def read_picture(path: str | Path, geometry: Geometry | None = None) -> Tensor:
    """Reads a picture file as uint8 (C, H, W); see `prepare_picture`."""
    return prepare_picture(path, geometry).image


def _open(path: str | Path) -> Image.Image:
    """Returns the picture in a file, upright and with its pixels read."""
    try:
        with Image.open(path) as file:
            if file.width * file.height > MOST_PIXELS:
                raise ValueError(f"too many pixels: {file.width:,}×{file.height:,}; at most {MOST_PIXELS:,}")
            if file.format in PROGRAMS:
                raise ValueError(f"{file.format} files are programs; save the picture as PNG or JPEG")
            return ImageOps.exif_transpose(file)
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise ValueError(error.strerror) from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"too many pixels; at most {MOST_PIXELS:,}") from error
    except ValueError:
        raise
    except Exception as error:  # Pillow raises exceptions of many types for damaged files
        if kind := _unread_kind(path):
            raise ValueError(f"{kind} is not supported; save the picture as PNG or JPEG") from error
        raise ValueError("not a picture, or a damaged picture") from error


SIGNATURES = (
    (0, b"%PDF", "PDF"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"\0\0\0\x0cJXL ", "JPEG XL"),
    (0, b"\x76\x2f\x31\x01", "OpenEXR"),
    (0, b"gimp xcf", "XCF"),
    (0, b"\x93NUMPY", "a NumPy array"),
    (0, b"\x89HDF", "HDF5"),
    (0, b"PK\x03\x04", "a ZIP archive"),
    (0, b"\x1f\x8b", "a gzip archive"),
    (0, b"\0\0\x08\x03", "IDX"),
    (128, b"DICM", "DICOM"),
    (8, b"CR\x02", "a camera's raw file"),
    (0, b"FUJIFILMCCD-RAW", "a camera's raw file"),
    (0, b"\x1aE\xdf\xa3", "a video"),
)
"""Position, bytes and name of formats that Pillow does not read."""


def _unread_kind(path: str | Path) -> str | None:
    """Returns the name of a well-known format that Pillow does not read, found by the first bytes of the file."""
    with Path(path).open("rb") as file:
        start = file.read(512)
    if start[4:8] == b"ftyp":  # the ISO base media file format, ISO/IEC 14496-12
        brands = {start[at : at + 4] for at in (8, *range(16, min(int.from_bytes(start[:4], "big"), 512), 4))}
        if brands & {b"avif", b"avis"}:
            return "AVIF"
        if brands & {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}:
            return "HEIC"
        return "a camera's raw file" if b"crx " in brands else "a video"
    if b"<svg" in start.lower():
        return "SVG"
    if start.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "HTML"
    return next((name for at, magic, name in SIGNATURES if start[at : at + len(magic)] == magic), None)


def _read_grey(picture: Image.Image) -> np.ndarray:
    """Returns the grey levels 0 to 255 of a picture, float32 (height, width)."""
    if picture.has_transparency_data:
        picture = _fill_transparency(picture.convert("RGBA"))
    if picture.mode[0] in "IF":  # more than 8 bits per pixel, which Pillow's conversion would clip at 255
        return _scale_levels(np.asarray(picture).astype(np.float64), fractions=picture.mode[0] == "F")
    return np.asarray(picture.convert("RGB").convert("L"), dtype=np.float32)


def _scale_levels(levels: np.ndarray, fractions: bool) -> np.ndarray:
    """Scales integer or floating-point levels to 0 to 255, float32.

    A file does not define the level of white. White is taken as the smallest usual full scale that is not below the
    file's largest level.
    """
    known = np.isfinite(levels)
    if not known.any():
        raise ValueError("the picture has no finite pixel")
    levels = np.where(known, levels, np.median(levels[known]))
    levels = levels - min(0.0, float(levels.min()))
    largest = float(levels.max())
    scales = (1, *FULL_SCALES) if fractions else FULL_SCALES
    white = next((each for each in scales if largest <= 1.001 * each), largest)
    return (levels * (255 / white)).astype(np.float32)


def _fill_transparency(picture: Image.Image) -> Image.Image:
    """Puts an RGBA picture on a white background if its figure is dark, on black if its figure is light."""
    opacity = np.asarray(picture, dtype=np.float32)[..., 3]
    if opacity.min() == 255:
        return picture
    grey = np.asarray(picture.convert("RGB").convert("L"), dtype=np.float32)
    is_dark = (grey * opacity).sum() < 127.5 * opacity.sum()
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white" if is_dark else "black"), picture)
