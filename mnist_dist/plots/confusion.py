"""The confusion matrix of a run."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.ticker import MaxNLocator

from mnist_dist.plots import style

MOST_COUNTED = 20
"""With more classes the cells are too small for numbers."""

MOST_NAMED = 110
"""With more classes only some of them are named on the axes."""

LONGEST_NAME = 30
"""Letters of a class's name on an axis; a longer name is shortened."""


@style.house_style()
def plot_confusion_matrix(matrix: Any, path: str | Path, *, classes: Sequence[str], title: str) -> Path:
    """Draws a confusion matrix. Only mistakes are coloured. Counts are written for up to `MOST_COUNTED` classes.

    Args:
        matrix: int (C, C), number of images by truth (row) and prediction (column).
        path: the PNG to write.
        classes: the C names of the classes.
        title: the title of the figure.

    Raises:
        ValueError: the matrix is not C × C for the C names in `classes`.
    """
    counts, size = style.as_array(matrix).astype(np.int64), len(classes)
    if counts.shape != (size, size):
        raise ValueError(f"a confusion matrix of {size} classes is {size} × {size}, not {counts.shape}")
    # Names of 8 pt need 0.15 inches each.
    side = min(max(10.0, 0.16 * size + 2), 18.0)
    figure = style.new_figure(8.5, 7.6, title) if size <= MOST_COUNTED else style.new_figure(side, 0.92 * side, title)
    axes = figure.subplots()

    # Correct predictions are a hundred times as frequent: one colour scale for both would show no mistake.
    diagonal = np.eye(size, dtype=bool)
    paint = PowerNorm(0.5, vmin=0, vmax=max(1, counts[~diagonal].max(initial=0)))
    colours = matplotlib.colormaps["Blues"].with_extremes(bad=style.PALE)
    image = axes.imshow(np.ma.masked_array(counts, mask=diagonal), cmap=colours, norm=paint)
    bar = figure.colorbar(image, ax=axes, label="misclassified (images)", shrink=0.8, aspect=30)
    bar.ax.yaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    bar.outline.set_visible(False)

    if size <= MOST_COUNTED:
        for (row, column), value in np.ndenumerate(counts):
            if value:
                dark = row != column and paint(value) > 0.6
                axes.text(column, row, f"{value:,}", ha="center", va="center", color="white" if dark else style.INK)
    names = [style.shorten(name, LONGEST_NAME) for name in classes]
    _name_classes(axes, names)
    axes.set_title(_describe_confusion(counts, names), fontsize=9, color=style.GREY)
    return style.write_png(figure, path)


def _name_classes(axes: Axes, classes: Sequence[str]) -> None:
    positions, fontsize = np.arange(len(classes)), 10 if len(classes) <= MOST_COUNTED else 8
    tilted = max(map(len, classes)) > 3
    # Many tilted names would overlap.
    angle = 40 if len(classes) <= MOST_COUNTED else 90
    slant: dict[str, Any] = {"rotation": angle, "ha": "right", "rotation_mode": "anchor"} if tilted else {}
    if tilted and angle == 90:
        slant["va"] = "center"
    named = positions[:: math.ceil(len(classes) / MOST_NAMED)]
    names = [classes[each] for each in named]
    axes.set_xticks(named, names, fontsize=fontsize, **slant)
    axes.set_yticks(named, names, fontsize=fontsize)
    some = "" if len(named) == len(classes) else f"; every {named[1]}th is named"
    axes.set(xlabel=f"prediction (class{some})", ylabel=f"truth (class{some})")
    axes.grid(False)
    if len(classes) <= MOST_NAMED:
        axes.set_xticks(positions[1:] - 0.5, minor=True)
        axes.set_yticks(positions[1:] - 0.5, minor=True)
        axes.grid(which="minor")
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)


def _describe_confusion(counts: np.ndarray, classes: Sequence[str]) -> str:
    """Returns the accuracy and the five most frequent pairs of true and predicted class."""
    total, correct = int(counts.sum()), int(np.trace(counts))
    text = f"{100 * correct / max(total, 1):.2f} % of {total:,} images correct (grey), {total - correct:,} wrong (blue)"
    pairs = [
        f"{classes[truth]} → {classes[predicted]} ({count:,})" for truth, predicted, count in _confusions(counts, 5)
    ]
    if not pairs:
        return text
    width = 110 - int(1.3 * max(map(len, classes)))  # the names at the left take space from the heading
    return text + "\n" + textwrap.fill("most often, truth → prediction:  " + ",  ".join(pairs), width)


def _confusions(counts: np.ndarray, most: int) -> list[tuple[int, int, int]]:
    """Returns the most frequent pairs of true class and another predicted class, each with its number of images."""
    truths, predictions = np.nonzero(counts * ~np.eye(len(counts), dtype=bool))
    found = sorted(zip(-counts[truths, predictions], truths, predictions, strict=True))[:most]
    return [(int(truth), int(predicted), -int(count)) for count, truth, predicted in found]
