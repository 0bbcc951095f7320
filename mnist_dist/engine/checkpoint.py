"""Weights files (safetensors) and checkpoints (folders). Each is complete or absent, never half written."""

from __future__ import annotations

import io
import json
import shutil
import time
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from mnist_dist.engine.files import (
    check_regular,
    fingerprint,
    fsync_path,
    read_regular,
    rename_flushed,
    write_atomically,
    write_flushed,
)
from mnist_dist.engine.shards import SHARDS, join_shards
from mnist_dist.errors import RunError

# --- weights ------------------------------------------------------------------------------------------------------


MOST_WEIGHTS = 2**34
"""Bytes of the largest weights file that is read. A sparse file may claim terabytes and take no space on the disk."""


def save_weights(path: Path, state: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Writes the `state_dict` of a bare module as a safetensors file.

    Args:
        path: the file.
        state: tensors of any device, dtype and memory layout, by their unwrapped names.
        about: JSON-serializable values that describe how to rebuild the module.

    Raises:
        OSError: the disk is full or read-only; the old file is untouched.
    """
    # Tied weights are one tensor under two names. safetensors requires a separate contiguous tensor for each name.
    tensors = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in state.items()}
    # safetensors' own file writer reports a full disk with an exception of its own; a plain write raises OSError.
    write_atomically(path, save(tensors, metadata={"about": json.dumps(about)}))


def load_weights(path: Path, *, foreign: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads a weights file.

    Args:
        path: the file.
        foreign: accept any safetensors file, also one that `save_weights` did not write.

    Returns:
        The tensors, on the CPU, by name; and the `about` of `save_weights`, empty for a foreign file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged or was not written by `save_weights`.
    """
    try:
        check_regular(path, MOST_WEIGHTS)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            about = {} if foreign and "about" not in metadata else json.loads(metadata["about"])
            if not isinstance(about, dict):
                raise ValueError("its description is not a JSON object")
            return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118 - not a dict
    except FileNotFoundError:
        raise
    except Exception as error:  # safetensors raises a different error for each kind of damage
        raise ValueError(f"{path} is not a complete weights file: {error}") from error


# --- checkpoints --------------------------------------------------------------------------------------------------

STATE, MANIFEST = "state.pt", "manifest.json"
MOST_STATE, MOST_MANIFEST = 2**37, 2**20
"""Bytes of the largest files that are read."""

SHARED_DISK = "with FSDP2 all processes write a part of a checkpoint; put the run folder on a shared disk"


def stage_checkpoint(folder: Path, step: int) -> Path:
    """Creates and returns an empty folder in which the files of a checkpoint are written.

    Args:
        folder: the folder of the checkpoints; created if it does not exist.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left_over in folder.glob(".step-*.staged"):  # left by a run that was killed in a save, perhaps of another step
        shutil.rmtree(left_over)
    staged = staged_folder(folder, step)
    staged.mkdir()
    return staged


def staged_folder(folder: Path, step: int) -> Path:
    """Returns the folder that becomes the checkpoint of a step."""
    return folder / f".step-{step}.staged"


def save_checkpoint(
    folder: Path, step: int, state: dict[str, Any], keep: int, shards: dict[str, list[Any]] | None = None
) -> Path:
    """Publishes the checkpoint `folder/step-N` in one rename, then removes the oldest ones.

    The files are first written to a staged folder, flushed to the disk and listed in a manifest with size and SHA-256.
    A process that is killed at any moment leaves the published checkpoints complete.

    Args:
        folder: the folder of the checkpoints; created if it does not exist.
        step: the number of updates made.
        state: tensors, numbers, strings and containers of them, so that `torch.load(weights_only=True)` can read it.
        keep: number of newest checkpoints to keep.
        shards: the fingerprints of the files that the ranks have written to the folder of `stage_checkpoint`, by name.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: the disk is full or read-only; the earlier checkpoints are untouched.
        RunError: a file of `shards` is not in the folder.
    """
    final, staged = folder / f"step-{step}", staged_folder(folder, step)
    if final.exists():  # the state of a step is always the same, so a complete checkpoint is kept
        try:
            load_checkpoint(final)
            if shards:
                shutil.rmtree(staged)
            return final
        except ValueError:
            remove(final)
    if not shards:
        stage_checkpoint(folder, step)
    try:
        _check_arrival(staged, shards or {})
        stream = io.BytesIO()
        torch.save(state, stream)
        content = stream.getbuffer()
        write_flushed(staged / STATE, content)
        manifest = {"step": step, "files": {STATE: fingerprint(content)} | (shards or {})}
        write_flushed(staged / MANIFEST, json.dumps(manifest))
        fsync_path(staged)
        rename_flushed(staged, final)
    except (OSError, RunError):
        shutil.rmtree(staged, ignore_errors=True)
        raise
    for old in list_checkpoints(folder)[:-keep]:
        remove(old)
    return final


def _check_arrival(staged: Path, shards: dict[str, list[Any]]) -> None:
    """Raises RunError if a file is missing that another rank has written."""
    for name, (size, _) in shards.items():
        if not (staged / name).is_file() or (staged / name).stat().st_size != size:
            raise RunError(f"{staged / name} has not arrived: {SHARED_DISK}. The earlier checkpoints are valid.")


def remove(path: Path) -> None:
    """Removes a checkpoint, or whatever else has its name."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def list_checkpoints(folder: Path) -> list[Path]:
    """Returns the published checkpoints, oldest first."""
    found = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Checks a checkpoint against its manifest and reads its state.

    Raises:
        ValueError: the checkpoint is damaged, or it contains a Python object that is not a plain value. The message
            gives the reason.
    """
    try:
        manifest = json.loads(read_regular(path / MANIFEST, MOST_MANIFEST))
        files = manifest["files"]
        names = [STATE, *sorted(files.keys() - {STATE})]
        if path.name != f"step-{manifest['step']}":
            raise ValueError(f"it was written as step-{manifest['step']}")
        for name in names:
            if name != STATE and not SHARDS.fullmatch(name):
                raise ValueError(f"{MANIFEST} names {name}, which is no file of a checkpoint")
            if files[name] != fingerprint(read_regular(path / name, MOST_STATE)):
                raise ValueError(f"size or SHA-256 of {name} differs from {MANIFEST}")
        _refuse_compression(path / STATE)
        state = torch.load(path / STATE, map_location="cpu", weights_only=True)
        return join_shards(state, [path / name for name in names[1:]])
    except Exception as error:  # unpickling raises a different error for each kind of damage
        raise ValueError(f"{path} is damaged: {error}") from error


def _refuse_compression(path: Path) -> None:
    """Raises ValueError for an archive that unpacks to more bytes than it has: `torch.save` compresses nothing."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("its content is compressed, which a checkpoint never is")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise ValueError("its content is larger than the file")


def newest_checkpoint(folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """Finds the newest valid checkpoint and renames the damaged ones that are newer.

    Returns:
        The state, or None if no checkpoint is valid; and one message for each damaged checkpoint.
    """
    problems: list[str] = []
    for path in reversed(list_checkpoints(folder)):
        try:
            return load_checkpoint(path), problems
        except ValueError as error:
            aside = path.with_name(f"damaged-{path.name}-{time.time_ns()}")
            path.rename(aside)
            problems.append(f"{error}; renamed to {aside.name}")
    return None, problems
