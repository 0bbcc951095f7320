"""Writes files atomically: a reader never sees half a file, and a finished file survives a power failure."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def write_atomically(path: Path, content: bytes | memoryview | str) -> None:
    """Writes a file under a temporary name in the same folder, flushes it to the disk, then renames it.

    A reader sees the complete old content or the complete new content. A device or a pipe (/dev/stdout) is written in
    place, because a rename would replace it by a file.

    Args:
        path: the file; its folder must exist.
        content: bytes, or text, which is encoded as UTF-8.

    Raises:
        OSError: the file cannot be written. Its `filename` is `path`; the old file is untouched.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return
    staged = path.with_name(path.name + ".tmp")
    try:
        write_flushed(staged, content)
        rename_flushed(staged, path)
    except OSError as error:
        with suppress(OSError):
            staged.unlink()  # on a full disk, this frees space for the files that report the failure
        error.filename = str(path)  # the user does not know the temporary name
        raise


def write_flushed(path: Path, content: bytes | memoryview | str) -> None:
    """Writes a file in place and waits until it is on the disk.

    Raises:
        OSError: the file cannot be written; its `filename` is `path`.
    """
    try:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        fsync_path(path)
    except OSError as error:
        error.filename = str(path)  # the system call `write` does not name the file
        raise


def rename_flushed(source: Path, target: Path) -> None:
    """Renames a file or a folder within one file system and waits until the new name is on the disk."""
    source.replace(target)
    fsync_path(target.parent)


def fsync_path(path: Path) -> None:
    """Waits until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
