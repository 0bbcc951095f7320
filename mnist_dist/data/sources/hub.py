"""Data sets of Hugging Face's `datasets`, an optional package: from its hub, or from a local folder."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mnist_dist.data.decoding import ImageFiles, decode_files
from mnist_dist.data.form import DataError
from mnist_dist.data.images import Images
from mnist_dist.data.sources.folder import note
from mnist_dist.data.sources.request import Request, Splits, as_positions, divide, mixed_order

PREFIX = "hub:"


def read_hub(request: Request) -> Splits:
    """Reads the data set NAME of `hub:NAME`: a folder that `datasets` has written, or a name of the hub.

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
        elif request.download or Path(name).exists():
            loaded = datasets.load_dataset(name)
        else:
            loaded = datasets.load_dataset(name, download_mode="reuse_dataset_if_exists")
    except Exception as error:  # the package raises errors of many types
        raise DataError("dataset", f"{request.name} cannot be loaded: {error}", "missing") from error
    parts = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
    if "train" not in parts:
        raise DataError("dataset", f"{request.name} has no split train; it has {', '.join(parts)}", "missing")
    names = [each for each in ("train", "test", "validation") if each in parts]
    if "test" not in parts and "validation" in parts:
        names = ["train", "validation"]
    return _decode(request, [parts[each] for each in names], datasets)


def _decode(request: Request, parts: list[Any], datasets: Any) -> Splits:
    features = parts[0].features
    image = next((key for key, kind in features.items() if isinstance(kind, datasets.Image)), None)
    label = next((key for key, kind in features.items() if isinstance(kind, datasets.ClassLabel)), None)
    label = label or next((key for key in ("label", "labels", "fine_label") if key in features), None)
    if image is None or label is None:
        message = f"{request.name} needs a column of images and a column of classes; it has {', '.join(features)}"
        raise DataError("dataset", message, "conflict")
    names = getattr(features[label], "names", None)
    labels = [np.asarray(part[label][:]) for part in parts]
    orders = []
    positions, classes = as_positions(labels, names)
    if len(parts) == 1:
        train, test = divide(positions[0])
        parts = [parts[0].select(rows.tolist()) for rows in (train, test)]
        positions = [positions[0][rows] for rows in (train, test)]
    orders = [mixed_order(each) for each in positions]
    raw = [part.cast_column(image, datasets.Image(decode=False)) for part in parts]
    rows = [(part, row) for part, order in enumerate(orders) for row in order.tolist()]

    def open_image(at: int) -> Any:
        part, row = rows[at]
        held = raw[part][row][image]
        return io.BytesIO(held["bytes"]) if held["bytes"] else held["path"]

    fingerprint = ",".join(part._fingerprint for part in parts)
    names = [f"{request.name}, image {row} of part {part}" for part, row in rows]
    # The data set may be in a folder that is not the user's: the cache is in the user's own cache folder.
    files = ImageFiles(names, open_image, fingerprint, Path("/nonexistent"))
    decoded = decode_files(files, request.form, request.on_bad_image, note)
    found, first = [], 0
    all_labels = torch.cat([each[order] for each, order in zip(positions, orders, strict=True)])
    for order in orders:
        start, end = (int(torch.searchsorted(decoded.kept, at)) for at in (first, first + len(order)))
        found.append(Images(decoded.images[start:end], all_labels[decoded.kept[start:end]], classes))
        first += len(order)
    return Splits(found[0], found[1], found[2] if len(found) > 2 else None, mixed=True)
