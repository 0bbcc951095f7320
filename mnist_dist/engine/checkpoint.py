"""Weights on disk: safetensors with unwrapped names, written beside and renamed, so a file is whole or absent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


def save_weights(path: Path, module: nn.Module, about: dict[str, Any]) -> None:
    """Writes all parameters and buffers of a bare module; `about` (JSON) says how to rebuild it."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}
    # Tied weights are one tensor under two names; safetensors wants each in memory of its own.
    seen: set[int] = set()
    for name, value in tensors.items():
        if value.data_ptr() in seen:
            tensors[name] = value.clone()
        seen.add(value.data_ptr())
    staged = path.with_name(path.name + ".tmp")
    save_file(tensors, staged, metadata={"about": json.dumps(about)})
    staged.replace(path)


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads what `save_weights` wrote: tensors on the CPU, and `about`.

    Raises:
        ValueError: not a weights file of this package, or a damaged one.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["about"])
            return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118 - not a dict
    except FileNotFoundError:
        raise
    except Exception as error:  # safetensors raises a kind of its own for every sort of damage
        raise ValueError(f"{path} is not a whole weights file: {error}") from error
