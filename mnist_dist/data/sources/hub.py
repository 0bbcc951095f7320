"""Data sets of Hugging Face's `datasets`, an optional package: from its hub, or from a local folder."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from mnist_dist.data.decoding import ImageFiles, decode_files
from mnist_dist.data.form import DataError, as_label_array
from mnist_dist.data.sources.folder import TEST, TRAIN, VALIDATION, as_splits, note
from mnist_dist.data.sources.request import Request, Splits, as_positions, divide, mixed_order

PREFIX = "hub:"

NO_LABEL = -1
"""The label with which data sets of the hub mark images whose class is not published."""


def read_hub(request: Request) -> Splits:
    """Reads the data set NAME of `hub:NAME`: a folder that `datasets` can read or has written, or a name of the hub.

    Raises:
        ImportError: the package `datasets` is not installed.
        DataError: there is no such data set, or it holds no images with a class each.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError('data sets of the hub need the package datasets: pip install "mnist_dist[hub]"') from error
    name = request.name.removeprefix(PREFIX)
    try:
        if Path(name, "dataset_dict.json").is_file() or Path(name, "state.json").is_file():
            loaded = datasets.load_from_disk(name)
        else:
            loaded = datasets.load_dataset(name)
    except Exception as error:  # the package raises errors of many types
        raise DataError("dataset", f"the data set cannot be loaded: {error}", "missing") from error
    parts = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
    by_role = {role: parts[found] for role, names in (("train", TRAIN), ("val", VALIDATION), ("test", TEST))
               if (found := next((each for each in parts if each.lower() in names), None))}  # fmt: skip
    if "train" not in by_role:
        raise DataError("dataset", f"the data set has no split train; it has {', '.join(parts)}", "missing")
    return _decode(request, by_role, datasets)


def _find_columns(features: Any, datasets: Any) -> tuple[str, str]:
    """Returns the names of the columns of images and of classes."""
    image = next((key for key, kind in features.items() if isinstance(kind, datasets.Image)), None)
    label = next((key for key, kind in features.items() if isinstance(kind, datasets.ClassLabel)), None)
    label = label or next((key for key in ("label", "labels", "fine_label") if key in features), None)
    if image is None or label is None:
        message = f"the data set needs a column of images and a column of classes; it has {', '.join(features)}"
        raise DataError("dataset", message, "conflict")
    return image, label


def _decode(request: Request, parts: dict[str, Any], datasets: Any) -> Splits:
    """Decodes the images of all splits into one array, each split in mixed order."""
    image, label = _find_columns(parts["train"].features, datasets)
    values = {role: part[label][:] for role, part in parts.items()}
    if unlabelled := [role for role, each in values.items() if role != "train" and set(each) == {NO_LABEL}]:
        note(f"{request.name}: the labels of the split {' and '.join(unlabelled)} are not published; it is not used")
    roles = [role for role in parts if role not in unlabelled]
    labels = [as_label_array(values[role], len(parts[role]), f"{role} labels", "dataset") for role in roles]
    positions, classes = as_positions(labels, getattr(parts["train"].features[label], "names", None), "dataset")
    rows = {role: torch.arange(len(each)) for role, each in zip(roles, positions, strict=True)}
    split_of = {role: role for role in roles}
    if roles == ["train"]:
        rows = dict(zip(("train", "test"), divide(positions[0], classes, "dataset"), strict=True))
        split_of = {"train": "train", "test": "train"}
    labels_of = dict(zip(roles, positions, strict=True))
    ordered = {role: each[mixed_order(labels_of[split_of[role]][each])] for role, each in rows.items()}
    places = [(split_of[role], row) for role, each in ordered.items() for row in each.tolist()]
    raw = {role: parts[role].cast_column(image, datasets.Image(decode=False)) for role in roles}

    def open_image(at: int) -> Any:
        split, row = places[at]
        held = raw[split][row][image]
        if held is None:
            raise OSError("there is no image")
        return io.BytesIO(held["bytes"]) if held["bytes"] else held["path"]

    titles = [f"image {row} of the split {split}" for split, row in places]
    fingerprint = ",".join(parts[role]._fingerprint for role in roles)
    files = ImageFiles(titles, open_image, fingerprint, None)  # the data set's folder may not be the user's
    decoded = decode_files(files, request.form, request.on_bad_image, note)
    labels_of_all = torch.cat([labels_of[split_of[role]][each] for role, each in ordered.items()])
    return as_splits(decoded, labels_of_all, classes, {role: len(each) for role, each in ordered.items()})
