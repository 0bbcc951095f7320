"""Grids of images: predictions, mistakes and augmented images. Each function writes one PNG and returns its path.

Arrays may be NumPy arrays or tensors on any device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mnist_dist.plots import style

LONGEST_NAME = 28
"""Letters of a class's name in a caption; a longer name is shortened."""


@dataclass(frozen=True)
class Predictions:
    """Images with their true and predicted classes, as NumPy arrays."""

    pictures: np.ndarray  # (N, C, H, W), levels 0 to 255
    labels: np.ndarray  # (N,), the true classes
    predicted: np.ndarray  # (N,), the predicted classes
    confidences: np.ndarray  # (N,), probability of the predicted class
    classes: Sequence[str]
    inverted: bool = True  # draw grey images as ink on paper

    @classmethod
    def read(
        cls, images: Any, labels: Any, probabilities: Any, classes: Sequence[str], *, inverted: bool = True
    ) -> Predictions:
        """Builds the predictions.

        Args:
            images: uint8 (N, C, H, W).
            labels: int64 (N,), the true classes.
            probabilities: float (N, classes).
            classes: the names of the classes.
            inverted: draw grey images as ink on paper: level 0 is white.

        Raises:
            ValueError: the lengths differ, or there is no image.
        """
        pictures, truth, scores = style.as_array(images), style.as_array(labels), style.as_array(probabilities)
        if not 0 < len(pictures) == len(truth) == len(scores):
            lengths = f"{len(pictures)}, {len(truth)} and {len(scores)}"
            raise ValueError(f"images, labels and probabilities must have the same length, at least 1: {lengths}")
        return cls(pictures, truth, scores.argmax(axis=1), scores.max(axis=1), classes, inverted)

    def mistakes(self) -> np.ndarray:
        """Returns the indices of wrong predictions, the most confident first."""
        wrong = np.flatnonzero(self.predicted != self.labels)
        return wrong[np.argsort(-self.confidences[wrong], kind="stable")]

    def describe(self, mistakes: np.ndarray, most: int) -> str:
        """Returns a heading for the first `most` mistakes."""
        found, images = len(mistakes), f"{len(self.labels):,} images"
        if not found:
            return f"No mistakes: all {images} are classified correctly"
        which = "All" if found <= most else f"The {most} most confident of"
        return f"{which} {found:,} mistake{'s' * (found > 1)} in {images}"

    def caption(self, index: int) -> tuple[str, str]:
        """Returns the text above an image and its colour. The sign ✓ or ✗ has the same meaning as the colour."""
        indices = self.predicted[index], self.labels[index]
        predicted, truth = (style.shorten(self.classes[each], LONGEST_NAME) for each in indices)
        if self.predicted[index] == self.labels[index]:
            return f"{predicted} ✓", style.GREEN
        confidence = f"{self.confidences[index]:.2f}"
        if len(predicted) + len(truth) < 6:
            return f"✗ {predicted} (true {truth}) {confidence}", style.VERMILLION
        return f"✗ {predicted} {confidence}\n(true {truth})", style.VERMILLION  # long names need a line each


@style.house_style()
def plot_predictions(predictions: Predictions, path: str | Path, *, title: str, count: int = 36) -> Path:
    """Draws evenly spaced images of the set with their predictions above them, then the most confident mistakes.

    Args:
        predictions: the predictions for a set of images.
        path: the PNG to write.
        title: the title of the figure.
        count: number of images, six per row. A third of the rows, at least one, shows mistakes.
    """
    columns = 6
    rows = max(2, math.ceil(count / columns))
    most = columns * max(1, rows // 3)
    mistakes = predictions.mistakes()
    spread = min(columns * rows - most, len(predictions.labels))
    regular = np.linspace(0, len(predictions.labels) - 1, spread).round().astype(int)
    groups = [("Spread evenly over the set", regular), (predictions.describe(mistakes, most), mistakes[:most])]
    return style.write_png(_draw_groups(predictions, groups, columns, title), path)


@style.house_style()
def plot_misclassified(predictions: Predictions, path: str | Path, *, title: str, count: int = 32) -> Path:
    """Draws the `count` mistakes with the highest confidence; the other arguments are those of `plot_predictions`."""
    mistakes = predictions.mistakes()
    groups = [(predictions.describe(mistakes, count), mistakes[:count])]
    columns = min(8, max(4, len(mistakes)))
    return style.write_png(_draw_groups(predictions, groups, columns, title), path)


@style.house_style()
def plot_augmented_samples(
    originals: Any, augmented: Any, path: str | Path, *, title: str, inverted: bool = True
) -> Path:
    """Draws each original above its augmented image, ten per row.

    Args:
        originals: (N, C, H, W), levels 0..255.
        augmented: as `originals`.
        path: the PNG to write.
        title: the title of the figure.
        inverted: draw grey images as ink on paper: level 0 is white.

    Raises:
        ValueError: the shapes differ, or there is no image.
    """
    before, after = style.as_array(originals), style.as_array(augmented)
    if before.shape != after.shape or not len(before):
        raise ValueError(
            f"originals and augmented need equal shapes and at least one image: {before.shape}, {after.shape}"
        )
    columns, indent, pitch = min(10, len(before)), 1.0, style.TILE + 0.08
    block = 2 * pitch + 0.2
    width = max(4.5, indent + columns * pitch + style.MARGIN)
    figure, sheet = style.new_sheet(width, block * math.ceil(len(before) / columns), title)
    for index in range(len(before)):
        row, column = divmod(index, columns)
        for line, (name, tiles) in enumerate([("original", before), ("augmented", after)]):
            top = row * block + line * pitch
            style.draw_tile(sheet, indent + column * pitch, top, tiles[index], inverted=inverted)
            if column == 0:
                sheet.text(indent - 0.1, top + style.TILE / 2, name, fontsize=9, ha="right", va="center")
    return style.write_png(figure, path)


def _draw_groups(predictions: Predictions, groups: list[tuple[str, np.ndarray]], columns: int, title: str) -> Figure:
    """Returns a sheet: for each group a heading above the images of its indices with their captions."""
    captions = [[predictions.caption(index) for index in indices] for _, indices in groups]
    lines = [line for group in captions for text, _ in group for line in text.splitlines()]
    # Bold 8 pt text: thirteen letters per inch; two lines need less than 0.3 inches.
    across = max(style.TILE + 0.3, 0.075 * max(map(len, lines), default=0) + 0.1)
    downs = [style.TILE + (0.45 if any("\n" in text for text, _ in group) else 0.3) for group in captions]
    heights = [0.45 + down * math.ceil(len(group) / columns) for down, group in zip(downs, captions, strict=True)]
    figure, sheet = style.new_sheet(2 * style.MARGIN + columns * across, sum(heights), title)
    y = 0.0
    for (heading, indices), texts, down, height in zip(groups, captions, downs, heights, strict=True):
        sheet.text(style.MARGIN, y, heading, color=style.GREY, va="top")
        for position, (index, (text, colour)) in enumerate(zip(indices, texts, strict=True)):
            row, column = divmod(position, columns)
            middle = style.MARGIN + (column + 0.5) * across
            top = y + 0.25 + (row + 1) * down - style.TILE
            picture = predictions.pictures[index]
            style.draw_tile(sheet, middle - style.TILE / 2, top, picture, inverted=predictions.inverted)
            weight = "normal" if colour == style.GREEN else "bold"
            sheet.text(middle, top - 0.05, text, color=colour, fontsize=8, weight=weight, ha="center", va="bottom")
        y += height
    return figure
