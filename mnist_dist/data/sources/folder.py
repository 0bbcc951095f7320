"""Image files of the user's own: in folders named after the classes, or listed in a table."""

from __future__ import annotations

import csv
import os
import re
import sys
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mnist_dist.data.cache import Decoded
from mnist_dist.data.decoding import ImageFiles, decode_files
from mnist_dist.data.form import DataError
from mnist_dist.data.images import Images
from mnist_dist.data.sources.request import Request, Splits, as_positions, divide, mixed_order

TRAIN, VALIDATION, TEST = ("train", "training"), ("val", "valid", "validation"), ("test", "testing")
"""Names of the folders of the parts, in any case."""

PART = re.compile(r"(?<![a-z])(train|test|val|valid|training|testing|validation)(set)?(?![a-z])")
"""A name that looks as if it named a part, e.g. seg_train."""

EXPECTED = "expected a folder with train/CLASS/… and test/CLASS/…, or with CLASS/…"

STRAY = ("Thumbs.db", "desktop.ini")
"""Files that file managers leave in folders of images."""

MOST_TABLE = 2**30
"""Bytes of the largest table that is read."""


@dataclass(frozen=True)
class _Part:
    """Files of a part of the set with their labels, an array of text (N,). Paths are text: 60,000 `Path`s are slow."""

    files: list[str]
    labels: np.ndarray


def read_folder(request: Request) -> Splits:
    """Reads train/CLASS/… and test/CLASS/… or val/CLASS/…, or CLASS/…, which is divided into training and test set."""
    root = request.root
    if not root.is_dir():
        raise DataError("root", f"{root} is not a folder; {EXPECTED}", "conflict" if root.exists() else "missing")
    folders = _folders(root)
    named = {role: _named(folders, names) for role, names in (("train", TRAIN), ("val", VALIDATION), ("test", TEST))}
    if named["train"]:
        others = [folder.name for folder in folders if folder not in named.values()]
        if others and request.download:  # one process of a node gives the note
            names = ", ".join(others[:8])
            note(f"data.root: {root} also holds {names}; only the folders train, val and test are read")
        parts = {role: _read_classes(folder) for role, folder in named.items() if folder}
        if len(parts) == 1:
            return _decode(request, root, _divided(parts["train"]))
        return _decode(request, root, parts)
    if named["test"] or named["val"]:
        names = ", ".join(folder.name for folder in folders[:8])
        raise DataError("root", f"{root} has no folder train/; it holds {names}", "missing")
    _check_one_level(root, folders)
    return _decode(request, root, _divided(_read_classes(root)))


def read_csv(request: Request) -> Splits:
    """Reads a table with the columns path and label, and optionally split (train, val or test).

    `data.root` is the table; paths are relative to its folder.
    """
    path = request.root
    if path.is_dir():
        tables = sorted(path.glob("*.csv"))
        if len(tables) != 1:
            raise DataError(
                "root", f"{path} holds {len(tables)} tables; name one: data.root={path / 'images.csv'}", "missing"
            )
        path = tables[0]
    if not path.is_file():
        raise DataError("root", f"{path} does not exist; expected a table with the columns path,label", "missing")
    parts = _read_table(path)
    return _decode(request, path.parent, parts if len(parts) > 1 else _divided(parts["train"]))


# --- folders ------------------------------------------------------------------------------------------------------


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(
            each for each in folder.iterdir() if each.is_dir() and not each.name.startswith((".", "__MACOSX"))
        )
    except OSError as error:
        raise DataError("root", f"{folder} cannot be read: {error.strerror}", "damaged") from error


def _check_one_level(root: Path, folders: list[Path]) -> None:
    """Raises DataError if the folders in `root` are not likely to be classes."""
    if not folders:
        raise DataError("root", f"{root} holds no folders; {EXPECTED}", "missing")
    if len(folders) == 1 and (inner := _folders(folders[0])):
        names = ", ".join(folder.name for folder in inner[:4])
        message = f"{root} holds one folder, {folders[0].name}, with {names}; did you mean data.root={folders[0]}?"
        raise DataError("root", message, "missing")
    parts = [folder.name for folder in folders if PART.search(folder.name.lower())]
    if any("train" in name.lower() for name in parts) and len(parts) > 1:  # one alone may be a class: bullet_train
        message = f"{root} holds {', '.join(parts[:4])}; rename the folders of the parts to train, val or test"
        raise DataError("root", message, "missing")


def _named(folders: list[Path], names: tuple[str, ...]) -> Path | None:
    """Returns the folder of a part.

    Raises:
        DataError: there are two.
    """
    found = [folder for folder in folders if folder.name.lower() in names]
    if len(found) > 1:
        listed = ", ".join(folder.name for folder in found)
        message = f"{found[0].parent} holds {listed}, which name the same part; keep one of them"
        raise DataError("root", message, "conflict")
    return found[0] if found else None


def _read_classes(folder: Path) -> _Part:
    """Returns all files below the class folders of a part."""
    files: list[str] = []
    labels: list[str] = []
    empty = []
    classes = _folders(folder)
    if not classes:
        raise DataError("root", f"{folder} holds no class folders; expected {folder}/CLASS/…", "missing")
    for each in classes:
        found = _files(each)
        if not found:
            empty.append(each.name)
        files += found
        labels += [unicodedata.normalize("NFC", each.name)] * len(found)  # macOS writes the same name otherwise
    if empty:
        raise DataError(
            "root", f"{folder}: no files in the class folder {', '.join(empty[:8])}; remove or fill it", "missing"
        )
    return _Part(files, np.array(labels))


def _files(folder: Path) -> list[str]:
    """Returns the files below a folder, sorted, except hidden ones. Links are followed, but not back up."""

    def refuse(error: OSError) -> None:
        raise DataError("root", f"{error.filename} cannot be read: {error.strerror}") from error

    found, seen = [], {str(parent) for parent in folder.resolve().parents}
    for above, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(above)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [f"{above}/{name}" for name in names if not name.startswith(".") and name not in STRAY]
    return sorted(found)


# --- tables -------------------------------------------------------------------------------------------------------


def _read_table(path: Path) -> dict[str, _Part]:
    if path.stat().st_size > MOST_TABLE:
        raise DataError("root", f"{path} is larger than {MOST_TABLE:,} bytes")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            table = list(csv.reader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError("root", f"{path} is no table in UTF-8: {error}") from error
    head = [name.strip().lower() for name in table[0]] if table else []
    if "path" not in head or "label" not in head:
        raise DataError(
            "root", f"{path}: expected a first line with the columns path,label, found {','.join(head)[:80]!r}"
        )
    rows: dict[str, list[tuple[str, str]]] = {}
    at, to = head.index("path"), head.index("label")
    split = head.index("split") if "split" in head else None
    for number, row in enumerate(table[1:], start=2):
        if not any(value.strip() for value in row):  # spreadsheets write such rows at the end
            continue
        if len(row) != len(head):
            raise DataError("root", f"{path}:{number}: expected {len(head)} values, found {len(row)}")
        role = _role(row[split], path, number) if split is not None else "train"
        if not row[to].strip():
            raise DataError("root", f"{path}:{number}: the label is empty")
        label = unicodedata.normalize("NFC", row[to].strip())
        rows.setdefault(role, []).append((str(path.parent / row[at].strip()), label))
    if "train" not in rows:
        raise DataError("root", f"{path} lists no training images")
    _check_files(path, rows)
    return {
        role: _Part([file for file, _ in part], np.array([label for _, label in part])) for role, part in rows.items()
    }


def _check_files(path: Path, rows: dict[str, list[tuple[str, str]]]) -> None:
    """Raises DataError if a listed file does not exist, has two labels, or is in two parts.

    A file that is listed twice alike counts twice, but not in a table without a test set: the division could put it
    into both parts.
    """
    missing = [file for part in rows.values() for file, _ in part if not os.path.isfile(file)]  # noqa: PTH113  # a `Path` for each of many files is slow
    if missing:
        shown = ", ".join(missing[:8]) + (f" and {len(missing) - 8:,} more" if missing[8:] else "")
        raise DataError("root", f"{path} lists files that do not exist: {shown}", "missing")
    known: dict[str, tuple[str, str]] = {}
    for role, part in rows.items():
        for file, label in part:
            real = os.path.normpath(file)
            if (first := known.get(real)) and (len(rows) == 1 or first != (role, label)):
                message = f"{path} lists {real} twice, as {first[1]} ({first[0]}) and as {label} ({role})"
                raise DataError("root", message, "conflict")
            known[real] = role, label


def _role(text: str, path: Path, number: int) -> str:
    """Returns train, val or test for the value of a column split."""
    for role, names in (("train", TRAIN), ("val", VALIDATION), ("test", TEST)):
        if text.strip().lower() in names:
            return role
    raise DataError("root", f"{path}:{number}: expected the split train, val or test, found {text[:40]!r}")


# --- images -------------------------------------------------------------------------------------------------------


def _divided(part: _Part) -> dict[str, _Part]:
    """Divides the files of a set without a test set."""
    [labels], classes = as_positions([part.labels])
    return {role: _Part([part.files[row] for row in rows.tolist()], part.labels[rows.numpy()])
            for role, rows in zip(("train", "test"), divide(labels, classes), strict=True)}  # fmt: skip


def _decode(request: Request, root: Path, parts: dict[str, _Part]) -> Splits:
    """Decodes the files of all parts into one array. The parts are in mixed order, so a slice of them is no copy."""
    positions, classes = as_positions([part.labels for part in parts.values()])
    orders = [mixed_order(labels) for labels in positions]
    files = [part.files[row] for part, order in zip(parts.values(), orders, strict=True) for row in order.tolist()]
    labels = torch.cat([each[order] for each, order in zip(positions, orders, strict=True)])
    decoded = decode_files(ImageFiles.of_paths(files, root), request.form, request.on_bad_image, note)
    return as_splits(decoded, labels, classes, {role: len(part.files) for role, part in parts.items()})


def as_splits(decoded: Decoded, labels: torch.Tensor, classes: tuple[str, ...], counts: dict[str, int]) -> Splits:
    """Returns the splits of decoded images in mixed order. Without test images, the validation images are the test set.

    Args:
        labels: int64 (N,), of all images, with those that were left out.
        counts: role of a part (train, val or test) -> its number of images, with those that were left out.

    Raises:
        DataError: no image of a part was kept.
    """
    kept, end = decoded.kept, 0
    found: dict[str, Images] = {}
    for role, count in counts.items():
        start, end = end, end + count
        first, last = (int(torch.searchsorted(kept, each)) for each in (start, end))
        if first == last:
            raise DataError("root", f"no image of the part {role} can be read")
        found[role] = Images(decoded.images[first:last], labels[kept[first:last]], classes)
    test = found.get("test", found.get("val"))
    assert test is not None
    return Splits(found["train"], test, found.get("val") if "test" in found else None, mixed=True)


def note(message: str) -> None:
    """Prints a note for the user."""
    print(f"mnist_dist: {message}", file=sys.stderr)
