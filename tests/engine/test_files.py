"""Writing files: old or new content, flushed before the rename, and errors that name the file."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from mnist_dist.engine.files import expand_path, rename_flushed, write_atomically, write_flushed


@pytest.mark.parametrize("content", ["é\n", "é\n".encode(), memoryview("é\n".encode())], ids=["text", "bytes", "view"])
def test_content_is_written_and_the_old_content_replaced(tmp_path, content):
    path = tmp_path / "file"
    path.write_text("old, and longer than the new content")
    write_atomically(path, content)
    assert path.read_bytes() == "é\n".encode()
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_is_flushed_before_the_rename_and_its_folder_after_it(tmp_path, monkeypatch):
    path, events = tmp_path / "file", []
    fsync, replace = os.fsync, Path.replace

    def note_flush(descriptor: int) -> None:
        name = Path(f"/proc/self/fd/{descriptor}").readlink().name
        events.append(f"flush {name}")
        fsync(descriptor)

    def note_rename(source: Path, target: Path) -> Path:
        events.append(f"rename {source.name} {target.name}")
        return replace(source, target)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc to name an open file")
    monkeypatch.setattr(os, "fsync", note_flush)
    monkeypatch.setattr(Path, "replace", note_rename)
    write_atomically(path, "new")
    assert events == ["flush file.tmp", "rename file.tmp file", f"flush {tmp_path.name}"]


@pytest.mark.parametrize("function", [write_atomically, write_flushed])
def test_an_error_names_the_file(tmp_path, monkeypatch, function):
    path = tmp_path / "missing" / "file"
    with pytest.raises(FileNotFoundError) as caught:
        function(path, "new")
    assert caught.value.filename == str(path)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as caught:
        function(tmp_path / "file", "new")
    assert caught.value.filename == str(tmp_path / "file")
    assert not list(tmp_path.glob("*.tmp"))


def test_a_pipe_is_written_in_place(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    write_atomically(path, "new")
    assert os.read(reader, 100) == b"new" and path.is_fifo()
    os.close(reader)


def test_a_folder_is_renamed_too(tmp_path):
    (tmp_path / "staged").mkdir()
    rename_flushed(tmp_path / "staged", tmp_path / "final")
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


# --- paths that users write ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("~", "/home/me"),
        ("~/data", "/home/me/data"),
        ("$SCRATCH/data", "/scratch/data"),
        ("${SCRATCH}", "/scratch"),
        ("data/$JOB", "data/7"),
        ("data/~", "data/~"),
        ("plain", "plain"),
        ("cost$", "cost$"),
    ],
)
def test_home_and_variables_in_a_path_are_replaced(written, expected, monkeypatch):
    for name, value in {"HOME": "/home/me", "SCRATCH": "/scratch", "JOB": "7"}.items():
        monkeypatch.setenv(name, value)
    assert expand_path(written) == expand_path(Path(written)) == Path(expected)


@pytest.mark.parametrize("written", ["$NOT_SET/data", "data/${NOT_SET}", "~nobody-of-that-name/data"])
def test_a_variable_that_is_not_set_is_refused_unless_a_file_has_the_name(written, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NOT_SET", raising=False)
    assert refused(lambda: expand_path(written)) == [(written, "missing")]
    Path(written).mkdir(parents=True)
    assert expand_path(written) == Path(written)
