"""The common style and the drawing functions of all pictures, without pyplot.

Pictures are readable in grey, for colour-blind readers and at half size. Colours are those of Okabe and Ito, "Color
Universal Design" (2008). No meaning depends on colour alone: a line style, a marker or a sign repeats it.
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
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

BLUE, SKY, GREEN, VERMILLION = "#0072B2", "#56B4E9", "#009E73", "#D55E00"
ORANGE, PURPLE = "#E69F00", "#CC79A7"
INK, GREY, PALE = "#222222", "#666666", "#E4E4E4"

DPI = 150
TILE = 140 / DPI  # inches: five dots for each of 28 pixels, so that all pixels have one width
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
    """Applies the style in a `with` block or, as a decorator, in a function; then restores the caller's settings."""
    # matplotlib keeps its settings in one dict per process: two threads at once would restore each other's settings.
    with _LOCK, matplotlib.style.context(["default", STYLE]):
        yield


def new_figure(width: float, height: float, title: str) -> Figure:
    """Returns an empty figure of width × height inches with constrained layout and a wrapped title on the left."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(_wrap_title(title, width), x=0.12 / width, ha="left")
    return figure


def new_sheet(width: float, height: float, title: str) -> tuple[Figure, Axes]:
    """Returns a sheet for grids of small images: one axes in inches, with the origin at the top left below the title.

    One axes for all images takes a tenth of the time of one axes per image.
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


def draw_tile(axes: Axes, x: float, y: float, image: np.ndarray, side: float = TILE, *, inverted: bool = True) -> None:
    """Draws one image into a square with its top left corner at (x, y) inches. An oblong image lies at its top.

    Args:
        axes: of `new_sheet`.
        image: (H, W) or (1, H, W) of grey levels 0..255, or (3, H, W) of red, green and blue.
        side: of the square, in inches.
        inverted: draw grey level 0 white and 255 black: ink on paper. Has no effect on images in colour.
    """
    planes = image if image.ndim == 3 else image[None]
    height, width = planes.shape[1:]
    dots, longest = round(side * DPI), max(height, width)
    # Enlarged by a whole number, all pixels have one width. A reduced image is smoothed.
    scale = max(1, dots // longest) if longest <= dots else dots / longest
    wide, high = width * scale / DPI, height * scale / DPI
    left = x + round((side - wide) / 2 * DPI) / DPI
    extent = (left, left + wide, y + high, y)
    smoothing = "nearest" if longest <= dots else "antialiased"
    if len(planes) == 3:
        colours = np.clip(np.round(planes), 0, 255).astype(np.uint8).transpose(1, 2, 0)
        axes.imshow(colours, extent=extent, interpolation=smoothing)
    else:
        grey = "gray_r" if inverted else "gray"
        axes.imshow(planes[0], cmap=grey, vmin=0, vmax=255, extent=extent, interpolation=smoothing)
    axes.add_patch(Rectangle((left, y), wide, high, fill=False, edgecolor="#BBBBBB", linewidth=0.5))


def shorten(name: str, most: int) -> str:
    """Returns a name of at most `most` letters: the middle of a longer one is replaced by an ellipsis."""
    if len(name) <= most:
        return name
    end = (most - 1) // 2
    return f"{name[: most - 1 - end]}…{name[len(name) - end :]}"


def write_png(figure: Figure, path: str | Path) -> Path:
    """Writes the figure as PNG under a temporary name, then renames it; creates the folder. Returns the path."""
    # Not by `engine.files`: plots is a lower layer and must not import engine. No flush: a picture can be drawn again.
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        figure.savefig(staged, format="png")
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)
    return path


def as_array(values: Any) -> np.ndarray:
    """Returns a NumPy array of an array or of a tensor on any device."""
    if isinstance(values, torch.Tensor):
        # NumPy has no bfloat16.
        values = values.detach().float() if values.is_floating_point() else values.detach()
        values = values.cpu()
    return np.asarray(values)


def _wrap_title(title: str, width: float) -> str:
    return textwrap.fill(title, max(20, int(8.5 * width)))  # 13 pt bold: about nine letters per inch
