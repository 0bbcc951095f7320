"""What the doctor measures on every rank. A probe returns what JSON can carry, and judges nothing."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import statistics
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mnist_dist.data import Batches, Dataset, load_dataset
from mnist_dist.doctor.ranks import Ranks
from mnist_dist.engine.optimizers import build_optimizer
from mnist_dist.engine.schedules import set_rates
from mnist_dist.recipe.loading import load_recipe
from mnist_dist.recipe.schema import Recipe
from mnist_dist.run.build import build_components
from mnist_dist.run.kernels import set_kernels
from mnist_dist.run.model_setup import build_module, to_device

# --- the machine --------------------------------------------------------------------------------------------------


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_room(device: torch.device, run_dir: Path) -> dict[str, int]:
    """Free bytes: memory of the host and the GPU, disk under the run folder, which need not exist."""
    free = {"memory": psutil.virtual_memory().available}
    if device.type == "cuda":
        free["GPU memory"] = torch.cuda.mem_get_info(device)[0]
    place = next(path for path in (run_dir, *run_dir.parents) if path.is_dir())
    return free | {"disk": shutil.disk_usage(place).free}


SEEN_WITHIN = 5.0
"""Seconds in which a file of one rank must be seen by the others: network file systems show it late."""


class FolderProbe:
    """A file as a checkpoint is written, in a folder that need not exist; nothing is left behind."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._file = folder / f".doctor-{platform.node()}-{os.getpid()}"
        self._staged = self._file.with_name(self._file.name + ".tmp")
        self._made: list[Path] = []

    def write(self) -> dict[str, Any]:
        """Writes beside, flushes to the disk, renames; returns the file's name and the seconds this took.

        Raises:
            OSError: it cannot be done here.
        """
        self._made = [path for path in (self._folder, *self._folder.parents) if not path.exists()]
        self._folder.mkdir(parents=True, exist_ok=True)
        begun = time.perf_counter()
        with self._staged.open("w", encoding="utf-8") as file:
            file.write(self._file.name)
            file.flush()
            os.fsync(file.fileno())
        self._staged.replace(self._file)
        return {"name": self._file.name, "node": platform.node(), "seconds": time.perf_counter() - begun}

    def look(self, names: list[str]) -> list[int]:
        """The ranks whose file is not seen from here, or not whole."""
        deadline, unseen = time.monotonic() + SEEN_WITHIN, list(range(len(names)))
        while unseen := [rank for rank in unseen if not self._is_whole(names[rank])]:
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        return unseen

    def _is_whole(self, name: str) -> bool:
        try:
            return (self._folder / name).read_text(encoding="utf-8") == name
        except OSError:
            return False

    def clear(self) -> None:
        """Removes this rank's file."""
        for path in (self._staged, self._file):
            with suppress(OSError):
                path.unlink()

    def remove_folders(self) -> None:
        """Removes the folders that were made for it, once all files are gone."""
        for path in self._made:
            with suppress(OSError):
                path.rmdir()


WANDB_SECONDS = 3.0


def reach(server: str) -> tuple[float, str]:
    """Seconds until a server answers anything at all; and why it does not, or nothing."""
    begun = time.perf_counter()
    try:
        with suppress(urllib.error.HTTPError):  # which is an answer
            urllib.request.urlopen(server, timeout=WANDB_SECONDS).close()
    except (OSError, ValueError) as error:
        return 0.0, str(getattr(error, "reason", error))
    return time.perf_counter() - begun, ""


# --- between the ranks: all of them must call these at the same time -------------------------------------------------

SIZES = {"1 KB": 2**10, "32 KB": 2**15, "1 MB": 2**20, "64 MB": 2**26}
REPETITIONS = {"1 KB": 200, "32 KB": 200, "1 MB": 20, "64 MB": 3}
"""The shortest counts: whatever else a machine does only adds to it."""


def read_clock(device: torch.device) -> list[tuple[float, float]]:
    """The time of day before and after each of a few all-reduces."""
    stamps, nothing = [], torch.zeros(1, device=device)
    for _ in range(16):
        before = time.time()
        dist.all_reduce(nothing)
        wait(device)
        stamps.append((before, time.time()))
    return stamps


def clock_offset(mine: list[tuple[float, float]], zero: list[tuple[float, float]]) -> tuple[float, float]:
    """Seconds by which a clock is ahead of rank 0's, and how exactly that is known: half the shortest round trip.

    As NTP, with an all-reduce for the round trip, so that all ranks measure at once: it ends nowhere before it has
    begun everywhere. So `mine` ended after `zero` began, and began before `zero` ended, whatever the clocks say.
    """
    least = max(my_start - end for (my_start, _), (_, end) in zip(mine, zero, strict=True))
    most = min(my_end - start for (_, my_end), (start, _) in zip(mine, zero, strict=True))
    return (least + most) / 2, abs(most - least) / 2


LINK_SECONDS = 2.0
"""No further round trip of a size after so long: a cable fallen back to 100 Mbit/s is to be named, not waited for."""


def measure_links(ranks: Ranks) -> dict[str, Any]:
    """Round trips from each rank to the next, neighbours in turns.

    Returns:
        `seconds` one way to the next rank, by size (half the shortest round trip), and the sizes that came `damaged`.
    """
    before, after = (ranks.rank - 1) % ranks.size, (ranks.rank + 1) % ranks.size
    seconds, damaged = {}, set()
    for turn in range(3 if ranks.size % 2 else 2):
        calls, answers = (link_turn(rank, ranks.size) == turn for rank in (ranks.rank, before))
        if not calls and not answers:
            continue
        for size, count in SIZES.items():
            numbers = torch.arange(count // 4, dtype=torch.int32, device=ranks.device)
            sent = numbers + (ranks.rank if calls else before)
            if calls:
                seconds[size], heard = _call(sent, after, REPETITIONS[size])
            else:
                heard = _answer(torch.zeros_like(numbers), before)
            if not torch.equal(heard, sent):
                damaged.add(size)
    return {"seconds": seconds, "damaged": sorted(damaged), "node": platform.node()}


def _call(sent: Tensor, peer: int, repetitions: int) -> tuple[float, Tensor]:
    """Sends and has it sent back: the shortest time one way, and what came back at last."""
    heard, times = torch.zeros_like(sent), list[float]()
    while len(times) < repetitions and sum(times) < LINK_SECONDS:
        dist.send(torch.ones(1, device=sent.device), peer)  # there is more to come
        wait(sent.device)
        begun = time.perf_counter()
        dist.send(sent, peer)
        dist.recv(heard, peer)
        wait(sent.device)
        times.append(time.perf_counter() - begun)
    dist.send(torch.zeros(1, device=sent.device), peer)
    return min(times) / 2, heard


def _answer(heard: Tensor, peer: int) -> Tensor:
    """Sends back what comes, as long as more is to come; returns the last."""
    more = torch.empty(1, device=heard.device)
    while True:
        dist.recv(more, peer)
        if not more.item():
            return heard
        dist.recv(heard, peer)
        dist.send(heard, peer)


def link_turn(rank: int, size: int) -> int:
    """In which turn the link from a rank to the next is measured: none shares a rank with another of its turn."""
    return 2 if size % 2 and rank == size - 1 else rank % 2


def measure_all_reduce(ranks: Ranks) -> dict[str, Any]:
    """Sums over all ranks: the shortest `seconds` by size, and the sizes whose sum is `wrong`."""
    seconds, wrong = {}, []
    for size, count in SIZES.items():
        times, values = [], torch.empty(count // 4, device=ranks.device)
        for _ in range(REPETITIONS[size]):
            values.fill_(ranks.rank + 1)
            wait(ranks.device)
            begun = time.perf_counter()
            dist.all_reduce(values)
            wait(ranks.device)
            times.append(time.perf_counter() - begun)
        seconds[size] = min(times)
        if bool((values != ranks.size * (ranks.size + 1) // 2).any()):
            wrong.append(size)
    return {"seconds": seconds, "wrong": wrong}


# --- the reference training ---------------------------------------------------------------------------------------

REFERENCE = Path(__file__).with_name("reference_losses.json")
STEPS = 20


def recorded_losses() -> list[float]:
    """The reference training's losses that the package carries."""
    return json.loads(REFERENCE.read_text(encoding="utf-8"))["losses"]


def build_reference() -> tuple[Recipe, Dataset, nn.Module]:
    """lenet5 in fp32, the seed 0, on data that need no file."""
    words = ("seed=0", "batch_size=128", "epochs=1", f"max_steps={STEPS}", "mixed_precision=no", "engine.tf32=off")
    recipe = load_recipe("lenet5", *words, "data.dataset=synthetic", "tracking.wandb.mode=disabled")
    set_kernels(recipe)  # TF32 keeps ten bits, and would hide faults of the size of its rounding
    data = load_dataset("synthetic")
    return recipe, data, build_module(recipe, data)


def train_alone(device: torch.device) -> dict[str, Any]:
    """Trains the whole batches in a plain loop on this rank: `losses`, and the median `seconds` of a step."""
    recipe, dataset, module = build_reference()
    data, augmentation = dataset.train.to(device), recipe.data.augment.build()
    to_device(module, device, channels_last=True)
    rate = recipe.optimizer.lr or 0.0  # which does not change within an epoch
    optimizer = build_optimizer(module.parameters(), recipe.optimizer.name, lr=rate, **recipe.optimizer.keywords)
    batches = Batches(len(data), recipe.batch_size, recipe.seed, augmentation=augmentation)
    plan, losses, seconds = batches.plan(0, device), [], []
    assert plan.warps is not None
    for step in range(STEPS):
        begun = time.perf_counter()
        rows = batches.rows(plan, step)
        images = augmentation.apply(data.images[rows].float(), plan.warps[rows])
        loss = F.cross_entropy(module(data.normalize(images)), data.labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        wait(device)
        seconds.append(time.perf_counter() - begun)
    return {"losses": losses, "seconds": statistics.median(seconds)}


def train_together(device: torch.device) -> dict[str, Any]:
    """Trains by the trainer's own update, the batch shared by all ranks: `losses`, a fingerprint of the `weights`."""
    recipe, data, module = build_reference()
    components = build_components(recipe, "no", data.train, module)
    plan, losses = components.batches.plan(0, device), []
    for step in range(STEPS):
        set_rates(components.update.optimizer, components.schedule, step)
        components.update(plan, step, step)
        losses.append(components.meter.read()["train/loss"])
    weights = b"".join(parameter.detach().cpu().numpy().tobytes() for parameter in components.module.parameters())
    return {"losses": losses, "weights": hashlib.sha256(weights).hexdigest()}
