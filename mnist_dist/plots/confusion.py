"""The confusion matrix of a run."""

from __future__ import annotations

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


@style.house_style()
def plot_confusion_matrix(matrix: Any, path: str | Path, *, classes: Sequence[str], title: str) -> Path:
    """Draws a confusion matrix. Only mistakes are coloured. Counts are written for up to 20 classes.

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
    figure = style.new_figure(8.5, 7.6, title) if size <= 20 else style.new_figure(10, 9.2, title)
    axes = figure.subplots()

    # Correct predictions are a hundred times as frequent: one colour scale for both would show no mistake.
    diagonal = np.eye(size, dtype=bool)
    paint = PowerNorm(0.5, vmin=0, vmax=max(1, counts[~diagonal].max(initial=0)))
    colours = matplotlib.colormaps["Blues"].with_extremes(bad=style.PALE)
    image = axes.imshow(np.ma.masked_array(counts, mask=diagonal), cmap=colours, norm=paint)
    bar = figure.colorbar(image, ax=axes, label="misclassified (images)", shrink=0.8, aspect=30)
    bar.ax.yaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    bar.outline.set_visible(False)

    if size <= 20:
        for (row, column), value in np.ndenumerate(counts):
            if value:
                dark = row != column and paint(value) > 0.6
                axes.text(column, row, f"{value:,}", ha="center", va="center", color="white" if dark else style.INK)
    _name_classes(axes, classes)
    axes.set_title(_describe_confusion(counts, classes), fontsize=9, color=style.GREY)
    return style.write_png(figure, path)


def _name_classes(axes: Axes, classes: Sequence[str]) -> None:
    positions, fontsize = np.arange(len(classes)), 10 if len(classes) <= 20 else 8
    tilted = max(map(len, classes)) > 3
    slant: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if tilted else {}
    axes.set_xticks(positions, classes, fontsize=fontsize, **slant)
    axes.set_yticks(positions, classes, fontsize=fontsize)
    axes.set(xlabel="prediction (class)", ylabel="truth (class)")
    axes.grid(False)
    axes.set_xticks(positions[1:] - 0.5, minor=True)
    axes.set_yticks(positions[1:] - 0.5, minor=True)
    axes.grid(which="minor")
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)


def _describe_confusion(counts: np.ndarray, classes: Sequence[str]) -> str:
    """Returns the accuracy and the five most frequent pairs of true and predicted class."""
    total, correct = int(counts.sum()), int(np.trace(counts))
    text = f"{100 * correct / max(total, 1):.2f} % of {total:,} images correct (grey), {total - correct:,} wrong (blue)"
    mistakes = [(-count, *pair) for pair, count in np.ndenumerate(counts) if count and pair[0] != pair[1]]
    most = sorted(mistakes)[:5]
    pairs = [f"{classes[truth]} → {classes[predicted]} ({-count:,})" for count, truth, predicted in most]
    return text + "\n" + textwrap.fill("most often, truth → prediction:  " + ",  ".join(pairs), 110) if pairs else text
