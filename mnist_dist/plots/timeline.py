"""The picture of a profile: the timelines of all ranks, under one another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.patches import Patch

from mnist_dist.plots import style

Rows = Mapping[str, Sequence[tuple[str, float, float]]]

LOOKS: list[dict[str, Any]] = [
    {"facecolor": style.ORANGE, "hatch": "...."},
    {"facecolor": style.SKY},
    {"facecolor": style.BLUE, "hatch": "\\\\\\"},
    {"facecolor": style.VERMILLION, "hatch": "////"},
    {"facecolor": style.GREEN, "hatch": "xxxx"},
    {"facecolor": style.PURPLE, "hatch": "----"},
    {"facecolor": "white"},
]
"""The look of each phase, in the order of `phases`; the last is that of idle time."""


@style.house_style()
def plot_timelines(
    rows: Rows,
    step_starts: Mapping[str, Sequence[float]],
    path: str | Path,
    *,
    phases: Sequence[str],
    title: str,
) -> Path:
    """Draws which phase each row is in at each instant.

    Args:
        rows: name of a row -> (phase, start, end) in microseconds.
        step_starts: name of a row -> start of each step, and the end of the last one, in microseconds.
        path: the PNG to write.
        phases: all phases, at most as many as `LOOKS`; the last is idle time.
        title: the title of the figure.
    """
    figure = style.new_figure(12, 1.9 + 0.55 * len(rows), title)
    axes = figure.subplots()
    origin = min(starts[0] for starts in step_starts.values())
    looks = dict(zip(phases, LOOKS, strict=False))
    for number, (name, segments) in enumerate(rows.items()):
        starts = [(start - origin) / 1000 for start in step_starts[name]]
        axes.broken_barh([(starts[0], starts[-1] - starts[0])], (number - 0.36, 0.72), **_bar(looks[phases[-1]]))
        for phase, look in looks.items():
            spans = [((start - origin) / 1000, (end - start) / 1000) for each, start, end in segments if each == phase]
            axes.broken_barh(spans, (number - 0.36, 0.72), **_bar(look))
        axes.vlines(starts, number - 0.46, number + 0.46, color=style.INK, linewidth=1.5)
    axes.set(xlabel="time (ms); a black line is the start of a step", yticks=range(len(rows)), yticklabels=list(rows))
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.01)
    shown = [phase for phase in phases if phase in _shown(rows, step_starts, idle=phases[-1])]
    handles = [Patch(label=phase, edgecolor=style.INK, linewidth=0.4, **looks[phase]) for phase in shown]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), handlelength=2.5)
    return style.write_png(figure, path)


def _shown(rows: Rows, step_starts: Mapping[str, Sequence[float]], idle: str) -> set[str]:
    """Returns the phases that are in the picture, `idle` if a row has gaps."""
    found = {phase for segments in rows.values() for phase, *_ in segments}
    for name, segments in rows.items():
        length = step_starts[name][-1] - step_starts[name][0]
        if sum(end - start for _, start, end in segments) < 0.999 * length:
            found.add(idle)
    return found


def _bar(look: dict[str, Any]) -> dict[str, Any]:
    return {"edgecolor": style.INK, "linewidth": 0.2, **look}
