"""Data sets that are arrays: NumPy's archives, torchvision's colour sets, and functions of the user's own."""

from __future__ import annotations

import inspect
import zipfile
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from mnist_dist.data.form import DataError, as_image_arrays, as_label_array
from mnist_dist.data.images import Images
from mnist_dist.data.sources.request import Request, Splits, as_positions, divide, in_mixed_order
from mnist_dist.machine.user_code import import_user_module

MOST_ARCHIVE = 2**38
"""Bytes that the arrays of an archive may take in memory."""


def make_splits(
    arrays: Sequence[tuple[Any, Any]], names: Sequence[str], classes: Sequence[str] | None = None, key: str = "root"
) -> Splits:
    """Returns the splits of pairs (images, labels): training set, test set and perhaps validation images.

    Without a test set, a fifth of each class becomes one.

    Args:
        names: of the pairs, for messages.
        classes: the classes, if the labels are positions in them.
        key: the recipe key that names the arrays, below `data`.

    Raises:
        DataError: the arrays are no images and labels.
    """
    named = [(each, f"{name} images") for (each, _), name in zip(arrays, names, strict=True)]
    images = as_image_arrays(named, key)
    labels = [
        as_label_array(each, len(part), f"{name} labels", key)
        for (_, each), part, name in zip(arrays, images, names, strict=True)
    ]
    positions, known = as_positions(labels, classes, key)
    parts = [Images(*pair, known) for pair in zip(images, positions, strict=True)]
    if len(parts) == 1:
        parts = [parts[0][rows] for rows in divide(parts[0].labels, known, key)]
    train, test, *validation = (in_mixed_order(part) for part in parts)
    return Splits(train, test, validation[0] if validation else None, mixed=True)


def read_npz(request: Request) -> Splits:
    """Reads train_images, train_labels, val_…, test_… (the layout of MedMNIST), or images and labels."""
    path = request.root
    if path.is_dir():
        archives = sorted(path.glob("*.npz"))
        if len(archives) != 1:
            message = f"{path} holds {len(archives)} archives; name one: data.root={path / 'images.npz'}"
            raise DataError("root", message, "missing")
        path = archives[0]
    if not path.is_file():
        raise DataError("root", f"{path} does not exist; expected an archive of NumPy arrays (.npz)", "missing")
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(each.file_size for each in archive.infolist())
        if size > MOST_ARCHIVE:
            raise DataError("root", f"{path} holds {size:,} bytes; at most {MOST_ARCHIVE:,}")
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files if name.endswith(("images", "labels"))}
            found = ", ".join(archive.files[:12]) or "nothing"
    except DataError:
        raise
    except Exception as error:  # NumPy and zipfile raise errors of many types for damaged files
        if "Object arrays" in str(error):
            message = "an array of Python objects, which may hold code, is not read; save names with labels.astype(str)"
            raise DataError("root", f"{path}: {message}", "type") from error
        raise DataError("root", f"{path} is no archive of NumPy arrays, or a damaged one: {error}") from error
    prefixes = ["train_", "test_", "val_"] if "train_images" in arrays else [""]
    if "train_images" in arrays and "test_images" not in arrays:
        prefixes = ["train_", "val_"] if "val_images" in arrays else ["train_"]
    prefixes = [each for each in prefixes if each != "val_" or "val_images" in arrays]
    wanted = [f"{prefix}{content}" for prefix in prefixes for content in ("images", "labels")]
    if missing := [name for name in wanted if name not in arrays]:
        raise DataError("root", f"{path}: the array {missing[0]} is missing; the archive holds {found}", "missing")
    pairs = [(arrays[f"{prefix}images"], arrays[f"{prefix}labels"]) for prefix in prefixes]
    return make_splits(pairs, [f"{path}: {prefix.strip('_')}".rstrip(": ") for prefix in prefixes])


# --- torchvision --------------------------------------------------------------------------------------------------

TORCHVISION = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "svhn": "SVHN", "stl10": "STL10"}
"""Name in a recipe -> torchvision's class."""


def read_torchvision(request: Request) -> Splits:
    """Reads CIFAR-10, CIFAR-100, SVHN or STL-10 as torchvision does, which verifies the MD5 of the files."""
    from torchvision import datasets

    name = TORCHVISION[request.name]
    build = getattr(datasets, name)

    def part(train: bool) -> Any:
        chosen = {"train": train} if name.startswith("CIFAR") else {"split": "train" if train else "test"}
        return build(request.root, download=request.download, **chosen)

    try:
        train, test = part(True), part(False)
    except (RuntimeError, OSError) as error:
        raise DataError("root", f"{request.root} does not hold {name}, or it is damaged: {error}", "missing") from error
    classes = getattr(train, "classes", None) or [str(number) for number in range(10)]
    pairs = [(each.data, each.targets if hasattr(each, "targets") else each.labels) for each in (train, test)]
    return make_splits(pairs, ["train", "test"], [str(each) for each in classes])


# --- code ---------------------------------------------------------------------------------------------------------


def is_data_code(name: Any) -> bool:
    """Returns whether a data set's name is a dotted path, `package.module:function`."""
    return isinstance(name, str) and ":" in name and not name.startswith("hub:")


def import_function(path: str) -> Any:
    """Returns the function at `package.module:function`.

    Only a person may give such a path, never a file that a command reads.

    Raises:
        DataError: the module cannot be imported, or does not define the function.
    """
    try:
        module, attribute = import_user_module(path)
    except ImportError as error:
        raise DataError("dataset", str(error), "missing") from error
    function = getattr(module, attribute, None)
    # The name may be any callable that the module imports, e.g. a function that runs a program.
    if not inspect.isfunction(function) or function.__module__ != module.__name__:
        known = [name for name, each in vars(module).items() if inspect.isfunction(each)]
        message = (
            f"{path!r}: {module.__name__!r} defines no function {attribute!r}; it has {', '.join(known[:8]) or 'none'}"
        )
        raise DataError("dataset", message, "unknown")
    return function


def call_function(request: Request) -> Splits:
    """Calls the function that the recipe names; it returns (train, test), each a pair of images and labels."""
    function = import_function(request.name)
    try:
        found = function()
    except (Exception, SystemExit) as error:  # a user's own function may raise any exception
        raise DataError("dataset", f"the function failed: {type(error).__name__}: {error}", "model") from error
    if not isinstance(found, tuple | list) or len(found) != 2:
        message = f"the function returned {_described(found)}; expected (train, test), each (images, labels)"
        raise DataError("dataset", message, "type")
    pairs, classes = [], None
    for part in found:
        if isinstance(part, Images):
            pairs.append((part.images, part.labels))
            classes = part.classes
        elif isinstance(part, tuple | list) and len(part) == 2:
            pairs.append((part[0], part[1]))
        else:
            message = f"expected a pair (images, labels), found {_described(part)}"
            raise DataError("dataset", message, "type")
    return make_splits(pairs, ["train", "test"], classes, key="dataset")


def _described(value: Any) -> str:
    if isinstance(value, np.ndarray | Tensor):
        return f"an array of shape {tuple(value.shape)}"
    return f"a {type(value).__name__} of {len(value)}" if hasattr(value, "__len__") else type(value).__name__
