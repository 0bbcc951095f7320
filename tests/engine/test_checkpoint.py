"""Weights files: what is saved is loaded again, a file is complete or absent, and damage is reported."""

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mnist_dist.engine import files
from mnist_dist.engine.checkpoint import load_weights, save_weights
from mnist_dist.models import build_model

ABOUT = {
    "model": "mnistnet",
    "keywords": {"width": 4, "dropout": 0.1},
    "classes": ["ä", "b"],
    "mean": 0.1307,
    "no": None,
}


def small_network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build_model("mnistnet", width=4, hidden=3)


@pytest.fixture
def weights_file(tmp_path) -> Path:
    path = tmp_path / "best.safetensors"
    save_weights(path, small_network().state_dict(), ABOUT)
    return path


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


# --- round trips --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("saved_as", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("loaded_as", [torch.contiguous_format, torch.channels_last])
def test_weights_are_loaded_as_saved_in_any_memory_layout(tmp_path, saved_as, loaded_as):
    module = small_network(seed=0).to(memory_format=saved_as)
    module(torch.rand(4, 1, 28, 28))  # changes batch norm's buffers
    path = tmp_path / "weights.safetensors"
    save_weights(path, module.state_dict(), {})
    tensors, _ = load_weights(path)
    assert_equal(tensors, module.state_dict())
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    other = small_network(seed=1).to(memory_format=loaded_as)
    other.load_state_dict(tensors)
    assert_equal(other.state_dict(), module.state_dict())


def test_tied_weights_are_saved_under_every_name(tmp_path):
    def tied() -> nn.Module:
        module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
        module[1].weight = module[2].weight = module[0].weight
        return module

    module, path = tied(), tmp_path / "weights.safetensors"
    save_weights(path, module.state_dict(), {})
    tensors, _ = load_weights(path)
    assert_equal(tensors, module.state_dict())
    other = tied()
    other.load_state_dict(tensors)
    assert other[2].weight is other[0].weight
    assert torch.equal(other[0].weight, module[0].weight)


def test_every_kind_of_buffer_is_loaded_as_saved(tmp_path):
    module, path = nn.Module(), tmp_path / "weights.safetensors"
    buffers = {
        "of_half": torch.rand(3).half(),
        "of_bfloat16": torch.rand(3).bfloat16(),
        "of_double": torch.rand(3).double(),
        "of_bool": torch.tensor([True, False]),
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "transposed": torch.arange(12.0).view(3, 4).T,
    }
    for name, value in buffers.items():
        module.register_buffer(name, value)
    save_weights(path, module.state_dict(), {})
    assert_equal(load_weights(path)[0], buffers)


def test_buffers_that_share_memory_are_loaded_as_saved(tmp_path):
    module, path = nn.Module(), tmp_path / "weights.safetensors"
    table = torch.arange(12.0).view(3, 4)
    module.register_buffer("table", table)
    module.register_buffer("part", table[1:])
    save_weights(path, module.state_dict(), {})
    assert_equal(load_weights(path)[0], {"table": table, "part": table[1:]})


def test_about_is_loaded_as_saved(weights_file):
    assert load_weights(weights_file)[1] == ABOUT


# --- damage -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 100, -100, -1])
def test_a_truncated_file_is_refused(weights_file, keep):
    weights_file.write_bytes(weights_file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"best\.safetensors"):
        load_weights(weights_file)


@pytest.mark.parametrize("position", [0, 7, 8, 20, 200])
def test_a_corrupted_header_is_refused(weights_file, position):
    content = bytearray(weights_file.read_bytes())
    content[position] ^= 0xFF
    weights_file.write_bytes(content)
    with pytest.raises(ValueError, match=r"best\.safetensors"):
        load_weights(weights_file)


def write_torch(path: Path) -> None:
    torch.save(small_network().state_dict(), path)


def write_text(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\n")


def write_without_metadata(path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, path)


def write_others_metadata(path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, path, metadata={"format": "pt"})


def write_broken_about(path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, path, metadata={"about": json.dumps(ABOUT)[:-5]})


@pytest.mark.parametrize(
    "write", [write_torch, write_text, write_without_metadata, write_others_metadata, write_broken_about]
)
def test_a_file_of_another_kind_is_refused(tmp_path, write):
    path = tmp_path / "best.safetensors"
    write(path)
    with pytest.raises(ValueError, match=r"best\.safetensors"):
        load_weights(path)


def test_a_missing_file_is_not_reported_as_damaged(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_weights(tmp_path / "best.safetensors")


# --- complete or absent -------------------------------------------------------------------------------------------


def test_saving_replaces_the_old_file_and_leaves_no_other_file(weights_file):
    module = small_network(seed=1)
    save_weights(weights_file, module.state_dict(), {"model": "another"})
    tensors, about = load_weights(weights_file)
    assert_equal(tensors, module.state_dict())
    assert about == {"model": "another"}
    assert list(weights_file.parent.iterdir()) == [weights_file]


def test_a_save_that_fails_leaves_the_old_file(weights_file, monkeypatch):
    before = weights_file.read_bytes()

    def fail(path, content):
        assert path != weights_file, "the file must not be written in place"
        path.write_bytes(content[:50])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "write_flushed", fail)
    with pytest.raises(OSError) as caught:
        save_weights(weights_file, small_network(seed=1).state_dict(), ABOUT)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(weights_file))
    assert weights_file.read_bytes() == before
    assert list(weights_file.parent.iterdir()) == [weights_file], "half a file takes space that the disk does not have"

    monkeypatch.undo()
    weights_file.with_name(weights_file.name + ".tmp").write_bytes(b"half")  # of a process that was killed
    save_weights(weights_file, small_network(seed=1).state_dict(), ABOUT)
    assert_equal(load_weights(weights_file)[0], small_network(seed=1).state_dict())
    assert list(weights_file.parent.iterdir()) == [weights_file]


def test_the_temporary_file_is_in_the_same_folder(tmp_path, monkeypatch):
    """A rename is atomic within one file system only."""
    path, staged = tmp_path / "best.safetensors", []

    def write(where, content):
        staged.append(where)
        assert not path.exists()
        where.write_bytes(content)

    monkeypatch.setattr(files, "write_flushed", write)
    save_weights(path, small_network().state_dict(), ABOUT)
    assert [where.parent for where in staged] == [tmp_path]
    assert path.exists()
