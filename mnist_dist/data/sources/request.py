"""What a source is asked for and what it returns, and how labels become positions in the list of classes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mnist_dist.data.form import DataError, Form
from mnist_dist.data.images import Images

MOST_CLASSES = 1000
"""More classes are refused: such labels are probably not classes, and a weights file lists at most as many."""

LONGEST_NAME = 200
"""Letters of the longest name of a class."""

TEST_SHARE = 5
"""In a set without a test set, one image in this many of each class becomes a test image."""


@dataclass(frozen=True)
class Request:
    """What a source is asked for.

    Attributes:
        name: as in the recipe, `data.dataset`.
        root: the folder of the data, or for some sources its file.
        split: EMNIST's split.
        download: whether missing files may be downloaded.
        form: channels and size of the images. A source that does not decode files may ignore it.
        on_bad_image: whether a damaged image ends the reading, or is left out.
    """

    name: str
    root: Path = Path("data")
    split: str = "balanced"
    download: bool = True
    form: Form = field(default_factory=Form)
    on_bad_image: Literal["stop", "skip"] = "stop"


@dataclass(frozen=True)
class Splits:
    """What a source returns.

    Attributes:
        train, test: not yet normalised.
        validation: the source's own validation images.
        mixed: whether the images are in `mixed_order`, so that their first or last rows hold all classes in the shares
            of the complete set.
    """

    train: Images
    test: Images
    validation: Images | None = None
    mixed: bool = False

    @property
    def parts(self) -> tuple[Images, ...]:
        return (self.train, self.test, *([] if self.validation is None else [self.validation]))


def as_positions(
    labels: Sequence[np.ndarray], names: Sequence[str] | None = None, key: str = "root"
) -> tuple[list[Tensor], tuple[str, ...]]:
    """Returns the labels of several parts as positions in the list of classes, int64 (N,) each, and the classes.

    Args:
        labels: arrays (N,) of whole numbers or of text, the training set's first.
        names: the classes, if the source knows them; the labels are then positions.
        key: the recipe key that names the data, below `data`.

    Raises:
        DataError: a label is unknown, or there are too few or too many classes.
    """
    if names is not None:
        low, high = min(int(each.min()) for each in labels), max(int(each.max()) for each in labels)
        if not 0 <= low <= high < len(names):
            raise DataError(key, f"expected labels from 0 to {len(names) - 1}, found {low} to {high}")
        classes = [str(name) for name in names]
        found = [torch.from_numpy(each.astype(np.int64)) for each in labels]
    else:
        values = np.unique(labels[0])
        for each in labels[1:]:
            if unknown := sorted(set(np.unique(each).tolist()) - set(values.tolist())):
                shown = ", ".join(map(str, unknown[:5]))
                raise DataError(key, f"a class has no training image: {shown}")
        order = sorted(range(len(values)), key=lambda at: natural(str(values[at])))
        positions = np.empty(len(values), dtype=np.int64)
        positions[order] = np.arange(len(values))
        found = [torch.from_numpy(positions[np.searchsorted(values, each)]) for each in labels]
        classes = [str(values[at]) for at in order]
    _check_classes(classes, key)
    return found, tuple(classes)


def _check_classes(classes: Sequence[str], key: str) -> None:
    """Raises DataError unless there are at least two classes, not too many, with names of a line each."""
    if len(classes) < 2:
        raise DataError(key, f"only one class, {classes[0]!r}; a classifier needs two" if classes else "no classes")
    if len(classes) > MOST_CLASSES:
        raise DataError(key, f"{len(classes):,} classes, {classes[0]!r} to {classes[-1]!r}; at most {MOST_CLASSES:,}")
    if wrong := [name for name in classes if not name.isprintable() or not 0 < len(name) <= LONGEST_NAME]:
        raise DataError(key, f"a class has the name {wrong[0][:80]!r}; expected 1 to {LONGEST_NAME} printable letters")


def natural(name: str) -> list[tuple[int, int, str]]:
    """Returns a sorting key that puts class 2 before class 10."""
    return [
        (0, int(part), "") if part.isascii() and part.isdigit() else (1, 0, part)
        for part in re.findall(r"[0-9]+|[^0-9]+", name)
    ]


def mixed_order(labels: Tensor) -> Tensor:
    """Returns an order of rows whose first or last rows, any number, hold all classes in their shares of the set.

    Args:
        labels: int64 (N,).

    Returns:
        int64 (N,), a permutation; a function of the labels.
    """
    generator = torch.Generator().manual_seed(20_231)
    place = torch.empty(len(labels), dtype=torch.float64)
    for label in labels.unique().tolist():
        rows = (labels == label).nonzero()[:, 0]
        # The rows of a class, shuffled and spread evenly over the range from 0 to 1.
        ranks = torch.randperm(len(rows), generator=generator) + torch.rand(1, generator=generator)
        place[rows] = ranks.double() / len(rows)
    return place.argsort(stable=True)


def divide(labels: Tensor, classes: Sequence[str], key: str = "root") -> tuple[Tensor, Tensor]:
    """Divides a set without a test set: returns the rows of the training set and of the test set, int64.

    The test set has a fifth of each class, at least one image of it. The division is a function of the labels.

    Args:
        labels: int64 (N,), positions in `classes`.
        key: the recipe key that names the data, below `data`.

    Raises:
        DataError: a class has one image only.
    """
    generator = torch.Generator().manual_seed(20_232)
    train, test = [], []
    for label in labels.unique().tolist():
        rows = (labels == label).nonzero()[:, 0]
        if len(rows) < 2:
            message = (
                f"the class {classes[label]!r} has one image only; a set without a test set needs two of each class"
            )
            raise DataError(key, message)
        rows = rows[torch.randperm(len(rows), generator=generator)]
        count = max(1, len(rows) // TEST_SHARE)
        test.append(rows[:count])
        train.append(rows[count:])
    return torch.cat(train).sort().values, torch.cat(test).sort().values


def in_mixed_order(part: Images) -> Images:
    """Returns a copy of the images in `mixed_order`."""
    return part[mixed_order(part.labels)]
