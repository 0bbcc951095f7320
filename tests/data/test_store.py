"""Images on the device, in host memory and on disk hold the same bytes; those on disk need little memory."""

import json
import os
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file

from mnist_dist import load_recipe, train
from mnist_dist.data import Batches, Images, Loader, loader
from mnist_dist.data.store import (
    PLACES,
    choose_place,
    describe_place,
    is_memory_mapped,
    place_images,
    read_ahead,
    write_mapped,
)
from tests.processes import run, run_ranks

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SHAPE = (300, 3, 9, 7)

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def noise() -> Images:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, SHAPE, generator=generator, dtype=torch.uint8)
    return Images(images, torch.randint(0, 10, SHAPE[:1], generator=generator), tuple("0123456789"))


def mapped(path: Path) -> torch.Tensor:
    path.write_bytes(noise().images.numpy().tobytes())
    return torch.from_numpy(np.memmap(path, dtype=np.uint8, mode="c", shape=SHAPE))


# --- the three places ---------------------------------------------------------------------------------------------


@linux
def test_a_memory_mapped_tensor_and_its_parts_are_known(tmp_path):
    images = mapped(tmp_path / "images")
    assert is_memory_mapped(images) and is_memory_mapped(images[100:200])
    assert not is_memory_mapped(images.clone()) and not is_memory_mapped(noise().images)
    assert not is_memory_mapped(torch.empty(0))


@linux
@pytest.mark.parametrize(("side", "size"), [(10, "1.0 kB"), (1000, "10.0 MB"), (100_000, "100.0 GB")])
def test_a_note_shows_the_size_in_a_fitting_unit(side, size):
    images = torch.empty(10, 1, side, side, dtype=torch.uint8, device="meta")
    assert size in describe_place("host", images, "")


def test_every_row_of_a_memory_mapped_tensor_can_be_read_ahead(tmp_path):
    images = mapped(tmp_path / "images")
    assert read_ahead(images, torch.arange(SHAPE[0])) == SHAPE[0]
    assert read_ahead(images[-7:], torch.tensor([6, 0, 6])) == 3
    assert read_ahead(images, torch.arange(0)) == 0
    assert torch.equal(images, noise().images)


@linux
def test_the_loader_reads_the_rows_of_a_file_ahead(monkeypatch, tmp_path):
    asked: list[list[int]] = []
    monkeypatch.setattr(loader, "read_ahead", lambda images, rows: asked.append(rows.tolist()))
    batches = Batches(SHAPE[0], 100, 0, SHAPE[1:])
    for images in (noise().images, mapped(tmp_path / "images")):
        data = Images(images, noise().labels, tuple("0123456789"))
        Loader(data, range, ahead=True).load(batches, batches.plan(0), 1)
    assert asked[0] == batches.rows(batches.plan(0), 1).tolist() and len(asked) <= 2, "the second batch is that ahead"


@linux
def test_images_on_disk_are_a_file_that_is_written_once(tmp_path):
    data = noise()
    found = place_images(data, "disk", CPU, tmp_path / "cache")
    assert is_memory_mapped(found.images) and torch.equal(found.images, data.images)
    (file,) = (tmp_path / "cache").iterdir()
    written = file.stat().st_mtime_ns
    assert torch.equal(place_images(data, "disk", CPU, tmp_path / "cache").images, data.images)
    assert [each.stat().st_mtime_ns for each in (tmp_path / "cache").iterdir()] == [written]


@linux
def test_images_that_have_a_file_are_not_copied_to_another(tmp_path):
    images = mapped(tmp_path / "images")
    found = place_images(Images(images, noise().labels, tuple("0123456789")), "disk", CPU, tmp_path / "cache")
    assert found.images is images and not (tmp_path / "cache").exists()


@linux
@pytest.mark.parametrize("place", ["device", "host"])
def test_images_in_memory_are_a_copy_of_the_file(tmp_path, place):
    images = mapped(tmp_path / "images")
    found = place_images(Images(images, noise().labels, tuple("0123456789")), place, CPU)
    assert not is_memory_mapped(found.images) and torch.equal(found.images, images)


def test_the_rest_of_a_killed_writer_is_never_used(tmp_path):
    data = noise()
    whole = write_mapped(data.images, tmp_path)
    (file,) = tmp_path.iterdir()
    file.with_name(f"{file.name}.1.part").write_bytes(b"half")
    file.write_bytes(file.read_bytes()[:-1])  # a file that lost its end
    del whole
    assert torch.equal(write_mapped(data.images, tmp_path), data.images)


# --- auto ---------------------------------------------------------------------------------------------------------


def with_memory(monkeypatch: pytest.MonkeyPatch, host: float, device: float) -> None:
    """Sets the free memory, in sizes of the images."""
    size = noise().images.numel()
    memory = namedtuple("memory", "available")(int(host * size))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device_: (int(device * size), 0))


@linux
@pytest.mark.parametrize(
    ("device", "is_file", "host", "free", "processes", "expected"),
    [
        (CPU, False, 1, 0, 1, "device"),  # in memory already
        (CPU, True, 3, 0, 1, "device"),
        (CPU, True, 3, 0, 2, "disk"),  # each process would have a copy
        (CPU, True, 1, 0, 1, "disk"),
        (GPU, False, 1, 3, 1, "device"),
        (GPU, False, 3, 1, 1, "host"),
        (GPU, True, 3, 1, 2, "disk"),
        (torch.device("mps"), True, 1, 0, 1, "device"),
    ],
    ids=str,
)
def test_auto_chooses_the_first_place_that_is_large_enough(
    monkeypatch, tmp_path, device, is_file, host, free, processes, expected
):
    images = mapped(tmp_path / "images") if is_file else noise().images
    with_memory(monkeypatch, host, free)
    place, reason = choose_place(images, device, processes)
    assert place == expected
    assert bool(reason) == (place != "device")


# --- training -----------------------------------------------------------------------------------------------------

WORDS = ["epochs=2", "data.limit_train=200", "data.limit_test=50", "batch_size=48", "tracking.plots=false"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "last.safetensors")


@linux
def test_a_run_gives_the_same_weights_from_every_place_at_every_number_of_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for place in ("auto", "device", "host", "disk"):
        train(load_recipe("debug", *WORDS, "logical_shards=2", f"data.place={place}"), tmp_path / place)
        console = (tmp_path / place / "console.log").read_text()
        assert f"50 test images, {PLACES['device' if place == 'auto' else place]}\n" in console
        assert ("data.place" in console) == (place in ("host", "disk"))
    command = ["-m", "mnist_dist.train", "--recipe", "debug", "--run-dir", tmp_path / "two"]
    command = [sys.executable, *command, *WORDS, "logical_shards=2", "data.place=disk"]
    run_ranks(2, command, env=os.environ | {"ACCELERATE_USE_CPU": "true"})
    expected = weights(tmp_path / "device")
    for name in ("auto", "host", "disk", "two"):
        found = weights(tmp_path / name)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected), name
    (file,) = (tmp_path / "cache").rglob("*.bin")
    assert file.stat().st_size == 200 * 28 * 28


def test_a_run_resumes_from_another_place(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = [*WORDS, "checkpoint.every_steps=3"]
    train(load_recipe("debug", *words), tmp_path / "whole")
    train(load_recipe("debug", *words, "max_steps=7", "schedule={name: constant}"), tmp_path / "constant")
    checkpoint = tmp_path / "constant"
    longer = [*words, "schedule={name: constant}", "data.place=disk"]
    train(load_recipe("debug", *longer), checkpoint, allow_recipe_change=True)
    train(load_recipe("debug", *longer), tmp_path / "at_once")
    found, expected = weights(checkpoint), weights(tmp_path / "at_once")
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_cache_that_cannot_be_written_is_a_problem_with_its_key(tmp_path, monkeypatch, refused):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    recipe = load_recipe("debug", *WORDS, "data.place=disk")
    assert refused(lambda: train(recipe, tmp_path / "run")) == [("data.place", "unwritable")]


# --- memory -------------------------------------------------------------------------------------------------------

READ_ALL = """
import ctypes, json, sys
# Large arrays get new memory from the kernel: in memory that the process has kept, they would not be measured.
ctypes.CDLL(None).mallopt(-3, 1 << 17)  # M_MMAP_THRESHOLD
import numpy as np, torch
from mnist_dist.data import Batches, Images, Loader
from mnist_dist.data.store import place_images

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

path, place, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
images = torch.from_numpy(np.memmap(path, dtype=np.uint8, mode="c", shape=(count, 3, 64, 64)))
before = anonymous()
data = place_images(Images(images, torch.zeros(count, dtype=torch.int64), ("a",)), place, torch.device("cpu"))
batches = Batches(count, 64, 0, (3, 64, 64))
loader, plan = Loader(data, range, torch.device("cpu"), ahead=True), batches.plan(0)
total = sum(int(loader.load(batches, plan, index).images[:, 0, 0, 0].sum()) for index in range(batches.steps_per_epoch))
print(json.dumps({"megabytes": anonymous() - before, "total": total}))
"""


@linux
def test_reading_all_images_from_disk_needs_little_anonymous_memory(tmp_path):
    count, path, script = 16_000, tmp_path / "images", tmp_path / "read_all.py"  # 197 MB, most of it a hole in the file
    with path.open("wb") as file:
        file.truncate(count * 3 * 64 * 64)
        for row in range(0, count, 1000):
            file.seek(row * 3 * 64 * 64)
            file.write(b"\x07")
    script.write_text(READ_ALL)
    found = {
        place: json.loads(
            run([sys.executable, script, path, place, str(count)], capture_output=True, check=True).stdout
        )
        for place in ("disk", "host")
    }
    assert found["disk"]["total"] == found["host"]["total"] == 7 * 16
    assert found["disk"]["megabytes"] < 60, found
    assert found["host"]["megabytes"] > 150, "the measurement misses images in memory"
