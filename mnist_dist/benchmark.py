"""How fast a recipe trains here, beside the bare step and beside what one would write instead.

`accelerate launch -m mnist_dist.benchmark --recipe model_v1_onecycle`. Every contender trains the same model with the
same batch size, augmentation and precision, in one process group; rounds are interleaved, so that a machine whose speed
drifts drifts for all of them alike. Figures are images/s of the whole world: median, lowest and highest round.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from accelerate import Accelerator, PartialState
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from mnist_dist.command_line import Parser, run_door
from mnist_dist.data import Dataset, Images
from mnist_dist.engine.optim import build_optimizer
from mnist_dist.keeper import Keeper
from mnist_dist.parts import (
    Progress,
    build_module,
    build_parts,
    check_world,
    load_data,
    load_teachers,
    place,
)
from mnist_dist.recipe import Recipe, load_recipe
from mnist_dist.recipe_file import Problem, RecipeError
from mnist_dist.runs import RunFolder, git_commit, versions
from mnist_dist.train import fit, open_trackers
from mnist_dist.world import check_size, choose_threads, device_name, launched_world, together

EXAMPLES = """\
examples:
  accelerate launch -m mnist_dist.benchmark --recipe model_v1_onecycle
  accelerate launch -m mnist_dist.benchmark --recipe ms_ran mixed_precision=bf16 --json ms_ran.json
"""

PRECISIONS = {"no": "fp32", "bf16": "bf16"}

# --- contenders: each yields the seconds that `steps` updates took -------------------------------------------------


@dataclass(frozen=True)
class Contender:
    name: str
    run: Callable[[int], float]
    """Trains so many more steps; returns the seconds they took, the device's work included."""


def bare_step(recipe: Recipe, precision: str, dataset: Dataset, state: PartialState) -> Contender:
    """Forward, loss, backward and optimizer on one fixed batch that lies on the device: the limit of any trainer."""
    module, optimizer, autocast = _model_and_optimizer(
        recipe, precision, dataset, state, channels_last=recipe.engine.channels_last
    )
    rows = slice(0, recipe.batch_size // state.num_processes)
    images = dataset.train.normalize(dataset.train.images[rows]).to(state.device)
    labels = dataset.train.labels[rows].to(state.device)
    return Contender(
        "bare step", lambda steps: _time(module, optimizer, autocast, itertools.repeat((images, labels)), steps, recipe)
    )


def trainer(
    recipe: Recipe, precision: str, dataset: Dataset, state: PartialState, folder: Path, name: str = "mnist_dist"
) -> Contender:
    """The trainer as a user runs it: data, augmentation, clipping, metrics, console, W&B offline."""
    module, teachers = build_module(recipe, dataset), load_teachers(recipe, dataset.train)
    parts = build_parts(recipe, precision, dataset.train, module, teachers)
    run = RunFolder.open(folder / f"{name}-{state.process_index}", recipe)
    open_trackers(recipe, parts, dataset, run, {}, quiet=True)
    progress = Progress()
    keep = Keeper(run, recipe, parts, progress)
    judged_on = dataset.test[slice(1)].to(state.device)

    def train(steps: int) -> float:
        before = parts.meter.train_seconds  # the meter's clock stands still during evaluation
        parts.meter.resume()
        fit(recipe, replace(parts, total_steps=progress.step + steps), judged_on, keep, progress)
        return parts.meter.train_seconds - before

    return Contender(name, train)


def tensor_loop(recipe: Recipe, precision: str, dataset: Dataset, state: PartialState) -> Contender:
    """A plain loop fed from tensors on the device, with our batched augmentation: what is left is the loop itself."""
    module, optimizer, autocast = _model_and_optimizer(
        recipe, precision, dataset, state, channels_last=recipe.engine.channels_last
    )
    images, labels = dataset.train.images.to(state.device), dataset.train.labels.to(state.device)
    size, augmentation = recipe.batch_size // state.num_processes, recipe.data.augment.build()

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            for rows in torch.randperm(len(labels), device=state.device).split(size):
                batch = images[rows].float()
                if not augmentation.is_identity:
                    side = batch.shape[-1]
                    draws = torch.rand(len(rows), augmentation.count_draws(side), device=state.device)
                    batch = augmentation.apply(batch, augmentation.warps(draws, side))
                yield dataset.train.normalize(batch), labels[rows]

    source = batches()
    return Contender(
        "plain loop, device tensors", lambda steps: _time(module, optimizer, autocast, source, steps, recipe)
    )


def plain_loader(recipe: Recipe, precision: str, dataset: Dataset, state: PartialState, workers: int) -> Contender:
    """PyTorch's own training loop with a DataLoader, as its quickstart has it."""
    module, optimizer, autocast = _model_and_optimizer(recipe, precision, dataset, state)
    loader = _loader(recipe, dataset.train, recipe.batch_size // state.num_processes, workers, state.device)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            for images, labels in loader:
                yield images.to(state.device, non_blocking=True), labels.to(state.device, non_blocking=True)

    source = batches()
    name = f"PyTorch + DataLoader, {PRECISIONS[precision]} ({workers} workers)"
    return Contender(name, lambda steps: _time(module, optimizer, autocast, source, steps, recipe))


def accelerate_loader(recipe: Recipe, precision: str, dataset: Dataset, state: PartialState, workers: int) -> Contender:
    """Accelerate with a prepared model, optimizer and DataLoader, as its quick tour has it."""
    module = build_module(recipe, dataset)
    optimizer = _optimizer(recipe, module)
    loader = _loader(recipe, dataset.train, recipe.batch_size // state.num_processes, workers, state.device)
    accelerator = Accelerator(mixed_precision=precision)
    model, optimizer, loader = accelerator.prepare(module, optimizer, loader)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from loader

    source = batches()

    def train(steps: int) -> float:
        started = time.perf_counter()
        for _ in range(steps):
            images, labels = next(source)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels, label_smoothing=recipe.label_smoothing)
            accelerator.backward(loss)
            if recipe.clip_grad_norm is not None:
                accelerator.clip_grad_norm_(model.parameters(), recipe.clip_grad_norm)
            optimizer.step()
        _wait(state.device)
        return time.perf_counter() - started

    return Contender(f"Accelerate + DataLoader, {PRECISIONS[precision]} ({workers} workers)", train)


def _optimizer(recipe: Recipe, module: nn.Module) -> torch.optim.Optimizer:
    lr = recipe.optimizer.lr or 0.01
    return build_optimizer(module.parameters(), recipe.optimizer.name, lr=lr, **recipe.optimizer.keywords)


def _model_and_optimizer(
    recipe: Recipe, precision: str, dataset: Dataset, state: PartialState, *, channels_last: bool = False
) -> tuple[Any, Any, Any]:
    """What the loops without Accelerate train: the model (data parallel in a world), its optimizer, autocast."""
    module = place(build_module(recipe, dataset), state.device, channels_last=channels_last)
    optimizer = _optimizer(recipe, module)
    if state.num_processes > 1:
        devices = None if state.device.type == "cpu" else [state.device]
        module = nn.parallel.DistributedDataParallel(module, device_ids=devices)

    def autocast() -> torch.autocast:
        return torch.autocast(state.device.type, torch.bfloat16, enabled=precision == "bf16")

    return module, optimizer, autocast


def _time(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    autocast: Callable[[], torch.autocast],
    source: Iterator[tuple[Tensor, Tensor]],
    steps: int,
    recipe: Recipe,
) -> float:
    started = time.perf_counter()
    for _ in range(steps):
        images, labels = next(source)
        optimizer.zero_grad()
        with autocast():
            loss = F.cross_entropy(module(images), labels, label_smoothing=recipe.label_smoothing)
        loss.backward()
        if recipe.clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(module.parameters(), recipe.clip_grad_norm)
        optimizer.step()
    _wait(next(module.parameters()).device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _PerImage(TorchDataset):
    """torchvision's usual pipeline, image by image: PIL, random affine, ToTensor, Normalize."""

    def __init__(self, recipe: Recipe, data: Images):
        augment = recipe.data.augment
        steps: list[Any] = [transforms.ToPILImage()]
        if not augment.build().is_identity:
            steps.append(
                transforms.RandomAffine(
                    augment.rotation,
                    translate=(augment.translation, augment.translation) if augment.translation else None,
                    scale=tuple(augment.scale) if augment.scale else None,
                    shear=augment.shear or None,
                    interpolation=InterpolationMode(augment.interpolation),
                    fill=int(augment.fill),
                )
            )
        steps += [transforms.ToTensor(), transforms.Normalize((data.mean,), (data.std,))]
        self._data, self._transform = data, transforms.Compose(steps)

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._transform(self._data.images[index]), int(self._data.labels[index])


def _loader(recipe: Recipe, data: Images, batch_size: int, workers: int, device: torch.device) -> DataLoader:
    return DataLoader(
        _PerImage(recipe, data),
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
    )


# --- measuring ----------------------------------------------------------------------------------------------------


def best_workers(recipe: Recipe, precision: str, dataset: Dataset, state: PartialState, steps: int) -> int:
    """The number of DataLoader workers with which the plain loop is fastest here, so that no peer is badly tuned."""
    cores = max(1, (os.cpu_count() or 1) // state.num_processes)
    candidates = sorted({0, 1, min(2, cores), min(4, cores), min(8, cores)})
    seconds = {}
    for workers in candidates:
        contender = plain_loader(recipe, precision, dataset, state, workers)
        contender.run(3)  # the workers start
        seconds[workers] = contender.run(steps)
    return min(seconds, key=seconds.__getitem__)


def measure(recipe: Recipe, rounds: int, steps: int) -> dict[str, Any]:
    """Interleaved rounds of all contenders; returns the table as plain values (equal on all processes but for time)."""
    state = launched_world()
    check_size(state)
    choose_threads(state)
    precision = check_world(recipe, state)
    if precision == "fp16":
        raise RecipeError([Problem("the recipe", "mixed_precision", "the benchmark compares fp32 and bf16 only")])
    dataset = load_data(recipe, state)
    together(state, lambda: build_module(recipe, dataset))
    with tempfile.TemporaryDirectory() as folder:
        common = (recipe, precision, dataset, state)
        ours = trainer(*common, Path(folder))
        ours.run(1)
        first_step_seconds = time.time() - psutil.Process().create_time()
        workers = best_workers(*common, steps=min(steps, 20))
        contenders = [
            ours,
            bare_step(*common),
            tensor_loop(*common),
            plain_loader(*common, workers),
            accelerate_loader(*common, workers),
        ]
        if recipe.logical_shards:  # what exactness costs
            plain = recipe.model_copy(update={"logical_shards": None})
            contenders.append(trainer(plain, *common[1:], Path(folder), "mnist_dist without logical shards"))
        if precision != "no":  # what a user has who does not turn autocast on
            contenders.append(plain_loader(recipe, "no", dataset, state, workers))
        seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
        for contender in contenders:
            contender.run(5)  # warm-up, not counted
        for _ in range(rounds):
            for contender in contenders:
                state.wait_for_everyone()
                seconds[contender.name].append(contender.run(steps))
    speeds = {name: [steps * recipe.batch_size / each for each in times] for name, times in seconds.items()}
    return {
        "recipe": recipe.name,
        "model": recipe.model.name,
        "batch_size": recipe.batch_size,
        "mixed_precision": precision,
        "world_size": state.num_processes,
        "device": device_name(state.device),
        "rounds": rounds,
        "steps_per_round": steps,
        "seconds_from_process_start_to_first_step": round(first_step_seconds, 2),
        "peak_memory_mb": round(_peak_memory_mb(state.device)),
        "images_per_second": {
            name: {"median": round(statistics.median(each), 1), "min": round(min(each), 1), "max": round(max(each), 1)}
            for name, each in speeds.items()
        },
        # Pair by pair, round by round: what the machine did in a round it did to both.
        "ratio_of_mnist_dist_to": {
            name: round(statistics.median(a / b for a, b in zip(speeds[ours.name], each, strict=True)), 3)
            for name, each in speeds.items()
            if name != ours.name
        },
        "date": datetime.now(timezone.utc).date().isoformat(),
        "versions": versions(),
        "git_commit": git_commit(),
    }


def _peak_memory_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def print_table(result: dict[str, Any]) -> None:
    table = Table(
        "contender", "images/s", "lowest", "highest", "ms/step", "mnist_dist ÷ it", box=None,
        title=f"{result['recipe']}: batch {result['batch_size']}, {result['mixed_precision']}, {result['device']}, "
        f"{result['world_size']} process(es)",
    )  # fmt: skip
    for name, speed in result["images_per_second"].items():
        ratio = result["ratio_of_mnist_dist_to"].get(name)
        table.add_row(
            name,
            *(f"{speed[which]:,.0f}" for which in ("median", "min", "max")),
            f"{1000 * result['batch_size'] / speed['median']:.2f}",
            f"{ratio:.2f}" if ratio else "",
        )
    console = Console()
    console.print(table)
    console.print(
        f"first step {result['seconds_from_process_start_to_first_step']:.1f} s after the process started, "
        f"peak memory {result['peak_memory_mb']:,} MB"
    )


def to_markdown(result: dict[str, Any], command: str) -> str:
    """The table as a section of a Markdown file, with all that is needed to make it again."""
    lines = [
        f"\n### {result['recipe']}, {PRECISIONS[result['mixed_precision']]}, {result['device']}\n",
        f"`{command}`, {result['date']}, torch {result['versions']['torch']}, commit {str(result['git_commit'])[:12]}.",
        f"{result['rounds']} interleaved rounds of {result['steps_per_round']} steps, batch {result['batch_size']}, "
        f"{result['world_size']} process(es). First step "
        f"{result['seconds_from_process_start_to_first_step']:.1f} s after the process started.\n",
        "| contender | images/s (median) | lowest | highest | mnist_dist ÷ it |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, speed in result["images_per_second"].items():
        figures = " | ".join(f"{speed[which]:,.0f}" for which in ("median", "min", "max"))
        ratio = result["ratio_of_mnist_dist_to"].get(name)
        lines.append(f"| {name} | {figures} | {f'{ratio:.2f}' if ratio else ''} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = Parser("mnist_dist.benchmark", "Times a recipe beside the bare step and beside its peers.", EXAMPLES)
    parser.add_argument("--recipe", metavar="NAME", required=True, help="a path, or a bundled recipe's name")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="interleaved rounds (default 7)")
    parser.add_argument("--steps", type=int, default=50, metavar="N", help="steps a round (default 50)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also add the table to the end of FILE")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any recipe key by its dotted name")
    arguments = parser.parse_intermixed_args(argv)
    if min(arguments.rounds, arguments.steps) < 1:
        parser.error("--rounds and --steps are at least 1")
    offline = (
        ()
        if any(word.startswith("tracking.wandb.mode=") for word in arguments.overrides)
        else ("tracking.wandb.mode=offline",)
    )
    # So many epochs that no schedule and no loop comes to its end while we measure.
    recipe = load_recipe(arguments.recipe, *arguments.overrides, *offline, "epochs=1000", "eval_every=1000")
    result = measure(recipe, arguments.rounds, arguments.steps)
    if launched_world().is_main_process:
        print_table(result)
        if arguments.json:
            arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        if arguments.markdown:
            command = shlex.join(["python", "-m", "mnist_dist.benchmark", *(sys.argv[1:] if argv is None else argv)])
            with arguments.markdown.open("a", encoding="utf-8") as file:
                file.write(to_markdown(result, command))
    return 0


if __name__ == "__main__":
    sys.exit(run_door(main))
