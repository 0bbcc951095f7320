"""The sharded tensors of a checkpoint (FSDP2): every rank writes its shards to a file, and any world size reads them.

The files have the layout of torch.distributed.checkpoint's safetensors files: its HuggingFaceStorageReader reads them
too. torch.distributed.checkpoint.save itself is not used. Its default files hold a pickle, which runs the code of a
stranger when it is read. It is also one long collective, so a rank that fails before it leaves the other ranks waiting.
"""

from __future__ import annotations

import json
import re
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from mnist_dist.distributed.collectives import gather_values, run_on_all_ranks
from mnist_dist.distributed.fsdp import is_sharded, map_tensors
from mnist_dist.engine.files import fingerprint, write_flushed

SHARDS = re.compile(r"shard-\d{5}\.safetensors")
"""The names of the files. In their order, the shards of a tensor follow one another."""


def split_shards(value: Any) -> tuple[Any, dict[str, Any]]:
    """Splits sharded tensors from a value.

    Returns:
        The value, with a tensor without memory (device "meta") in the place of each sharded tensor; and the sharded
        tensors by their paths, such as "components.model.fc.weight".
    """
    shards: dict[str, Any] = {}

    def split(path: tuple[Any, ...], tensor: Tensor) -> Tensor:
        if not is_sharded(tensor):
            return tensor
        shards[_name(path)] = tensor
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    return map_tensors(split, value), shards


def join_shards(value: Any, files: list[Path]) -> Any:
    """Returns a value as it was before `split_shards`, but with full tensors.

    Args:
        files: the files of all ranks, in their order.

    Raises:
        ValueError: the files do not hold all rows of a tensor.
    """
    with ExitStack() as opened:
        shards = [opened.enter_context(safe_open(file, framework="pt")) for file in files]

        def join(path: tuple[Any, ...], tensor: Tensor) -> Tensor:
            if not tensor.is_meta:
                return tensor
            full = torch.cat([each.get_tensor(_name(path)) for each in shards])  # FSDP2 shards the first dimension
            if (full.shape, full.dtype) != (tensor.shape, tensor.dtype):
                raise ValueError(f"the shards of {_name(path)} are not complete")
            return full

        return map_tensors(join, value)


def shard_offset(tensor: Any) -> list[int]:
    """Returns at which index of a sharded tensor the shard of this rank begins."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset  # a slow import

    return list(compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)[1])


def save_shards(
    folder: Path,
    shards: dict[str, Tensor],
    offsets: dict[str, list[int]],
    state: PartialState,
    group: dist.ProcessGroup | None = None,
) -> dict[str, list[Any]]:
    """Writes the shards of every rank to a file in `folder`. Collective: call on every rank.

    Args:
        folder: the folder of `stage_checkpoint`. Rank 0 removes it if a rank cannot write its file.
        shards: the shards of this rank, by name, on the CPU.
        offsets: their values of `shard_offset`, by name.
        group: see `gather_values`.

    Returns:
        The fingerprints of the files of all ranks, by file name.

    Raises:
        OSError: the disk of this rank is full or read-only.
        RunError: another rank cannot write its file.
    """
    path = folder / f"shard-{state.process_index:05}.safetensors"

    def write() -> list[Any]:
        places = {name: {"saved_offsets": offset} for name, offset in offsets.items()}
        # One entry: safetensors writes several in a random order, and the same state must give the same bytes.
        content = save(shards, metadata={"DCP_SHARDING_INFO": json.dumps(places)})
        folder.mkdir(parents=True, exist_ok=True)  # a disk that is not shared has no such folder
        write_flushed(path, content)
        return fingerprint(content)

    try:
        written = run_on_all_ranks(state, write, group)
    except BaseException:
        if state.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    return dict(gather_values((path.name, written), group))


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))
