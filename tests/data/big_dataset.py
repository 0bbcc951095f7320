"""Measures training from a large memory-mapped file: `python -m tests.data.big_dataset --gigabytes 8`.

Makes a file of random colour images in a new folder, trains from it and, in turns, from images in memory, prints one
line of JSON for each network, and deletes the file. The file's pages are dropped from the operating system's cache
before the training. Needs Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from accelerate import PartialState

from mnist_dist import load_recipe
from mnist_dist.data import Dataset, Images
from mnist_dist.engine.schedules import set_rates
from mnist_dist.run.build import build_components
from mnist_dist.run.components import TrainingComponents
from mnist_dist.run.model_setup import build_module

IN_MEMORY = 256 * 2**20
"""Bytes of the images that the other placement keeps in memory."""


def anonymous_megabytes() -> float:
    """Returns the resident memory of this process without the pages of files."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def write_images(path: Path, count: int, side: int) -> None:
    """Writes random images, flushes them, and drops them from the cache of the operating system."""
    block = np.random.default_rng(0).integers(0, 256, 2**26, dtype=np.uint8).tobytes()
    left = count * 3 * side * side
    with path.open("wb") as file:
        while left > 0:
            left -= file.write(block[: min(left, len(block))])
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def build(recipe_name: str, data: Images, place: str) -> TrainingComponents:
    recipe = load_recipe(recipe_name, f"data.place={place}", "data.augment={flip: true, crop_padding: 4}")
    dataset = Dataset(data, data[:2], data[:2])
    return build_components(recipe, "no", data, build_module(recipe, dataset))


class Loop:
    """Trains some steps when asked, and remembers the speed."""

    def __init__(self, components: TrainingComponents):
        self._components, self._step, self.speeds = components, 0, list[float]()
        self._plan = components.batches.plan(0)

    def run(self, steps: int, counts: bool = True) -> None:
        started, images = time.perf_counter(), 0
        for _ in range(steps):
            epoch, index = divmod(self._step, self._components.batches.steps_per_epoch)
            if epoch != self._plan.epoch:
                self._plan = self._components.batches.plan(epoch)
            set_rates(self._components.update.optimizer, self._components.schedule, self._step)
            self._components.update(self._plan, index, self._step)
            images += self._components.batches.size(index)
            self._step += 1
        self._components.update.check()  # waits for the device
        if counts:
            self.speeds.append(images / (time.perf_counter() - started))


def measure(recipe: str, data: Images, turns: int, steps: int) -> dict[str, object]:
    """Returns images per second from disk and from memory, in turns, and the anonymous memory of training from disk."""
    before = anonymous_megabytes()
    disk = Loop(build(recipe, data, "disk"))
    disk.run(2, counts=False)
    grown = anonymous_megabytes() - before
    memory = Loop(build(recipe, data[: max(1, IN_MEMORY // data.images[0].numel())], "device"))
    memory.run(2, counts=False)
    base, most = anonymous_megabytes(), 0.0
    for _ in range(turns):
        memory.run(steps)
        disk.run(steps)
        most = max(most, anonymous_megabytes())
    ratios = [one / other for one, other in zip(disk.speeds, memory.speeds, strict=True)]
    return {
        "recipe": recipe,
        "file_gb": round(data.images.numel() / 1e9, 2),
        "images_per_second_disk": round(statistics.median(disk.speeds), 1),
        "images_per_second_memory": round(statistics.median(memory.speeds), 1),
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(each, 3) for each in ratios],
        "anonymous_mb": round(before + grown + max(0.0, most - base), 1),  # of a process that trains from disk alone
        "load": psutil.getloadavg()[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=8.0)
    parser.add_argument("--side", type=int, default=32, help="height and width of the images")
    parser.add_argument("--recipes", nargs="+", default=["resnet18", "model_v1_step"])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, nargs="+", default=[2, 20], help="steps of a turn, for each recipe")
    parser.add_argument("--folder", type=Path, default=None, help="where the file is made; null: the temporary folder")
    arguments = parser.parse_args()
    PartialState(cpu=not torch.cuda.is_available())
    count = int(arguments.gigabytes * 1e9) // (3 * arguments.side**2)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = Path(folder) / "images.bin"
        for recipe, steps in zip(arguments.recipes, arguments.steps, strict=True):
            write_images(path, count, arguments.side)
            images = torch.from_numpy(np.memmap(path, np.uint8, "c", shape=(count, 3, arguments.side, arguments.side)))
            labels = torch.arange(count) % 10
            data = Images(images, labels, tuple("0123456789"), (0.5,) * 3, (0.29,) * 3)
            print(json.dumps(measure(recipe, data, arguments.turns, steps)), flush=True)


if __name__ == "__main__":
    main()
