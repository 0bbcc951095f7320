"""Weights (safetensors, unwrapped names) and checkpoints, written beside and renamed: each is whole or absent."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor


def save_weights(path: Path, state: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Writes the `state_dict` of a bare module; `about` (JSON) says how to rebuild it."""
    # Tied weights are one tensor under two names; safetensors wants each in memory of its own, and in plain order.
    tensors = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in state.items()}
    staged = path.with_name(path.name + ".tmp")
    # The libraries' own writing to a path hides a full disk behind an error of their own; a plain write names it.
    _write(staged, save(tensors, metadata={"about": json.dumps(about)}))
    _flush(staged)
    staged.replace(path)
    _flush(path.parent)  # a checkpoint that counts on these weights may follow at once


def load_weights(path: Path, *, foreign: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads what `save_weights` wrote: tensors on the CPU, and `about`.

    Args:
        foreign: read any safetensors file; `about` is empty where it is not of this package.

    Raises:
        ValueError: not a weights file of this package, or a damaged one.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            about = {} if foreign and "about" not in metadata else json.loads(metadata["about"])
            return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118 - not a dict
    except FileNotFoundError:
        raise
    except Exception as error:  # safetensors raises a kind of its own for every sort of damage
        raise ValueError(f"{path} is not a whole weights file: {error}") from error


# --- checkpoints --------------------------------------------------------------------------------------------------

STATE, MANIFEST = "state.pt", "manifest.json"


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Publishes `folder/step-N` in one rename, then removes the oldest beyond `keep`.

    The files are written beside, flushed to the disk and listed in a manifest with size and SHA-256 before anybody can
    see the folder: whatever happens on the way, what was published before stays whole.

    Args:
        state: tensors, numbers, texts and containers of them; what `torch.load(weights_only=True)` reads.

    Raises:
        OSError: the disk is full or read-only; the earlier checkpoints are untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final, staged = folder / f"step-{step}", folder / f".step-{step}.staged"
    for left_over in folder.glob(".step-*.staged"):  # by a run that was killed while saving, perhaps at another step
        shutil.rmtree(left_over)
    if final.exists():  # a resumed run was asked to stop before its first step: the state of a step is always the same
        try:
            load_checkpoint(final)
            return final
        except ValueError:
            _remove(final)
    staged.mkdir()
    try:
        content = io.BytesIO()
        torch.save(state, content)
        _write(staged / STATE, content.getbuffer())
        _flush(staged / STATE)
        (staged / MANIFEST).write_text(json.dumps({"step": step, "files": {STATE: _fingerprint(staged / STATE)}}))
        _flush(staged / MANIFEST)
        _flush(staged)
        staged.rename(final)
        _flush(folder)
    except OSError:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    for old in list_checkpoints(folder)[:-keep]:
        _remove(old)
    return final


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def list_checkpoints(folder: Path) -> list[Path]:
    """Published checkpoints, oldest first."""
    found = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads one checkpoint after checking it against its manifest.

    Raises:
        ValueError: it is damaged or holds something else than plain values; the message says what.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if path.name != f"step-{manifest['step']}":
            raise ValueError(f"it was written as step-{manifest['step']}")
        if manifest["files"][STATE] != _fingerprint(path / STATE):
            raise ValueError(f"{STATE} is not the file that was written")
        return torch.load(path / STATE, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling raises a kind of its own for every sort of damage
        raise ValueError(f"{path} is damaged: {error}") from error


def newest_checkpoint(folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The newest valid checkpoint's state, or None; and a sentence for each damaged one, which is set aside."""
    problems: list[str] = []
    for path in reversed(list_checkpoints(folder)):
        try:
            return load_checkpoint(path), problems
        except ValueError as error:
            aside = path.with_name(f"damaged-{path.name}-{time.time_ns()}")
            path.rename(aside)
            problems.append(f"{error}; set aside as {aside.name}")
    return None, problems


def _write(path: Path, content: bytes | memoryview) -> None:
    """Writes a file; an OSError from here names it."""
    try:
        path.write_bytes(content)
    except OSError as error:
        path.unlink(missing_ok=True)  # room for the last words of a run on a full disk
        error.filename = str(path)
        raise


def _fingerprint(path: Path) -> list[Any]:
    content = path.read_bytes()
    return [len(content), hashlib.sha256(content).hexdigest()]


def _flush(path: Path) -> None:
    """Waits until a file or a folder's entries are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
