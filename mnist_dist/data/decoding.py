"""Decodes image files once, into a memory-mapped uint8 array in a cache folder.

The key of the cache is a hash of the files' names, sizes and times of change, and of the form of the images. The array
is written in a temporary folder that gets its name when it is complete, so a cache is complete or absent. If
the process is killed, the next one decodes all files again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from rich.console import Console
from rich.progress import track

from mnist_dist.data.cache import (
    Decoded,
    cache_folders,
    describe_cache,
    open_cache,
    publish,
    remove_unfinished,
    unfinished_path,
    writable_folder,
)
from mnist_dist.data.form import DataError, Form, convert_picture, fit_picture
from mnist_dist.machine.limits import count_cores

VERSION = 1
"""A part of every cache's key. A change of the decoding's arithmetic needs another number."""

MOST_PIXELS = 100_000_000
"""Larger pictures are reported as damaged: they would fill the memory."""

BATCH = 64
"""Files that a thread decodes at once."""

BAR_FROM = 500
"""Fewer files are decoded without a progress bar."""

LISTED = 30
"""Damaged images that a message names."""

COLOUR_MODES = ("RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "LAB", "HSV")


@dataclass(frozen=True)
class ImageFiles:
    """Encoded images: files, or bytes that a data set holds.

    Attributes:
        names: of the images, for messages.
        open: returns what Pillow opens for the image at a position.
        fingerprint: changes if any of the images does.
        root: the folder that gets the cache, if it can be written. None: the cache is in the user's cache folder.
    """

    names: Sequence[str]
    open: Callable[[int], str | BinaryIO]
    fingerprint: str
    root: Path | None

    @classmethod
    def of_paths(cls, paths: Sequence[str], root: Path) -> ImageFiles:
        """Returns files, whose names, sizes and times of change are their fingerprint."""
        digest, above, wrong = hashlib.sha256(), f"{root}/", set()
        for path in paths:
            name = os.fsencode(path.removeprefix(above))
            try:
                state = os.stat(path)  # noqa: PTH116  # a `Path` for each of many files is slow
            except OSError:  # a broken link, which the decoding names
                digest.update(b"\n%b\0" % name)
                continue
            if not stat.S_ISREG(state.st_mode):
                wrong.add(path)
            digest.update(b"\n%b\0%d\0%d" % (name, state.st_size, state.st_mtime_ns))

        def open_file(row: int) -> str:
            if paths[row] in wrong:
                raise OSError("not a file")  # a named pipe would never end
            return paths[row]

        return cls(paths, open_file, digest.hexdigest(), root)


def decode_files(
    files: ImageFiles, form: Form, on_bad_image: Literal["stop", "skip"], notify: Callable[[str], None]
) -> Decoded:
    """Returns the images in files, decoded now or in an earlier call.

    Args:
        form: channels and size. Without channels, 3 if any file is in colour; without a size, that of the files.
        on_bad_image: whether a file that cannot be decoded ends the decoding, or is left out.
        notify: receives notes for the user.

    Raises:
        DataError: files are damaged (all of them are named), or have several sizes and the form has none.
        OSError: no cache folder can be written.
    """
    folders, key = cache_folders(files.root), cache_key(files, form, on_bad_image)
    for folder in folders:
        if found := open_cache(folder / key):
            return found
    target = writable_folder(folders) / key
    remove_unfinished(target.parent)
    staged = unfinished_path(target)
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    try:
        _write_cache(staged, files, form, on_bad_image, notify)
        publish(staged, target)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    found = open_cache(target)
    if found is None:
        raise OSError(f"the decoded images cannot be read from {target}")
    notify(f"{len(found.kept):,} images decoded into {describe_cache(target)}")
    return found


def cache_key(files: ImageFiles, form: Form, on_bad_image: str) -> str:
    """Returns the name of the cache folder: a hash of the files and of the settings."""
    settings = [VERSION, form.size, form.channels, form.resize, on_bad_image, files.fingerprint]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]


# --- decoding -----------------------------------------------------------------------------------------------------


def _write_cache(folder: Path, files: ImageFiles, form: Form, on_bad_image: str, notify: Callable[[str], None]) -> None:
    """Decodes the files into a cache folder."""
    size, channels, bad = _own_form(files, form)
    count = len(files.names)
    shape, sound = (count, channels, *size), [row for row in range(count) if row not in bad]
    _check_space(folder, int(np.prod(shape, dtype=np.int64)))
    images = np.memmap(folder / "images.bin", dtype=np.uint8, mode="w+", shape=shape)

    def decode(rows: Sequence[int]) -> dict[int, str]:
        failed = {}
        for row in rows:
            try:
                images[row] = fit_picture(open_picture(files.open(row), channels), size, channels, form.resize)
            except Exception as error:  # Pillow raises exceptions of many types for damaged files
                failed[row] = _reason(error)
        return failed

    for failed in _in_threads(decode, sound, "decoding images"):
        bad |= failed
    kept = np.setdiff1d(np.arange(count), np.array(list(bad), dtype=np.int64))
    if bad:
        _report(files.names, bad, on_bad_image, notify)
        images = _without(folder, images, kept)
    images.flush()
    np.save(folder / "kept.npy", kept)
    about = {"version": VERSION, "shape": [len(kept), *shape[1:]], "skipped": [files.names[row] for row in sorted(bad)]}
    # Written last, into a folder that does not have its final name yet: nobody can read half of it.
    with (folder / "about.json").open("w", encoding="utf-8") as file:
        json.dump(about, file)
        file.flush()
        os.fsync(file.fileno())


def _check_space(folder: Path, size: int) -> None:
    """Raises DataError if a file of this size does not fit. Writing to the mapped file would then end the process."""
    free = shutil.disk_usage(folder).free
    if size > free:
        message = (
            f"the decoded images need {size / 1e9:.2f} GB in {folder.parent}, which has {free / 1e9:.2f} GB free; "
        )
        raise DataError("root", f"{message}free space, or set a smaller data.image_size", "unwritable")


def _own_form(files: ImageFiles, form: Form) -> tuple[tuple[int, int], int, dict[int, str]]:
    """Returns size and channels of the decoded images, and the files whose headers are damaged, with the reason.

    Raises:
        DataError: the form has no size and the files have several.
    """
    if form.size and form.channels:
        return form.size, form.channels, {}

    def scan(rows: Sequence[int]) -> dict[int, Any]:
        found: dict[int, Any] = {}
        for row in rows:
            try:
                with Image.open(files.open(row)) as picture:
                    turned = picture.getexif().get(0x0112, 1) >= 5  # the orientations that swap width and height
                    size = (picture.width, picture.height) if turned else (picture.height, picture.width)
                    found[row] = size, _is_colour(picture)
            except Exception as error:
                found[row] = _reason(error)
        return found

    found: dict[int, Any] = {}
    for part in _in_threads(scan, range(len(files.names)), "reading the sizes of images"):
        found |= part
    bad = {row: each for row, each in found.items() if isinstance(each, str)}
    headers = [each for each in found.values() if not isinstance(each, str)]
    sizes = sorted({size for size, _ in headers})
    if not sizes:
        return (1, 1), 1, bad
    if form.size is None and len(sizes) > 1:
        (least, most), count = (sizes[0], sizes[-1]), f"{len(sizes):,} sizes"
        message = f"the images have {count}, from {least[0]}×{least[1]} to {most[0]}×{most[1]} pixels; "
        raise DataError("image_size", f"{message}set data.image_size to one, e.g. data.image_size=32", "missing")
    return form.size or sizes[0], form.channels or (3 if any(colour for _, colour in headers) else 1), bad


def _is_colour(picture: Image.Image) -> bool:
    if picture.mode == "P":
        return any(len(set(entry[:3])) > 1 for entry in picture.palette.colors) if picture.palette else False
    return picture.mode in COLOUR_MODES


def open_picture(path: str | BinaryIO, channels: int) -> Image.Image:
    """Returns the picture in a file, upright, in mode L or RGB, on black where it is transparent."""
    with Image.open(path) as file:
        if file.width * file.height > MOST_PIXELS:
            raise ValueError(f"too many pixels: {file.width:,}×{file.height:,}")
        if file.format in ("EPS", "WMF"):
            raise ValueError(f"{file.format} files are programs")
        file.load()
        picture: Image.Image = ImageOps.exif_transpose(file) if file.getexif().get(0x0112, 1) != 1 else file
        return convert_picture(picture, channels)


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    if isinstance(error, Image.DecompressionBombError):
        return f"too many pixels; at most {MOST_PIXELS:,}"
    text = getattr(error, "strerror", None) or str(error)
    return (text.strip().splitlines() or [type(error).__name__])[0][:120]


def _in_threads(
    work: Callable[[Sequence[int]], dict[int, Any]], rows: Sequence[int], title: str
) -> Iterator[dict[int, Any]]:
    """Yields the result of `work` for pieces of `rows`, computed on all cores. Pillow decodes outside Python's lock."""
    pieces = [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]
    with ThreadPoolExecutor(count_cores()) as pool:
        try:
            results: Any = pool.map(work, pieces)
            if len(rows) >= BAR_FROM:
                console = Console(stderr=True)
                results = track(results, f"{title}: {len(rows):,}", total=len(pieces), console=console)
            yield from results
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _report(names: Sequence[str], bad: dict[int, str], on_bad_image: str, notify: Callable[[str], None]) -> None:
    """Names the damaged files, in a note or an error."""
    rows = sorted(bad)
    lines = [f"  {_shown(names[row])}: {bad[row]}" for row in rows[:LISTED]]
    lines += [f"  and {len(rows) - LISTED:,} more"] if len(rows) > LISTED else []
    count = f"{len(rows):,} of {len(names):,} images cannot be read"
    if on_bad_image == "skip" and len(rows) < len(names):
        notify("\n".join([f"data.on_bad_image: {count} and are left out:", *lines]))
        return
    if len(rows) == len(names):
        raise DataError("root", "\n".join(["no image can be read:", *lines]))
    raise DataError(
        "on_bad_image", "\n".join([f"{count}; repair or delete them, or set data.on_bad_image=skip:", *lines])
    )


def _shown(name: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in name)


def _without(folder: Path, images: np.memmap, kept: np.ndarray) -> np.memmap:
    """Moves the kept images to the front of the file, and cuts it."""
    for new, old in enumerate(kept.tolist()):
        if new != old:
            images[new] = images[old]
    images.flush()
    os.truncate(folder / "images.bin", len(kept) * int(np.prod(images.shape[1:])))
    return np.memmap(folder / "images.bin", dtype=np.uint8, mode="r+", shape=(len(kept), *images.shape[1:]))
