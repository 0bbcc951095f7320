"""Measures the size and position of the figures in a training set, and gives other pictures the same geometry.

A network recognises figures only in the size and position that it was trained with. The geometry is measured on the
training set and stored with the weights.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mnist_dist.data.form import Resize
from mnist_dist.data.images import SHAPE

FAINT = 0.2
"""Pixels below this fraction of the strongest ink are paper, shadow or noise. They do not count as part of a figure."""

Ground = Literal["dark", "light", "none"]
Centre = Literal["mass", "box"]

GROUND_SHARE = 0.9
"""Fraction of the images that must have dark corners, or light ones, for the training set to have a ground."""

LARGEST_FIGURE = 0.9
"""Longer side of a figure, as a share of the image's shorter side, up to which it keeps a distance from the edges."""

SAMPLE = 2000
"""Number of training images that are measured, evenly spaced."""


@dataclass(frozen=True)
class Geometry:
    """The geometry of a training set. The default is MNIST's.

    MNIST scales a figure into 20×20 pixels and puts its centre of mass into the centre of 28×28 (LeCun et al.,
    "Gradient-based learning applied to document recognition", 1998).

    Attributes:
        ground: "dark" for bright figures on a dark ground, "light" for dark figures on a light ground, "none" for
            images without a common ground, such as photos.
        figure: pixels of the longer side of a figure; the median over the images.
        least, most: range of these longer sides; one image in a hundred lies outside.
        centre: which point of the figure lies in the centre of the image: its centre of mass ("mass"), or the centre of
            its bounding box ("box").
        shape: channels, height and width of the images.
        resize: how the training images got their size, and how a picture gets it; see `mnist_dist.data.form.Form`. None
            for published sets of figures: their figures were placed by their authors.
    """

    ground: Ground = "dark"
    figure: int = 20
    least: int = 19
    most: int = 20
    centre: Centre = "mass"
    shape: tuple[int, int, int] = SHAPE
    resize: Resize | None = None

    def __post_init__(self) -> None:
        sizes = (self.least, self.figure, self.most)
        valid = all(type(each) is int for each in sizes) and 1 <= sizes[0] <= sizes[1] <= sizes[2] <= max(
            self.shape[1:]
        )
        chosen = ((self.ground, Ground), (self.centre, Centre), (self.resize or "crop", Resize))
        if not valid or any(value not in get_args(known) for value, known in chosen):
            raise ValueError(f"the geometry of the weights is damaged: {asdict(self)}")

    def place(self, ink: np.ndarray) -> Tensor:
        """Scales a figure to the size of the training set's figures and centres it.

        Args:
            ink: float (height, width), 0 to 1, cut to the figure's bounding box.

        Returns:
            uint8 (1, height, width), with the ground of the training set.

        Raises:
            ValueError: nothing is left of the figure after it was scaled.
        """
        # If the images are not square, a figure of this size may be too long for their shorter side.
        room = [side / length for side, length in zip(self.shape[1:], ink.shape, strict=True)]
        scale = min(self.figure / max(ink.shape), *room)
        size = (max(1, round(ink.shape[1] * scale)), max(1, round(ink.shape[0] * scale)))
        small = Image.fromarray((255 * ink).astype(np.uint8)).resize(size, Image.Resampling.LANCZOS)
        values = np.asarray(small, dtype=np.float64)
        if not values.any():
            raise ValueError("the picture shows only specks, no figure")
        weights = values / values.sum()
        centre = [(length - 1) / 2 for length in values.shape]
        if self.centre == "mass":
            centre = [(weights.sum(axis=1 - axis) * np.arange(values.shape[axis])).sum() for axis in (0, 1)]
        top, left = (
            int(np.clip(round((side - 1) / 2 - middle), 0, side - length))
            for side, middle, length in zip(self.shape[1:], centre, values.shape, strict=True)
        )
        canvas = np.zeros(self.shape[1:], dtype=np.uint8)
        canvas[top : top + values.shape[0], left : left + values.shape[1]] = values
        return torch.from_numpy(255 - canvas if self.ground == "light" else canvas)[None]

    def fits(self, grey: np.ndarray) -> bool:
        """Returns whether a picture already has the geometry of the training set, so that it can be used unchanged.

        Args:
            grey: (height, width), 0 to 255.
        """
        if grey.shape != self.shape[1:]:
            return False
        image = torch.from_numpy(np.round(grey).astype(np.uint8))[None, None]
        if _ground(image) != self.ground:
            return False
        ink = 255 - image[:, 0] if self.ground == "light" else image[:, 0]
        [longest], mass, _ = _measure_figures(ink)
        within = self.least - 1 <= int(longest) <= self.most + 1
        return within and int(ink.max()) >= 128 and (self.centre == "box" or float(mass.abs().max()) <= 1)


def measure_geometry(images: Tensor, resize: Resize | None = None) -> Geometry:
    """Returns the geometry of a training set.

    Args:
        images: uint8 (N, C, H, W), on any device. Images in colour have no ground.
        resize: how the images got their size; None for published sets of figures. Other images with dark corners may be
            of any kind, such as X-rays. They have a ground only if nearly all figures keep a distance from the edges.
    """
    images = images[:: max(1, len(images) // SAMPLE)][:SAMPLE].cpu()
    channels, height, width = images.shape[1:]
    shape, side = (channels, height, width), min(height, width)
    whole = Geometry("none", side, side, side, "box", shape, resize)
    ground = _ground(images) if channels == 1 else "none"
    if ground == "none":
        return whole
    longest, mass, box = _measure_figures(255 - images[:, 0] if ground == "light" else images[:, 0])
    if not len(longest):
        return whole
    least, figure, most = (round(float(longest.quantile(level))) for level in (0.005, 0.5, 0.995))
    if resize and most > LARGEST_FIGURE * side:
        return whole
    centre: Centre = "mass" if float(mass.abs().mean()) <= float(box.abs().mean()) else "box"
    return Geometry(ground, figure, least, most, centre, shape, resize)


def read_geometry(about: dict[str, Any]) -> Geometry:
    """Returns the geometry in the metadata of a weights file; MNIST's if the file is older than this key.

    Raises:
        ValueError: the metadata hold no valid geometry.
    """
    shape = tuple(about.get("shape", SHAPE))
    stored = about.get("geometry", describe_geometry(Geometry()))
    try:
        return Geometry(**stored, shape=shape)
    except TypeError as error:
        raise ValueError(f"the geometry of the weights is damaged: {stored!r}") from error


def describe_geometry(geometry: Geometry) -> dict[str, Any]:
    """Returns the geometry for the metadata of a weights file, which hold the shape under a key of its own."""
    return {key: value for key, value in asdict(geometry).items() if key != "shape"}


def _ground(images: Tensor) -> Ground:
    """Returns the ground of images (N, 1, H, W): dark or light if nearly all of them have such corners, else none."""
    corners = torch.cat([images[..., y, x] for y in (0, -1) for x in (0, -1)], dim=1).float()
    level = corners.median(dim=1).values
    shares = {"dark": float((level < 32).float().mean()), "light": float((level > 223).float().mean())}
    best = max(shares, key=lambda name: shares[name])
    return cast(Ground, best) if shares[best] >= GROUND_SHARE else "none"


def _measure_figures(ink: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Measures the figures of images.

    Args:
        ink: uint8 (N, H, W), bright figures on a dark ground.

    Returns:
        Without the blank images, float32: the longer sides in pixels (N,), and how far the centre of mass (N, 2) and
        the centre of the bounding box (N, 2) lie from the centre of the image.
    """
    ink = ink[ink.amax(dim=(1, 2)) > 0].float()
    inside = ink > FAINT * ink.amax(dim=(1, 2), keepdim=True)
    sides, masses, boxes = [], [], []
    for axis in (1, 2):
        position = torch.arange(ink.shape[axis]).float()
        used = inside.any(dim=3 - axis)
        first = torch.where(used, position, torch.inf).amin(dim=1)
        last = torch.where(used, position, -torch.inf).amax(dim=1)
        middle = (len(position) - 1) / 2
        sides.append(last - first + 1)
        boxes.append((first + last) / 2 - middle)
        masses.append((ink.sum(dim=3 - axis) * position).sum(dim=1) / ink.sum(dim=(1, 2)) - middle)
    return torch.stack(sides).amax(dim=0), torch.stack(masses, dim=1), torch.stack(boxes, dim=1)
