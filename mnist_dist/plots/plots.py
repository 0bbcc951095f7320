"""The pictures of a run folder: each function takes plain values and a path, writes one PNG and returns the path.

Arrays may be NumPy arrays or tensors on any device.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from mnist_dist.plots import style

Metrics = Sequence[Mapping[str, Any]]

# --- curves ----------------------------------------------------------------------------------------------------------


@style.house_style()
def plot_training_history(metrics: Metrics, path: str | Path, *, title: str, eval_name: str = "test") -> Path:
    """Loss, accuracy and learning rate against the epoch, one above the other.

    Args:
        metrics: the lines of metrics.jsonl. Training lines hold "epoch" (epochs completed, e.g. 0.43), "train/loss"
            (nats), "train/accuracy" (percent) and "train/lr"; evaluation lines "epoch", "eval/loss" and
            "eval/accuracy". Either kind may be missing, and values that are not finite are passed over.
        path: the PNG to write.
        title: of the figure.
        eval_name: what the evaluation lines were measured on, for the legend.
    """
    figure = style.new_figure(8, 8.5, title)
    loss, accuracy, rate = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 1.6))

    curves = [series(metrics, "epoch", f"{split}/loss") for split in ("train", "eval")]
    _draw_curves(loss, curves, ["training", eval_name])
    _scale_loss(loss, np.concatenate([values for _, values in curves]))
    loss.set_ylabel("loss (nats)")

    curves = [series(metrics, "epoch", f"{split}/accuracy") for split in ("train", "eval")]
    _draw_curves(accuracy, curves, ["training", eval_name + _best(*curves[1])])
    _focus(accuracy, [values for _, values in curves if values.size])
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
    """Training loss ("train/loss", nats) of each logged interval against "step", with its running mean."""
    figure = style.new_figure(8, 4.5, title)
    axes = figure.subplots()
    steps, losses = series(metrics, "step", "train/loss")
    around = max(2, len(losses) // 60)
    if losses.size:
        axes.plot(steps, losses, color=style.SKY, linewidth=0.8, marker=_point(losses), label="each logged interval")
        mean = running_mean(losses, around)
        axes.plot(steps, mean, color=style.VERMILLION, linewidth=2, label=f"mean of {2 * around + 1} intervals")
        axes.legend()
    else:
        _say_nothing_recorded(axes)
    axes.set(xlabel="step", ylabel="training loss (nats)", xlim=(0, 1.02 * steps.max(initial=0) or 1))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,g}"))
    _scale_loss(axes, losses)
    return style.write_png(figure, path)


def series(metrics: Metrics, x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
    """Two float64 arrays (n,): of the lines that hold a finite number under both keys, in their order."""
    pairs = [(line[x], line[y]) for line in metrics if line.get(x) is not None and line.get(y) is not None]
    values = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    values = values[np.isfinite(values).all(axis=1)]
    return values[:, 0], values[:, 1]


def running_mean(values: np.ndarray, around: int) -> np.ndarray:
    """Mean of each value with the `around` values before and after it, fewer at the ends; float64 (n,)."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    starts, ends = np.maximum(places - around, 0), np.minimum(places + around + 1, len(values))
    return (sums[ends] - sums[starts]) / (ends - starts)


def _draw_curves(axes: Axes, curves: list[tuple[np.ndarray, np.ndarray]], names: Sequence[str | None]) -> None:
    looks: list[dict[str, Any]] = [
        {"color": style.BLUE, "linewidth": 1, "marker": _point(curves[0][0])},
        {"color": style.VERMILLION, "linestyle": "--", "marker": "o"},
    ]
    for (x, y), name, look in zip(curves, names, looks, strict=False):
        if x.size:
            axes.plot(x, y, label=name, markevery=max(1, len(x) // 30), **look)
    if not axes.lines:
        _say_nothing_recorded(axes)
    elif names[0]:
        axes.legend()


def _point(values: np.ndarray) -> str:
    return "o" if len(values) == 1 else ""  # a line through one point is invisible


def _plain_number(value: float, position: int | None = None) -> str:
    return f"{value:g}"


def _best(epochs: np.ndarray, accuracies: np.ndarray) -> str:
    if not accuracies.size:
        return ""
    best = int(accuracies.argmax())
    return f" (best {accuracies[best]:.2f} % at epoch {epochs[best]:g})"


def _focus(axes: Axes, curves: list[np.ndarray]) -> None:
    """Sets the y range, percent, by the bulk of each curve, and says in the legend how many points that leaves out."""
    if not curves:
        return
    lowest, high = min(float(curve.min()) for curve in curves), max(float(curve.max()) for curve in curves)
    # The first steps climb from 10 %: a range that holds them squashes 98 and 99 into one line.
    bulk = min(float(np.quantile(curve, 0.1)) for curve in curves)
    low = lowest if high - lowest < 2 * (high - bulk) else bulk
    margin = max(0.1 * (high - low), 0.5)
    low, high = max(low - margin, 0.0), min(high + margin, 100 + 0.2 * margin)
    axes.set_ylim(low, high)
    hidden = sum(int((curve < low).sum()) for curve in curves)
    note = f"{hidden} point{'s' * (hidden > 1)} below {low:.1f} % not shown" if hidden else None
    axes.legend(loc="lower right", title=note)


def _scale_loss(axes: Axes, losses: np.ndarray) -> None:
    """From zero, or logarithmic when the losses span more than a decade."""
    if losses.size and losses.min() > 0 and losses.max() > 10 * losses.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(_plain_number))
        axes.yaxis.set_minor_locator(NullLocator())
    elif losses.size:
        axes.set_ylim(bottom=min(0, losses.min()))


def _say_nothing_recorded(axes: Axes) -> None:
    axes.text(0.5, 0.5, "nothing recorded", color=style.GREY, ha="center", va="center", transform=axes.transAxes)
    axes.yaxis.set_major_locator(NullLocator())


# --- images ----------------------------------------------------------------------------------------------------------


@style.house_style()
def plot_predictions(
    images: Any,
    labels: Any,
    probabilities: Any,
    path: str | Path,
    *,
    classes: Sequence[str],
    title: str,
    count: int = 36,
) -> Path:
    """Images spread evenly over the set with the prediction above each, then the most confident mistakes.

    Args:
        images: uint8 (N, 1, 28, 28).
        labels: int64 (N,), the truth.
        probabilities: float (N, C).
        path: the PNG to write.
        classes: the C names of the classes.
        title: of the figure.
        count: places in the grid, six to a row; a third of the rows, at least one, is for mistakes.

    Raises:
        ValueError: the lengths differ, or there is no image.
    """
    predictions = _Predictions.read(images, labels, probabilities, classes)
    columns = 6
    rows = max(2, math.ceil(count / columns))
    places = columns * max(1, rows // 3)
    mistakes = predictions.mistakes()
    spread = min(columns * rows - places, len(predictions.labels))
    regular = np.linspace(0, len(predictions.labels) - 1, spread).round().astype(int)
    groups = [("Spread evenly over the set", regular), (predictions.describe(mistakes, places), mistakes[:places])]
    return style.write_png(_draw_groups(predictions, groups, columns, title), path)


@style.house_style()
def plot_misclassified(
    images: Any,
    labels: Any,
    probabilities: Any,
    path: str | Path,
    *,
    classes: Sequence[str],
    title: str,
    count: int = 32,
) -> Path:
    """The `count` mistakes made with the highest confidence; arguments and errors as in `plot_predictions`."""
    predictions = _Predictions.read(images, labels, probabilities, classes)
    mistakes = predictions.mistakes()
    groups = [(predictions.describe(mistakes, count), mistakes[:count])]
    columns = min(8, max(4, len(mistakes)))
    return style.write_png(_draw_groups(predictions, groups, columns, title), path)


@style.house_style()
def plot_augmented_samples(originals: Any, augmented: Any, path: str | Path, *, title: str) -> Path:
    """Each original above what augmentation made of it, ten to a row; both (N, 1, 28, 28), grey levels 0..255.

    Raises:
        ValueError: the shapes differ, or there is no image.
    """
    before, after = _array(originals), _array(augmented)
    if before.shape != after.shape or not len(before):
        raise ValueError(f"originals and augmented must be as many and not none: {before.shape} and {after.shape}")
    columns, indent, pitch = min(10, len(before)), 1.0, style.TILE + 0.08
    block = 2 * pitch + 0.2
    width = max(4.5, indent + columns * pitch + style.MARGIN)
    figure, sheet = style.new_sheet(width, block * math.ceil(len(before) / columns), title)
    for index in range(len(before)):
        row, column = divmod(index, columns)
        for line, (name, tiles) in enumerate([("original", before), ("augmented", after)]):
            top = row * block + line * pitch
            style.draw_tile(sheet, indent + column * pitch, top, tiles[index, 0])
            if column == 0:
                sheet.text(indent - 0.1, top + style.TILE / 2, name, fontsize=9, ha="right", va="center")
    return style.write_png(figure, path)


@dataclass(frozen=True)
class _Predictions:
    pictures: np.ndarray  # (N, H, W), grey levels
    labels: np.ndarray  # (N,)
    guesses: np.ndarray  # (N,)
    confidences: np.ndarray  # (N,), probability of the guess
    classes: Sequence[str]

    @classmethod
    def read(cls, images: Any, labels: Any, probabilities: Any, classes: Sequence[str]) -> _Predictions:
        pictures, truth, chances = _array(images), _array(labels), _array(probabilities)
        if not 0 < len(pictures) == len(truth) == len(chances):
            lengths = f"{len(pictures)}, {len(truth)} and {len(chances)}"
            raise ValueError(f"images, labels and probabilities must be as many and not none: {lengths}")
        return cls(pictures[:, 0], truth, chances.argmax(axis=1), chances.max(axis=1), classes)

    def mistakes(self) -> np.ndarray:
        """Indices of the wrong ones, the most confident first."""
        wrong = np.flatnonzero(self.guesses != self.labels)
        return wrong[np.argsort(-self.confidences[wrong], kind="stable")]

    def describe(self, mistakes: np.ndarray, places: int) -> str:
        found, images = len(mistakes), f"{len(self.labels):,} images"
        if not found:
            return f"No mistakes: all {images} are classified correctly"
        which = "All" if found <= places else f"The {places} most confident of"
        return f"{which} {found:,} mistake{'s' * (found > 1)} in {images}"

    def caption(self, index: int) -> tuple[str, str]:
        """What to write above an image, and its colour; the sign says the same in grey."""
        guess, truth = self.classes[self.guesses[index]], self.classes[self.labels[index]]
        if guess == truth:
            return f"{guess} ✓", style.GREEN
        confidence = f"{self.confidences[index]:.2f}"
        if len(guess) + len(truth) < 6:
            return f"✗ {guess} (true {truth}) {confidence}", style.VERMILLION
        return f"✗ {guess} {confidence}\n(true {truth})", style.VERMILLION  # the names of clothes need a line each


def _draw_groups(predictions: _Predictions, groups: list[tuple[str, np.ndarray]], columns: int, title: str) -> Figure:
    """A sheet of headings, each above the captioned images of its indices."""
    captions = [[predictions.caption(index) for index in indices] for _, indices in groups]
    lines = [line for group in captions for text, _ in group for line in text.splitlines()]
    # In inches: thirteen bold letters of 8 pt to one, two lines of them to less than a third.
    across = max(style.TILE + 0.3, 0.075 * max(map(len, lines), default=0) + 0.1)
    downs = [style.TILE + (0.45 if any("\n" in text for text, _ in group) else 0.3) for group in captions]
    heights = [0.45 + down * math.ceil(len(group) / columns) for down, group in zip(downs, captions, strict=True)]
    figure, sheet = style.new_sheet(2 * style.MARGIN + columns * across, sum(heights), title)
    y = 0.0
    for (heading, indices), texts, down, height in zip(groups, captions, downs, heights, strict=True):
        sheet.text(style.MARGIN, y, heading, color=style.GREY, va="top")
        for place, (index, (text, colour)) in enumerate(zip(indices, texts, strict=True)):
            row, column = divmod(place, columns)
            middle = style.MARGIN + (column + 0.5) * across
            top = y + 0.25 + (row + 1) * down - style.TILE
            style.draw_tile(sheet, middle - style.TILE / 2, top, predictions.pictures[index])
            weight = "normal" if colour == style.GREEN else "bold"
            sheet.text(middle, top - 0.05, text, color=colour, fontsize=8, weight=weight, ha="center", va="bottom")
        y += height
    return figure


# --- confusion matrix ------------------------------------------------------------------------------------------------


@style.house_style()
def plot_confusion_matrix(matrix: Any, path: str | Path, *, classes: Sequence[str], title: str) -> Path:
    """Counts, int (C, C), rows truth, columns prediction; colour is for the mistakes only, numbers up to 20 classes.

    Raises:
        ValueError: the matrix is not C × C for the C names in `classes`.
    """
    counts, size = _array(matrix).astype(np.int64), len(classes)
    if counts.shape != (size, size):
        raise ValueError(f"a confusion matrix of {size} classes is {size} × {size}, not {counts.shape}")
    figure = style.new_figure(8.5, 7.6, title) if size <= 20 else style.new_figure(10, 9.2, title)
    axes = figure.subplots()

    # The right ones outnumber the mistakes a hundredfold: they get numbers, the colour is left to the mistakes.
    right = np.eye(size, dtype=bool)
    paint = PowerNorm(0.5, vmin=0, vmax=max(1, counts[~right].max(initial=0)))
    colours = matplotlib.colormaps["Blues"].with_extremes(bad=style.PALE)
    image = axes.imshow(np.ma.masked_array(counts, mask=right), cmap=colours, norm=paint)
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
    places, letters = np.arange(len(classes)), 10 if len(classes) <= 20 else 8
    tilted = max(map(len, classes)) > 3
    slant: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if tilted else {}
    axes.set_xticks(places, classes, fontsize=letters, **slant)
    axes.set_yticks(places, classes, fontsize=letters)
    axes.set(xlabel="prediction (class)", ylabel="truth (class)")
    axes.grid(False)
    axes.set_xticks(places[1:] - 0.5, minor=True)
    axes.set_yticks(places[1:] - 0.5, minor=True)
    axes.grid(which="minor")
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)


def _describe_confusion(counts: np.ndarray, classes: Sequence[str]) -> str:
    """The accuracy, and the five pairs of classes that are mixed up most often."""
    total, right = int(counts.sum()), int(np.trace(counts))
    text = f"{100 * right / max(total, 1):.2f} % of {total:,} images right (grey), {total - right:,} wrong (blue)"
    mistakes = [(-count, *pair) for pair, count in np.ndenumerate(counts) if count and pair[0] != pair[1]]
    pairs = [f"{classes[truth]} → {classes[guess]} ({-count:,})" for count, truth, guess in sorted(mistakes)[:5]]
    return text + "\n" + textwrap.fill("most often, truth → prediction:  " + ",  ".join(pairs), 110) if pairs else text


def _array(values: Any) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        # NumPy has no bfloat16.
        values = values.detach().float() if values.is_floating_point() else values.detach()
        values = values.cpu()
    return np.asarray(values)
