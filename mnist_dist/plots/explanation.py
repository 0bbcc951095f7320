"""The picture of `mnist_dist.explain`: which pixels and feature maps lead to a prediction."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import Tensor

from mnist_dist.plots import style

MOST_MAPS, COLUMNS = 16, 8
LONGEST_HEADING = 23  # letters
GAP = 0.08  # inches, like the lengths below
PITCH = style.TILE + GAP
ACROSS = COLUMNS * PITCH - GAP
LARGE = 252 / style.DPI  # nine dots for each of 28 pixels
HEAD = LARGE + 0.5


@style.house_style()
def plot_explanation(
    picture: Tensor,
    saliency: Tensor,
    top: Sequence[tuple[str, float]],
    maps: Mapping[str, Tensor],
    path: str | Path,
    *,
    title: str,
    ground: str = "dark",
) -> Path:
    """Draws the picture, the saliency for the most probable class, the most probable classes, and feature maps.

    Args:
        picture: uint8 (C, H, W).
        saliency: float (C, H, W); positive where a higher level raises the score of the most probable class.
        top: names and probabilities, the most probable class first.
        maps: layer -> feature maps (C, H, W), of which the first 16 are drawn.
        path: the PNG to write.
        title: the title of the figure.
        ground: "dark", "light" or "none", of the training images; see `mnist_dist.data.geometry`. Grey images with a
            dark ground are drawn as ink on paper.
    """
    rows = {name: math.ceil(min(len(each), MOST_MAPS) / COLUMNS) for name, each in maps.items()}
    height = HEAD + sum(0.35 + PITCH * count + 0.1 for count in rows.values())
    figure, sheet = style.new_sheet(2 * style.MARGIN + ACROSS, height, title)

    tiles = _saliency_tiles(picture.numpy(), saliency.numpy(), top[0][0], ground)
    for position, (heading, tile, inverted) in enumerate(tiles):
        x = style.MARGIN + position * (LARGE + 0.2)
        sheet.text(x, 0.1, heading, fontsize=9, va="center")
        style.draw_tile(sheet, x, 0.25, tile, LARGE, inverted=inverted)
    x = style.MARGIN + 3 * (LARGE + 0.2) + 0.1
    _draw_bars(sheet, x, style.MARGIN + ACROSS - x, top)

    y = HEAD
    for name, each in maps.items():
        _draw_maps(sheet, y, name, each.numpy())
        y += 0.35 + PITCH * rows[name] + 0.1
    return style.write_png(figure, path)


def _saliency_tiles(
    picture: np.ndarray, saliency: np.ndarray, name: str, ground: str
) -> list[tuple[str, np.ndarray, bool]]:
    """Returns heading, levels (1, H, W) or (3, H, W), and whether level 0 is drawn white, of each of three tiles.

    A colour has no more and no less: an image in colour gets the size of the gradient over its channels, and the parts
    of the picture where that is large.
    """
    if len(picture) == 3:
        size = np.linalg.norm(saliency, axis=0, keepdims=True)
        share = (size / max(np.quantile(size, 0.99), 1e-12)).clip(max=1)  # single pixels would hide all others
        return [
            ("input of the network", picture, False),
            (_heading("{} depends on", name), 255 * share, True),
            ("the input there", 255 - share * (255.0 - picture), False),
        ]
    effect = -saliency if ground == "light" else saliency  # dark ink has a low level
    more, less = ("brighter", "darker") if ground == "none" else ("more ink", "less ink")
    scale = 255 / max(np.abs(effect).max(), 1e-12)
    return [
        ("input of the network", picture, ground == "dark"),
        (_heading(more + " supports {}", name), scale * effect.clip(min=0), True),
        (_heading(less + " supports {}", name), scale * -effect.clip(max=0), True),
    ]


def _heading(text: str, name: str) -> str:
    """Returns the text with the name in the place of {}; a long name is shortened."""
    return text.format(style.shorten(name, LONGEST_HEADING + 2 - len(text)))


def _draw_bars(sheet: Axes, x: float, width: float, top: Sequence[tuple[str, float]]) -> None:
    """Draws each class's name and probability above a bar. The pale bar behind it is 100 %."""
    for position, (name, probability) in enumerate(top):
        y = 0.42 + position * LARGE / 3
        weight, colour = ("bold", style.BLUE) if position == 0 else ("normal", style.SKY)
        sheet.text(x, y, style.shorten(name, LONGEST_HEADING - 7), fontsize=9, weight=weight, va="bottom")
        sheet.text(x + width, y, f"{100 * probability:.1f} %", fontsize=9, weight=weight, ha="right", va="bottom")
        sheet.add_patch(Rectangle((x, y + 0.03), width, 0.16, facecolor=style.PALE))
        sheet.add_patch(Rectangle((x, y + 0.03), width * probability, 0.16, facecolor=colour))


def _draw_maps(sheet: Axes, y: float, name: str, maps: np.ndarray) -> None:
    """Draws a heading and the maps below it on one scale: white is the lowest value of all maps, black the highest."""
    shown, low, high = maps[:MOST_MAPS], maps[:MOST_MAPS].min(), maps[:MOST_MAPS].max()
    count = f"{len(shown)} of {len(maps)} maps" if len(shown) < len(maps) else f"{len(maps)} maps"
    size = "×".join(map(str, maps.shape[1:]))
    sheet.text(style.MARGIN, y + 0.15, name, fontsize=9, weight="bold", va="center")
    scale = f"{count} of {size}, white {low:.2g} to black {high:.2g}"
    sheet.text(style.MARGIN + ACROSS, y + 0.15, scale, fontsize=9, color=style.GREY, ha="right", va="center")
    for position, each in enumerate(shown):
        row, column = divmod(position, COLUMNS)
        grey = 255 * (each - low) / max(high - low, 1e-12)
        style.draw_tile(sheet, style.MARGIN + column * PITCH, y + 0.3 + row * PITCH, grey)
