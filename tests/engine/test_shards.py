"""Shards of a checkpoint, written by several ranks: they are joined, damage is found, and tools of torch read them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from mnist_dist.engine.checkpoint import (
    MANIFEST,
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    stage_checkpoint,
)
from mnist_dist.engine.files import fingerprint
from mnist_dist.engine.shards import save_shards
from mnist_dist.errors import RunError

RANKS = 3
FULL = {
    "model.weight": torch.arange(35.0).view(5, 7),  # 2, 2 and 1 rows
    "model.bias": torch.tensor([3.0], dtype=torch.bfloat16),  # 1, 0 and 0 rows
    "optimizer.0": torch.arange(4).view(4, 1, 1),  # 2, 2 and 0 rows
}


def rows(tensor: Tensor, rank: int) -> Tensor:
    """Returns what FSDP2 gives a rank."""
    size = -(-len(tensor) // RANKS)
    return tensor[rank * size : (rank + 1) * size]


def save(folder: Path, step: int, full: dict[str, Tensor] = FULL) -> Path:
    """Saves a checkpoint as the processes of `RANKS` ranks do, one after another."""
    staged, files = stage_checkpoint(folder, step), {}
    for rank in range(RANKS):
        shards = {name: rows(each, rank).contiguous() for name, each in full.items()}
        offsets = {
            name: [min(rank * -(-len(each) // RANKS), len(each)), *[0] * (each.dim() - 1)]
            for name, each in full.items()
        }
        state = SimpleNamespace(process_index=rank, is_main_process=rank == 0)
        files |= save_shards(staged, shards, offsets, state)
    meta = {name: each.to("meta") for name, each in full.items()}
    model = {"weight": meta["model.weight"], "bias": meta["model.bias"], "mean": torch.ones(2)}
    value = {"model": model, "optimizer": [meta["optimizer.0"], 0.1], "step": step}
    return save_checkpoint(folder, step, value, keep=2, shards=files)


def test_the_rows_of_all_ranks_are_joined(tmp_path):
    state = load_checkpoint(save(tmp_path, 4))
    found = {"model.weight": state["model"]["weight"], "model.bias": state["model"]["bias"]}
    found["optimizer.0"] = state["optimizer"][0]
    for name, expected in FULL.items():
        assert found[name].dtype == expected.dtype and torch.equal(found[name], expected), name
    assert torch.equal(state["model"]["mean"], torch.ones(2)) and state["optimizer"][1] == 0.1 and state["step"] == 4


def test_a_complete_checkpoint_of_the_step_is_kept_and_old_ones_are_removed(tmp_path):
    first = save(tmp_path, 4)
    before = first.stat().st_ino
    assert save(tmp_path, 4) == first and first.stat().st_ino == before
    for step in (8, 12):
        save(tmp_path, step)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-8", "step-12"]
    assert not list(tmp_path.glob(".*"))


def test_a_file_that_has_not_arrived_is_refused_and_the_earlier_checkpoint_is_valid(tmp_path, monkeypatch):
    save(tmp_path, 4)
    staged = stage_checkpoint(tmp_path, 8)
    with pytest.raises(RunError, match=r"shard-00001\.safetensors.*shared disk"):
        save_checkpoint(tmp_path, 8, {"step": 8}, keep=2, shards={"shard-00001.safetensors": fingerprint(b"abc")})
    assert not staged.exists()
    assert newest_checkpoint(tmp_path)[0]["step"] == 4


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)


def take_another_steps(path: Path) -> None:
    shutil.copy(path.parent.parent / "step-4" / path.name, path)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink, take_another_steps])
@pytest.mark.parametrize("rank", range(RANKS))
def test_a_damaged_shard_is_found_and_the_checkpoint_before_it_is_used(rank, damage, tmp_path):
    save(tmp_path, 4)
    damage(save(tmp_path, 8) / f"shard-{rank:05}.safetensors")
    state, problems = newest_checkpoint(tmp_path)
    assert state["step"] == 4
    assert len(problems) == 1 and "step-8" in problems[0]


def leave_out_a_shard(files: dict) -> None:
    del files["shard-00000.safetensors"]


def name_a_foreign_file(files: dict) -> None:
    files["../step-4/shard-00000.safetensors"] = files["shard-00000.safetensors"]


def take_a_shard_twice(files: dict) -> None:
    files["shard-00001.safetensors"] = files["shard-00000.safetensors"]


@pytest.mark.parametrize("change", [leave_out_a_shard, name_a_foreign_file, take_a_shard_twice])
def test_a_manifest_that_does_not_fit_the_shards_is_refused(change, tmp_path):
    save(tmp_path, 4)
    path = save(tmp_path, 8)
    if change is take_a_shard_twice:
        shutil.copy(path / "shard-00000.safetensors", path / "shard-00001.safetensors")
    manifest = json.loads((path / MANIFEST).read_text())
    change(manifest["files"])
    (path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="step-8 is damaged"):
        load_checkpoint(path)


def test_the_tools_of_torch_read_the_shards(tmp_path):
    checkpoint = pytest.importorskip("torch.distributed.checkpoint")
    if not hasattr(checkpoint, "HuggingFaceStorageReader"):
        pytest.skip("this torch has no reader of sharded safetensors files")
    found = {name: torch.zeros_like(each) for name, each in FULL.items()}
    reader = checkpoint.HuggingFaceStorageReader(str(save(tmp_path, 4)))
    with pytest.warns(UserWarning, match="single process"):
        checkpoint.load(found, storage_reader=reader, no_dist=True)
    assert all(torch.equal(found[name], FULL[name]) for name in FULL)
