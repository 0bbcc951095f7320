"""Separates the figure (the drawn shape) in a grey picture from its background, and reports doubts.

Uneven light, noise and specks are removed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from mnist_dist.data.geometry import FAINT

LEAST_CONTRAST = 16
"""Smallest difference in grey levels between background and strongest ink; blank paper has less."""

LITTLE_CONTRAST = 40
"""With a smaller difference between background and strongest ink, the figure is doubtful."""

SMALL = 64
"""If one side of the picture has fewer pixels, light and noise cannot be separated from strokes, and only specks are
removed."""

LARGE = 1600
"""A picture whose longer side has more pixels is reduced first, to save time."""

GRID = 128
"""The light is measured on a reduced picture, whose longer side has this many pixels."""

UNEVEN = 0.08
"""The light is removed only if it varies by more than this fraction of the strongest ink."""

SPECK, STRAY = 0.02, 0.15
"""Fractions of the largest part's area. A part smaller than SPECK is a speck wherever it is; a part smaller than STRAY
is a speck if it is far from the figure."""


@dataclass(frozen=True)
class Figure:
    """The figure of a picture.

    Attributes:
        ink: float32 (height, width), 0 for background to 1 for the strongest ink, cut to the figure's bounding box.
        doubts: short reasons why a prediction may be wrong; empty if the figure is clear.
    """

    ink: np.ndarray
    doubts: tuple[str, ...]


def find_figure(grey: np.ndarray) -> Figure:
    """Finds the figure in a picture, dark on light or light on dark.

    Args:
        grey: float32 (height, width), 0 to 255.

    Raises:
        ValueError: the picture is blank.
    """
    small = min(grey.shape) < SMALL
    if max(grey.shape) > LARGE:
        grey = np.asarray(Image.fromarray(grey).reduce(-(-max(grey.shape) // LARGE)))
    ink, noise = (_subtract_background(grey), 0.0) if small else _smooth(_subtract_light(grey))
    ink = np.clip(ink, 0, None)
    contrast = float(ink.max())
    if contrast < max(LEAST_CONTRAST, 6 * noise):
        raise ValueError("the picture is blank")
    noisy = noise > 0.02 * contrast
    inked = ink > max(FAINT * contrast, 5 * noise)
    labels, parts = _find_parts(inked, ink)
    kept, several = _choose_parts(parts)
    chosen = np.isin(labels, kept)
    ink = np.where(_grow(chosen) if noisy else chosen | ~_grow(inked & ~chosen), ink, 0)
    # In a noisy picture, the value of the strongest pixel is due to chance.
    strongest = float(np.quantile(ink[chosen], 0.75) if noisy else ink[chosen].max())
    rows, columns = (np.nonzero(chosen.any(axis=axis))[0] for axis in (1, 0))
    if max(np.ptp(rows), np.ptp(columns)) + 1 < max(ink.shape) / 100:
        raise ValueError("the picture shows only specks, no figure")
    ink = np.clip(ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] / strongest, 0, 1)
    doubts = ("two figures",) * several + ("little contrast",) * (strongest < LITTLE_CONTRAST)
    return Figure(ink.astype(np.float32), doubts)


# --- light --------------------------------------------------------------------------------------------------------


def _subtract_background(grey: np.ndarray) -> np.ndarray:
    """Returns how much each pixel differs from the background, the median grey level of the border.

    Ink is positive, see `_stronger_side`.
    """
    return _stronger_side(float(np.median(_border(grey))) - grey)


def _subtract_light(grey: np.ndarray) -> np.ndarray:
    """Returns how much each pixel differs from the local background. Ink is positive, see `_stronger_side`."""
    scale = min(1.0, GRID / max(grey.shape))
    size = (max(8, round(grey.shape[1] * scale)), max(8, round(grey.shape[0] * scale)))
    coarse = np.asarray(Image.fromarray(grey).resize(size, Image.Resampling.BOX))
    surface = _fit_surface(coarse)
    rest = coarse - surface
    contrast = float(np.abs(rest).max())
    # A shadow shows as weak differences in the corners. Ink is rare in the corners, and as strong there as elsewhere.
    edge = np.abs(_corners(rest)) / max(contrast, 1)
    if float(((edge > UNEVEN) & (edge < 0.6)).mean()) > 0.1:
        surface = surface + _close_strokes(rest)
    elif np.ptp(surface) < UNEVEN * contrast:
        return _subtract_background(grey)
    light = np.asarray(Image.fromarray(surface.astype(np.float32)).resize(grey.shape[::-1], Image.Resampling.BICUBIC))
    ink = _stronger_side(light - grey)
    if np.vdot(ink, light - grey) > 0:  # dark ink: its contrast is smaller in the shadow
        ink = ink * (float(light.max()) / np.maximum(light, 16))
    return ink


def _border(values: np.ndarray) -> np.ndarray:
    return np.concatenate([values[0], values[-1], values[:, 0], values[:, -1]])


def _corners(values: np.ndarray) -> np.ndarray:
    """Returns the pixels in the corners of a picture; each corner is a sixth of the sides."""
    height, width = (length // 6 for length in values.shape)
    return np.concatenate(
        [part.ravel() for rows in (values[:height], values[-height:]) for part in (rows[:, :width], rows[:, -width:])]
    )


def _stronger_side(darker: np.ndarray) -> np.ndarray:
    """Returns the differences from the background with the sign that makes ink positive.

    Ink is dark or light, whichever side has the larger sum of squares. The other side is glare or shadow.

    Args:
        darker: background minus grey level, of any shape.
    """
    # Squares, because noise and remains of uneven light consist of many weak pixels.
    dark, light = (np.square(np.clip(sign * darker, 0, None)).sum() for sign in (1, -1))
    return darker if dark > light else -darker


def _fit_surface(values: np.ndarray) -> np.ndarray:
    """Fits a quadratic surface by least absolute deviations, on which ink on a small area has hardly any influence."""
    y, x = np.meshgrid(*(np.linspace(-1, 1, length) for length in values.shape), indexing="ij")
    terms = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=-1).reshape(-1, 6)
    target = values.reshape(-1).astype(np.float64)
    fitted = np.full_like(target, np.median(_border(values)))
    for _ in range(20):
        weights = 1 / np.maximum(np.abs(target - fitted), 1)
        weighted = terms * weights[:, None]
        fitted = terms @ np.linalg.solve(weighted.T @ terms + 1e-9 * np.eye(6), weighted.T @ target)
    return fitted.reshape(values.shape)


def _close_strokes(rest: np.ndarray) -> np.ndarray:
    """Removes strokes narrower than a fifth of the picture from an uneven picture; the edges of shadows remain."""
    width = 2 * (max(rest.shape) // 10) + 1
    # Fourth powers, because a shadow covers more pixels than the strokes, but the strokes are stronger.
    dark, light = (np.power(np.clip(sign * rest, 0, None), 4).sum() for sign in (-1, 1))
    sign = 1 if dark > light else -1
    return -sign * _slide(-_slide(sign * rest, width), width)


def _slide(values: np.ndarray, width: int) -> np.ndarray:
    """Returns the largest value in a square window around each pixel; `width` is odd."""
    for axis in (0, 1):
        padding = [(width // 2, width // 2) if each == axis else (0, 0) for each in (0, 1)]
        # Odd reflection continues a slope beyond the border; repeating the border values would not.
        padded = np.pad(values, padding, mode="reflect", reflect_type="odd" if values.dtype != bool else "even")
        values = np.lib.stride_tricks.sliding_window_view(padded, width, axis=axis).max(axis=-1)
    return values


# --- noise --------------------------------------------------------------------------------------------------------


def _smooth(ink: np.ndarray) -> tuple[np.ndarray, float]:
    """Blurs noisy ink until strokes are clear, and no further; returns it and the standard deviation of its noise."""
    noise = _noise(ink)
    for _ in range(4):
        if noise <= 0.04 * float(ink.max()):
            break
        ink = _blur(ink)
        noise = _noise(ink)
    return ink, noise


def _noise(ink: np.ndarray) -> float:
    """Estimates the standard deviation of the noise from the paper: the pixels that are not clearly ink."""
    paper = ink[ink < 0.3 * ink.max()]
    return 1.4826 * float(np.median(np.abs(paper))) if paper.size else 0.0  # an empty page has no noise


def _blur(values: np.ndarray) -> np.ndarray:
    """Returns the binomial mean (1, 4, 6, 4, 1) / 16 along both axes."""
    for axis in (0, 1):
        padded = np.pad(values, [(2, 2) if each == axis else (0, 0) for each in (0, 1)], mode="edge")
        windows = np.lib.stride_tricks.sliding_window_view(padded, 5, axis=axis)
        values = windows @ (np.array([1, 4, 6, 4, 1], dtype=np.float32) / 16)
    return values


# --- parts --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """A connected part of the ink, with its bounding box (the last row and column belong to it)."""

    label: int
    area: int
    strength: float
    """Mean ink."""
    top: int
    bottom: int
    left: int
    right: int

    @property
    def height(self) -> int:
        return self.bottom - self.top + 1

    @property
    def width(self) -> int:
        return self.right - self.left + 1

    def gap(self, other: _Part) -> int:
        """Returns the number of pixels between the bounding boxes: the larger of the horizontal and vertical gaps."""
        across = max(self.left, other.left) - min(self.right, other.right)
        down = max(self.top, other.top) - min(self.bottom, other.bottom)
        return max(across, down, 0)


def _find_parts(inked: np.ndarray, ink: np.ndarray) -> tuple[np.ndarray, list[_Part]]:
    """Returns an array with the label of each pixel's part (-1 for paper), and the parts, largest first.

    The pixels of a part touch each other, at a side or a corner.
    """
    pixels = np.flatnonzero(inked)
    number = np.full(inked.shape, -1)
    number.flat[pixels] = np.arange(len(pixels))
    pairs = []
    for one, other in (
        (number[:, :-1], number[:, 1:]),
        (number[:-1], number[1:]),
        (number[:-1, :-1], number[1:, 1:]),
        (number[:-1, 1:], number[1:, :-1]),
    ):
        both = (one >= 0) & (other >= 0)
        pairs.append(np.stack([one[both], other[both]]))
    one, other = np.concatenate(pairs, axis=1)
    root = np.arange(len(pixels))
    while (apart := root[one] != root[other]).any():
        one, other = one[apart], other[apart]
        np.minimum.at(root, np.maximum(root[one], root[other]), np.minimum(root[one], root[other]))
        while (root != root[root]).any():
            root = root[root]
    roots, label, areas = np.unique(root, return_inverse=True, return_counts=True)
    strengths = np.bincount(label, weights=ink.flat[pixels]) / areas
    rows, columns = np.divmod(pixels, inked.shape[1])
    box = []
    for values in (rows, columns):
        first, last = np.full(len(roots), values.max()), np.zeros(len(roots), dtype=int)
        np.minimum.at(first, label, values)
        np.maximum.at(last, label, values)
        box += [first, last]
    labels = np.full(inked.shape, -1)
    labels.flat[pixels] = label
    order = np.argsort(-areas, kind="stable")
    return labels, [_Part(int(i), int(areas[i]), float(strengths[i]), *(int(each[i]) for each in box)) for i in order]


def _choose_parts(parts: list[_Part]) -> tuple[list[int], bool]:
    """Returns the labels of the figure's parts, and whether the picture seems to show several figures.

    The dot of an i and the pieces of a broken stroke belong to the figure. Specks do not.
    """
    main = parts[0]
    size = max(main.height, main.width)
    kept, several = [main], False
    for part in parts[1:]:
        if part.area < SPECK * main.area:
            break  # a speck, and all further parts are smaller
        far = min(part.gap(each) for each in kept) > 0.4 * size
        if far and (part.area < STRAY * main.area or part.strength < 0.5 * main.strength):
            continue  # a stray mark, or the edge of a shadow, which is weak
        beside = part.left > main.right or part.right < main.left
        alike = part.height > 0.6 * main.height and part.area > 0.2 * main.area
        wide = max(part.right, main.right) - min(part.left, main.left) + 1 > 1.1 * max(part.height, main.height)
        if far or (beside and alike and wide):
            several = True
            continue
        kept.append(part)
    return [part.label for part in kept], several


def _grow(mask: np.ndarray) -> np.ndarray:
    """Returns the mask with two more pixels on all sides."""
    return _slide(mask, 5)
