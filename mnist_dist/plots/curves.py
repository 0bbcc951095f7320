"""Curves of a run: training history, and loss per logged interval. Each function writes a PNG and returns its path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from mnist_dist.plots import style

Metrics = Sequence[Mapping[str, Any]]


@style.house_style()
def plot_training_history(metrics: Metrics, path: str | Path, *, title: str, eval_name: str = "test") -> Path:
    """Draws loss, accuracy and learning rate against the epoch, one above the other.

    Args:
        metrics: the lines of metrics.jsonl. Training lines hold "epoch" (epochs completed, e.g. 0.43), "train/loss"
            (nats), "train/accuracy" (percent) and "train/lr"; evaluation lines hold "epoch", "eval/loss" and
            "eval/accuracy". Either kind may be missing. Values that are not finite are ignored.
        path: the PNG to write.
        title: the title of the figure.
        eval_name: the split of the evaluation lines, for the legend.
    """
    figure = style.new_figure(8, 8.5, title)
    loss, accuracy, rate = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 1.6))

    curves = [series(metrics, "epoch", f"{split}/loss") for split in ("train", "eval")]
    _draw_curves(loss, curves, ["training", eval_name])
    _scale_loss(loss, np.concatenate([values for _, values in curves]))
    loss.set_ylabel("loss (nats)")

    curves = [series(metrics, "epoch", f"{split}/accuracy") for split in ("train", "eval")]
    _draw_curves(accuracy, curves, ["training", eval_name + _describe_best(*curves[1])])
    _set_accuracy_range(accuracy, [values for _, values in curves if values.size])
    accuracy.set_ylabel("accuracy (%)")

    epochs, rates = series(metrics, "epoch", "train/lr")
    _draw_curves(rate, [(epochs, rates)], [None])
    rate.set(xlabel="epoch", ylabel="learning rate", ylim=(0, 1.08 * rates.max(initial=0) or 1))
    rate.yaxis.set_major_formatter(FuncFormatter(_plain_number))

    last = max((float(line.get("epoch") or 0) for line in metrics), default=0.0)
    rate.set_xlim(0, 1.02 * last or 1)
    rate.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=last >= 3))
    figure.align_ylabels()
    return style.write_png(figure, path)


@style.house_style()
def plot_per_batch_loss(metrics: Metrics, path: str | Path, *, title: str) -> Path:
    """Draws the training loss ("train/loss", nats) of each logged interval against "step", with its running mean."""
    figure = style.new_figure(8, 4.5, title)
    axes = figure.subplots()
    steps, losses = series(metrics, "step", "train/loss")
    around = max(2, len(losses) // 60)
    if losses.size:
        axes.plot(
            steps,
            losses,
            color=style.SKY,
            linewidth=0.8,
            marker=_marker_of_one_point(losses),
            label="each logged interval",
        )
        mean = running_mean(losses, around)
        axes.plot(steps, mean, color=style.VERMILLION, linewidth=2, label=f"mean of {2 * around + 1} intervals")
        axes.legend()
    else:
        _mark_as_empty(axes)
    axes.set(xlabel="step", ylabel="training loss (nats)", xlim=(0, 1.02 * steps.max(initial=0) or 1))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,g}"))
    _scale_loss(axes, losses)
    return style.write_png(figure, path)


def series(metrics: Metrics, x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns two float64 arrays (n,): both values of each line that holds finite numbers under both keys."""
    pairs = [(line[x], line[y]) for line in metrics if line.get(x) is not None and line.get(y) is not None]
    values = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    values = values[np.isfinite(values).all(axis=1)]
    return values[:, 0], values[:, 1]


def running_mean(values: np.ndarray, around: int) -> np.ndarray:
    """Returns the mean of each value and the `around` values before and after it, fewer at the ends; float64 (n,)."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    indices = np.arange(len(values))
    starts, ends = np.maximum(indices - around, 0), np.minimum(indices + around + 1, len(values))
    return (sums[ends] - sums[starts]) / (ends - starts)


def _draw_curves(axes: Axes, curves: list[tuple[np.ndarray, np.ndarray]], names: Sequence[str | None]) -> None:
    looks: list[dict[str, Any]] = [
        {"color": style.BLUE, "linewidth": 1, "marker": _marker_of_one_point(curves[0][0])},
        {"color": style.VERMILLION, "linestyle": "--", "marker": "o"},
    ]
    for (x, y), name, look in zip(curves, names, looks, strict=False):
        if x.size:
            axes.plot(x, y, label=name, markevery=max(1, len(x) // 30), **look)
    if not axes.lines:
        _mark_as_empty(axes)
    elif names[0]:
        axes.legend()


def _marker_of_one_point(values: np.ndarray) -> str:
    return "o" if len(values) == 1 else ""  # a line with one point is invisible


def _plain_number(value: float, position: int | None = None) -> str:
    return f"{value:g}"


def _describe_best(epochs: np.ndarray, accuracies: np.ndarray) -> str:
    if not accuracies.size:
        return ""
    best = int(accuracies.argmax())
    return f" (best {accuracies[best]:.2f} % at epoch {epochs[best]:.4g})"


def _set_accuracy_range(axes: Axes, curves: list[np.ndarray]) -> None:
    """Sets the y range (percent) to that of most points. The legend states how many points are outside."""
    if not curves:
        return
    lowest, high = min(float(curve.min()) for curve in curves), max(float(curve.max()) for curve in curves)
    # The accuracy of the first steps rises from 10 %: in a range that includes them, 98 % and 99 % look equal.
    bulk = min(float(np.quantile(curve, 0.1)) for curve in curves)
    low = lowest if high - lowest < 2 * (high - bulk) else bulk
    margin = max(0.1 * (high - low), 0.5)
    low, high = max(low - margin, 0.0), min(high + margin, 100 + 0.2 * margin)
    axes.set_ylim(low, high)
    hidden = sum(int((curve < low).sum()) for curve in curves)
    note = f"{hidden} point{'s' * (hidden > 1)} below {low:.1f} % not shown" if hidden else None
    axes.legend(loc="lower right", title=note)


def _scale_loss(axes: Axes, losses: np.ndarray) -> None:
    """Lets the y axis start at zero, or makes it logarithmic if the losses span more than a decade."""
    if losses.size and losses.min() > 0 and losses.max() > 10 * losses.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(_plain_number))
        axes.yaxis.set_minor_locator(NullLocator())
    elif losses.size:
        # Losses in a narrow range would otherwise lie on the upper edge.
        axes.set_ylim(min(0, losses.min()), max(axes.get_ylim()[1], 1.05 * losses.max()))


def _mark_as_empty(axes: Axes) -> None:
    axes.text(0.5, 0.5, "nothing recorded", color=style.GREY, ha="center", va="center", transform=axes.transAxes)
    axes.yaxis.set_major_locator(NullLocator())
