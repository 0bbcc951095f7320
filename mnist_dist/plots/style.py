"""One restrained look for every picture, without pyplot: readable in grey, by the colour-blind and at half size.

Colours are those of Okabe and Ito, "Color Universal Design" (2008); no meaning hangs on colour alone, a line style,
a marker or a sign always says it too.
"""

from __future__ import annotations

import os
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy import ndarray

BLUE, SKY, GREEN, VERMILLION = "#0072B2", "#56B4E9", "#009E73", "#D55E00"
ORANGE, PURPLE = "#E69F00", "#CC79A7"
INK, GREY, PALE = "#222222", "#666666", "#E4E4E4"

DPI = 150
TILE = 140 / DPI  # inches: five dots for each of 28 pixels, so that no pixel comes out wider than its neighbour
MARGIN = 0.2  # inches

STYLE: dict[str, Any] = {
    "figure.dpi": DPI,
    "savefig.dpi": DPI,
    "font.size": 10,
    "figure.titlesize": 13,
    "figure.titleweight": "bold",
    "figure.constrained_layout.w_pad": 0.12,  # inches
    "figure.constrained_layout.h_pad": 0.1,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "text.color": INK,
    "text.parse_math": False,  # "$" in a title or a class name is a dollar sign
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": PALE,
    "grid.linewidth": 0.6,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.edgecolor": "none",
    "legend.title_fontsize": 8,
    "lines.linewidth": 1.5,
    "lines.markersize": 4,
}

_LOCK = threading.RLock()


@contextmanager
def house_style() -> Iterator[None]:
    """Draw and save inside this context, or decorated by it: the caller's settings neither leak in nor get lost."""
    # matplotlib keeps its settings in one dict per process: two threads inside at once would restore each other's.
    with _LOCK, matplotlib.style.context(["default", STYLE]):
        yield


def new_figure(width: float, height: float, title: str) -> Figure:
    """An empty figure of width × height inches, laid out by constraints, its title on the left and wrapped to fit."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(_wrap_title(title, width), x=0.12 / width, ha="left")
    return figure


def new_sheet(width: float, height: float, title: str) -> tuple[Figure, Axes]:
    """A sheet for grids of small images, measured in inches from the top left of the room below the title.

    One axes with everything placed by hand costs a tenth of the time of one axes per image.
    """
    heading = _wrap_title(title, width)
    top = 0.4 + 0.22 * len(heading.splitlines())
    figure = Figure(figsize=(width, top + height))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set(xlim=(0, width), ylim=(height, -top))
    axes.text(MARGIN, 0.2 - top, heading, fontsize=13, fontweight="bold", va="top")
    return figure, axes


def draw_tile(axes: Axes, x: float, y: float, image: ndarray, side: float = TILE) -> None:
    """One image, (H, W) of grey levels 0..255, as ink on paper with its top left corner at (x, y) inches."""
    axes.imshow(image, cmap="gray_r", vmin=0, vmax=255, extent=(x, x + side, y + side, y), interpolation="nearest")
    axes.add_patch(Rectangle((x, y), side, side, fill=False, edgecolor="#BBBBBB", linewidth=0.5))


def write_png(figure: Figure, path: str | Path) -> Path:
    """Writes the figure as PNG in one step (beside, then renamed), making the folder if need be; returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        figure.savefig(beside, format="png")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def _wrap_title(title: str, width: float) -> str:
    return textwrap.fill(title, max(20, int(8.5 * width)))  # 13 pt bold runs to about nine letters an inch
