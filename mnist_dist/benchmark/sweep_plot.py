"""Plots the speed of each timed loop against the values of one recipe key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from mnist_dist.plots import style

# The trainer first and boldest, the bare step dashed, then the other loops. Markers and line styles differ, so that
# lines can be distinguished in grey too.
LOOKS: tuple[dict[str, Any], ...] = (
    {"color": style.VERMILLION, "linewidth": 2.5, "marker": "o", "markersize": 6, "zorder": 3},
    {"color": style.INK, "linestyle": "--", "marker": "_", "markersize": 9},
    {"color": style.BLUE, "marker": "s"},
    {"color": style.SKY, "marker": "^", "markersize": 6},
    {"color": style.GREEN, "marker": "D"},
    {"color": style.GREY, "marker": "v", "markersize": 6},
    {"color": style.BLUE, "linestyle": ":", "marker": "P", "markersize": 6},
    {"color": style.GREEN, "linestyle": ":", "marker": "X", "markersize": 6},
)


@style.house_style()
def plot_sweep(
    values: Sequence[str],
    speeds: Sequence[Mapping[str, Mapping[str, float]]],
    path: str | Path,
    *,
    key: str,
    title: str,
) -> Path:
    """Writes a picture of images/s (median, with a bar from the slowest round to the fastest) against `key`.

    Args:
        values: of the key, as text. The axis is logarithmic if all are numbers above zero; else they are evenly spaced.
        speeds: for each value {loop: {"median": …, "min": …, "max": …}}; a loop may be missing at some values.
        path: the PNG to write.
        key: label of the axis.
        title: the title of the picture.

    Returns:
        `path`.
    """
    figure = style.new_figure(8, 5.6, title)
    axes = figure.subplots()
    numbers = _numbers(values)
    positions = numbers or [float(position) for position in range(len(values))]
    names = list(dict.fromkeys(name for each in speeds for name in each))
    for name, look in zip(names, LOOKS * (1 + len(names) // len(LOOKS)), strict=False):
        found = [(x, each[name]) for x, each in zip(positions, speeds, strict=True) if name in each]
        medians = [speed["median"] for _, speed in found]
        distances = [
            [speed["median"] - speed["min"] for _, speed in found],
            [speed["max"] - speed["median"] for _, speed in found],
        ]
        axes.errorbar([x for x, _ in found], medians, distances, label=name, elinewidth=1, capsize=2, **look)
    axes.set(xlabel=key, ylabel="images/s", yscale="log", **({"xscale": "log"} if numbers else {}))
    axes.set_xticks(positions, values)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda speed, _: f"{speed:,g}"))
    figure.legend(loc="outside lower left", ncols=3, fontsize=9)
    return style.write_png(figure, path)


def _numbers(values: Sequence[str]) -> list[float]:
    """Returns the values as numbers, or [] if any of them is not a number above zero."""
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        return []
    return numbers if min(numbers) > 0 else []
