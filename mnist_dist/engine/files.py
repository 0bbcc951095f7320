"""Reads and writes files, and expands the paths that users write.

A file is written atomically: a reader never sees half a file. A file that comes from a stranger is read only if it is a
regular file of a bounded size.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from mnist_dist.errors import Kind, Problem, RecipeError


def read_regular(path: Path, most: int) -> bytes:
    """Returns the content of a regular file. A pipe or a device could have no end.

    Args:
        most: the largest size, in bytes.

    Raises:
        OSError: the file cannot be read, is not a regular file, or is larger.
    """
    check_regular(path, most)
    return path.read_bytes()


def check_regular(path: Path, most: int) -> None:
    """Raises OSError unless the path is a regular file, or a link to one, of at most `most` bytes."""
    found = path.stat()
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    if found.st_size > most:
        raise OSError(errno.EFBIG, f"larger than {most:,} bytes", str(path))


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


def fingerprint(content: bytes | memoryview) -> list[Any]:
    """Returns size and SHA-256 of a file's content, as the manifest of a checkpoint holds them."""
    return [len(content), hashlib.sha256(content).hexdigest()]


def rename_flushed(source: Path, target: Path) -> None:
    """Renames a file or a folder within one file system and waits until the new name is on the disk."""
    source.replace(target)
    fsync_path(target.parent)


def fsync_path(path: Path) -> None:
    """Waits until a file, or the entries of a folder, are on the disk."""
    if sys.platform == "win32" and path.is_dir():  # Windows cannot open a folder, and writes renames at once
        return
    descriptor = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def expand_path(path: str | Path, problem: Callable[[str, Kind], Problem] | None = None) -> Path:
    """Returns a path that a user wrote, with `~`, `~user`, `$VAR` and `${VAR}` replaced.

    A shell does not replace them inside a word such as `data.root=~/data`, and YAML never does.

    Args:
        problem: message and kind -> the problem of the key that holds the path; None for one on the command line.

    Raises:
        RecipeError: a variable is not set, or a user is unknown, and no file has exactly that name.
    """
    expanded = os.path.expandvars(os.path.expanduser(path))  # noqa: PTH111  # Path's raises for an unknown user
    left = re.search(r"^~[^/]*|\$(\w+|\{[^}]*\})", expanded)
    if left is None or os.path.lexists(expanded):
        return Path(expanded)
    if left[0].startswith("~"):
        message = f"no user has the home folder {left[0]}"
    else:
        message = f"the environment variable {left[0].strip('${}')} is not set"
    build = problem or (lambda message, kind: Problem("command line", str(path), message, kind))
    raise RecipeError([build(f"{path}: {message}", "missing")])
