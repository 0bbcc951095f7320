"""From a recipe to the components of a run, on every process of the world that the launcher made.

The order is: check the world, read the data, build the network, prepare everything. What the user can put right is
found on the way, by all processes together, before anything is trained or written.
"""

from __future__ import annotations

import fnmatch
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin, broadcast, patch_environment
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mnist_dist.data import Batches, Dataset, Images, derive_seed, load_dataset
from mnist_dist.distributed.fsdp import gathered, shard_model_state, shard_optimizer_state, shard_parameters, unshard
from mnist_dist.distributed.gradients import reduce_gradients
from mnist_dist.distributed.launcher import asks_for_fsdp, check_engine, fsdp_settings, run_on_all_ranks
from mnist_dist.distributed.logical_shards import LogicalShards
from mnist_dist.distributed.sync_batchnorm import synchronize_batch_norm
from mnist_dist.engine.checkpoint import save_weights
from mnist_dist.engine.cuda_graph import STEPS_A_REPLAY, CapturedStep, capture_obstacle, compile_network
from mnist_dist.engine.distillation import Distillation
from mnist_dist.engine.evaluation import Evaluation, evaluate
from mnist_dist.engine.metrics import GradientClock, Meter
from mnist_dist.engine.optimizers import (
    MovingAverage,
    Schedule,
    build_optimizer,
    build_schedule,
    fill_momentum,
    set_rates,
)
from mnist_dist.engine.train_step import Update, count_pieces
from mnist_dist.errors import Problem, RecipeError
from mnist_dist.models import build_model
from mnist_dist.recipe.schema import Recipe, check_freeze
from mnist_dist.run.folder import Run


def check_world(recipe: Recipe, state: PartialState) -> str:
    """Refuses what this device and world cannot do; returns the precision to train in."""
    check_engine()
    precision = recipe.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    _check_fsdp(recipe, precision, state)
    problem = recipe.problem if recipe.mixed_precision else partial(Problem, "the launcher")
    if precision not in ("no", "bf16", "fp16"):
        raise RecipeError([problem("mixed_precision", f"{precision} is not supported; use no, bf16 or fp16")])
    if precision == "fp16" and state.device.type == "cpu":
        what = "fp16 needs a GPU: a CPU would train in fp32 without a word; use bf16 or no"
        raise RecipeError([problem("mixed_precision", what)])
    if recipe.batch_size < state.num_processes:
        what = f"the global batch of {recipe.batch_size} cannot be shared by {state.num_processes} processes"
        raise RecipeError([recipe.problem("batch_size", what)])
    if recipe.logical_shards and recipe.logical_shards % state.num_processes:
        what = f"{recipe.logical_shards} shards cannot be shared evenly by {state.num_processes} processes"
        raise RecipeError([recipe.problem("logical_shards", f"{what}; the number of processes must divide them")])
    return precision


def load_data(recipe: Recipe, state: PartialState) -> Dataset:
    """Reads the data on every process; the first of each node downloads, the others wait for it."""
    root = recipe.data.root or os.environ.get("MNIST_DIST_DATA", "data")
    sizes = {key: getattr(recipe.data, key) for key in ("split", "validation", "limit_train", "limit_test")}

    def load(download: bool) -> Dataset:
        try:
            return load_dataset(recipe.data.dataset, root=root, download=download, **sizes)
        except FileNotFoundError as error:
            hint = "put the files there, or name another folder with data.root=… or MNIST_DIST_DATA"
            raise RecipeError([recipe.problem("data.root", f"{error}\n{hint}")]) from error
        except (ValueError, ImportError, OSError) as error:
            raise RecipeError([recipe.problem("data", f"{recipe.data.dataset}: {error}")]) from error

    first = run_on_all_ranks(state, lambda: load(download=True) if state.is_local_main_process else None)
    return run_on_all_ranks(state, lambda: first or load(download=False))


def build_module(recipe: Recipe, dataset: Dataset, world_size: int = 1) -> nn.Module:
    """The recipe's network with its initial weights, which follow from the seed; frozen as asked; tried on images.

    A frozen parameter is no part of the optimizer, so nothing moves it, weight decay and averaging included. A batch
    norm whose parameters are all frozen stays in eval mode: it normalises by its running statistics and keeps them, so
    a frozen stage remains the function that it was.

    Raises:
        RecipeError: it cannot be built, or does not turn (N, 1, 28, 28) into (N, classes), or not one image alone where
            a process of so many would have to.
    """
    classes, name = len(dataset.train.classes), recipe.model.name
    torch.manual_seed(derive_seed(recipe.seed))
    try:
        module = build_model(name, num_classes=classes, **recipe.model.keywords)
        with torch.no_grad():
            output = module.eval()(dataset.train.normalize(dataset.train.images[:2]))
    except Exception as error:  # a user's own class may fail in any way
        what = f"{name} cannot be built for 28×28 images of one channel: {type(error).__name__}: {error}"
        raise RecipeError([recipe.problem("model.name", what)]) from error
    if not isinstance(output, torch.Tensor) or output.shape[1:] != (classes,):
        found = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        what = f"{name} gives {found} for two images; expected (2, {classes})"
        raise RecipeError([recipe.problem("model.name", what)])
    _freeze(recipe, module.train())
    _check_training(recipe, module, dataset.train, world_size)
    return module


def _freeze(recipe: Recipe, module: nn.Module) -> None:
    parameters = dict(module.named_parameters())
    if not parameters:
        raise RecipeError([recipe.problem("model.name", f"{recipe.model.name} has no parameter to train")])
    problems = [recipe.problem(key, what) for key, what in check_freeze(recipe.model.freeze, list(parameters))]
    if problems:
        raise RecipeError(problems)
    for pattern in recipe.model.freeze:
        for frozen in fnmatch.filter(parameters, pattern):
            parameters[frozen].requires_grad_(False)
    for part in module.modules():
        if isinstance(part, _BatchNorm) and part.affine and not any(p.requires_grad for p in part.parameters()):
            part.eval()


def _check_training(recipe: Recipe, module: nn.Module, data: Images, world_size: int) -> None:
    """Tries the optimizer, a pass in training, and one of a single image where a step will have to make that."""
    name, smallest = recipe.model.name, _smallest_piece(recipe, len(data), world_size)
    key, doing = "optimizer.name", f"{recipe.optimizer.name} cannot train {name}"
    try:
        build_optimizer(
            module.parameters(), recipe.optimizer.name, lr=recipe.optimizer.lr or 0.1, **recipe.optimizer.keywords
        )
        key, doing = "model.name", f"{name} cannot be trained"
        output = _try_to_train(module, data.normalize(data.images[:2]))
        if not isinstance(output, torch.Tensor):
            raise TypeError(f"it gives a tensor in evaluation, but {type(output).__name__} in training")
        if smallest[0] == 1:
            key = smallest[1]
            doing = f"{getattr(recipe, key)} leaves a process one image at a time, on which {name} cannot be trained"
            _try_to_train(module, data.normalize(data.images[:1]))
    except Exception as error:  # a user's own class may fail in any way
        raise RecipeError([recipe.problem(key, f"{doing}: {error}")]) from error


def _try_to_train(module: nn.Module, images: torch.Tensor) -> object:
    """What the network gives while it trains; it stays as it is."""
    before = [buffer.clone() for buffer in module.buffers()]
    with torch.no_grad():
        output = module(images)
        for buffer, value in zip(module.buffers(), before, strict=True):
            buffer.copy_(value)
    return output


def _smallest_piece(recipe: Recipe, samples: int, world_size: int) -> tuple[int, str]:
    """The fewest images that pass through the network at once in an epoch, and the key that makes them so few."""
    shares, micro = recipe.logical_shards or world_size, recipe.micro_batch_size
    batches = {min(recipe.batch_size, samples), samples % recipe.batch_size} - {0}
    if recipe.sync_batchnorm and world_size > 1:
        return min(batches), "batch_size"  # the images of all processes count
    pieces: dict[int, str] = {}
    for size in batches:
        largest = -(-size // shares)
        for share in (max(1, size // shares), largest):
            # A logical shard is cut by its own size, a process's share by the largest.
            sized = share if recipe.logical_shards else largest
            count = min(count_pieces(sized, micro if isinstance(micro, int) else None), share)
            key = "micro_batch_size" if count > 1 else "logical_shards" if recipe.logical_shards else "batch_size"
            pieces.setdefault(share // count, key)
    return min(pieces.items())


@dataclass(frozen=True)
class TrainingComponents:
    """What a run is made of once the recipe has been built."""

    accelerator: Accelerator
    batches: Batches
    schedule: Schedule
    update: Update
    module: nn.Module
    """The bare network."""
    eval_model: nn.Module
    """The network that is evaluated and saved: the averaged weights where the recipe keeps them."""
    meter: Meter
    total_steps: int
    notes: list[str]
    """What the user should know of how it was built."""

    def epoch(self, progress: Progress) -> float:
        """Epochs done, with the fraction."""
        return round(progress.step / self.batches.steps_per_epoch, 6)

    def evaluation_is_due(self, progress: Progress, eval_every: int) -> bool:
        """At the end of every `eval_every` epochs and after the last step, once."""
        epochs, rest = divmod(progress.step, self.batches.steps_per_epoch)
        due = progress.step >= self.total_steps or (rest == 0 and epochs % eval_every == 0)
        return due and progress.step != progress.evaluated_at

    def evaluate(self, data: Images, batch_size: int, interrupted: Callable[[], bool] = lambda: False) -> Evaluation:
        # Each process gathered batch norm's statistics from its own rows; rank 0's are the run's.
        if self.accelerator.num_processes > 1:
            broadcast(list(self.eval_model.buffers()))
        with gathered(self.eval_model):
            return evaluate(self.accelerator, self.eval_model, data, batch_size=batch_size, interrupted=interrupted)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The trained weights, and the gradients of the last step, by name; asks all processes."""
        named = dict(self.module.named_parameters())
        gradients = {f"gradients/{name}": each.grad for name, each in named.items() if each.grad is not None}
        return unshard({f"weights/{name}": each.detach() for name, each in named.items()} | gradients)

    def state_dict(self) -> dict[str, Any]:
        """All that the next update depends on; asks all processes. No random state: there is none."""
        scaler = self.accelerator.scaler
        return {
            "model": unshard(self.module.state_dict()),
            "optimizer": unshard(self.update.optimizer.state_dict()),
            "average": self.update.average.state_dict() if self.update.average else None,
            "scaler": scaler.state_dict() if scaler else None,
            "schedule": self.schedule.state_dict(),
            "meter": self.meter.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up where `state_dict` was taken, at this world size or another."""
        optimizer = self.update.optimizer
        self.module.load_state_dict(shard_model_state(state["model"], self.module))
        optimizer.load_state_dict(shard_optimizer_state(state["optimizer"], optimizer))
        if self.update.average and state["average"]:
            self.update.average.load_state_dict(state["average"])
        elif self.update.average:  # the recipe has it since: it begins here
            self.update.average.module.load_state_dict(state["model"])
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.schedule.load_state_dict(state["schedule"])
        self.meter.load_state_dict(state["meter"])

    def save_weights(self, path: Path, recipe: Recipe) -> None:
        """Saves the judged weights, with what rebuilds and feeds the network, on rank 0; asks all processes."""
        weights = unshard(self.eval_model.state_dict())
        if self.accelerator.is_main_process:
            data = self.update.data
            about = {"recipe": recipe.name, "model": recipe.model.name, "keywords": recipe.model.keywords}
            save_weights(path, weights, about | {"classes": data.classes, "mean": data.mean, "std": data.std})


@dataclass
class Progress:
    """Where a run stands; everything else follows from the step."""

    step: int = 0
    evaluated_at: int = 0
    """The step after which the last evaluation was made."""
    best_accuracy: float = -1.0
    best_epoch: float = 0.0
    evaluations_without_gain: int = 0
    last: dict[str, float] = field(default_factory=dict)
    """Figures of the last evaluation and of the training since the one before."""

    def note(self, evaluation: Evaluation, training: dict[str, float], epoch: float) -> bool:
        """Takes down an evaluation after `step`; whether its accuracy is the best so far."""
        self.last = {**training, "eval/loss": evaluation.loss, "eval/accuracy": evaluation.accuracy}
        self.evaluated_at = self.step
        self.evaluations_without_gain += 1
        if evaluation.accuracy <= self.best_accuracy:
            return False
        self.best_accuracy, self.best_epoch, self.evaluations_without_gain = evaluation.accuracy, epoch, 0
        return True


WHOLE_ONLY = ("ema_decay", "logical_shards", "sync_batchnorm", "micro_batch_size")
"""Keys of what needs whole parameters on every process; their defaults leave it out."""


def _check_fsdp(recipe: Recipe, precision: str, state: PartialState) -> None:
    if asks_for_fsdp() and state.num_processes > 1:
        what = "cannot be had with FSDP; leave it out or launch without (launch/accelerate/multi_gpu.yaml)"
        chosen = [key for key in WHOLE_ONLY if getattr(recipe, key) != type(recipe).model_fields[key].default]
        problems = [recipe.problem(key, what) for key in chosen]
        if precision == "fp16":
            problems.append(recipe.problem("mixed_precision", f"fp16 {what}; or take bf16"))
        if problems:
            raise RecipeError(problems)


def to_device(module: nn.Module, device: torch.device, *, channels_last: bool) -> nn.Module:
    """Moves a network to the device, in a memory layout; returns it."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return module.to(device, memory_format=layout)  # type: ignore[call-overload]  # torch types it for tensors only


def build_components(
    recipe: Recipe, precision: str, train_data: Images, module: nn.Module, teachers: Sequence[Run] = ()
) -> TrainingComponents:
    """Builds everything the loop uses, on the device, prepared by Accelerate."""
    set_determinism(recipe.deterministic)
    set_kernels(recipe)
    AcceleratorState._reset_state()  # a notebook may train twice, with another precision the second time
    ddp = DistributedDataParallelKwargs(
        gradient_as_bucket_view=True,
        broadcast_buffers=False,
        find_unused_parameters=recipe.ddp.find_unused_parameters,
    )
    # Said here, so that no launcher's variable says otherwise: accumulation and compilation are the recipe's.
    # So is sharding ours: Accelerate knows it on GPUs only, and the checkpoints shall be the same with it and without.
    with patch_environment(ACCELERATE_USE_FSDP="false"):
        accelerator = Accelerator(
            mixed_precision=precision,
            kwargs_handlers=[ddp],
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            dynamo_backend="no",
        )
    augmentation = recipe.data.augment.build()
    batches = Batches(len(train_data), recipe.batch_size, recipe.seed, augmentation=augmentation)
    total_steps = min(recipe.epochs * batches.steps_per_epoch, recipe.max_steps or sys.maxsize)
    schedule = build_schedule(
        recipe.schedule.name,
        lr=recipe.optimizer.lr,
        steps_per_epoch=batches.steps_per_epoch,
        total_steps=total_steps,
        **recipe.schedule.keywords,
    )
    sharded = asks_for_fsdp() and accelerator.num_processes > 1
    # FSDP2 cuts contiguous parameters only.
    to_device(module, accelerator.device, channels_last=recipe.engine.channels_last and not sharded)
    synchronized = recipe.sync_batchnorm and accelerator.num_processes > 1
    if synchronized:
        module = synchronize_batch_norm(module, accelerator.device)
    if sharded:
        shard_parameters(module, accelerator.device, **fsdp_settings())
    average = None if recipe.ema_decay is None else MovingAverage(module, recipe.ema_decay)
    optimizer = build_optimizer(
        module.parameters(), recipe.optimizer.name, lr=schedule.lr_at(0), **recipe.optimizer.keywords
    )
    set_rates(optimizer, schedule, 0)  # a schedule may bring the momentum
    fill_momentum(optimizer)
    compile_network(module, recipe.compile)
    with warnings.catch_warnings():
        # torch 2.15 renames the option; accelerate 1.15 knows it by its old name only.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        # Sharded parameters bring their own reduction, and so do logical shards, in an order of their own.
        model = accelerator.prepare_model(module, evaluation_mode=sharded or recipe.logical_shards is not None)
        if accelerator.scaler is not None:
            optimizer = accelerator.prepare(optimizer)  # without a scaler it adds nothing but its own time
    meter, clock = Meter(accelerator), GradientClock()
    reduce_gradients(model, accelerator.device, recipe.ddp.comm_hook, clock)
    shards = LogicalShards(recipe.logical_shards, accelerator, module, clock) if recipe.logical_shards else None
    captured, obstacles = _build_capture(recipe, accelerator, optimizer, schedule)
    update = Update(
        accelerator,
        model,
        module,
        optimizer,
        batches,
        train_data.to(accelerator.device),
        meter=meter,
        clip_grad_norm=recipe.clip_grad_norm,
        label_smoothing=recipe.label_smoothing,
        average=average,
        clock=clock,
        shards=shards,
        meets_in_forward=synchronized,
        distillation=_build_distillation(recipe, accelerator, train_data, teachers),
        on_nonfinite=recipe.on_nonfinite,
        captured=captured,
    )
    notes = ["FSDP2: parameters, gradients and optimizer state lie in shards over the processes"] if sharded else []
    if recipe.ddp.comm_hook != "none" and not isinstance(model, nn.parallel.DistributedDataParallel):
        notes.append("ddp.comm_hook is without effect: this run's gradients do not travel by data parallel")
    notes += obstacles
    if recipe.micro_batch_size == "auto":
        update.micro_batch_size = update.find_micro_batch_size(batches.plan(0, accelerator.device))
        notes.append(f"micro_batch_size auto: {update.micro_batch_size} images at once fit into memory")
    else:
        update.micro_batch_size = recipe.micro_batch_size
    eval_model = average.module if average else module
    return TrainingComponents(accelerator, batches, schedule, update, module, eval_model, meter, total_steps, notes)


def _build_distillation(
    recipe: Recipe, accelerator: Accelerator, data: Images, teachers: Sequence[Run]
) -> Distillation | None:
    if not teachers:
        return None
    for teacher in teachers:
        to_device(teacher.model, accelerator.device, channels_last=recipe.engine.channels_last)
    return Distillation(
        [(teacher.model, teacher.about["mean"], teacher.about["std"]) for teacher in teachers],
        weight=recipe.distill.weight,
        temperature=recipe.distill.temperature,
        mean=data.mean,
        std=data.std,
        autocast=accelerator.autocast,
    )


def _build_capture(
    recipe: Recipe, accelerator: Accelerator, optimizer: torch.optim.Optimizer, schedule: Schedule
) -> tuple[CapturedStep | None, list[str]]:
    """What replays steps, where the recipe wants it and it can be done; else why not, for who expects it."""
    if recipe.engine.capture == "off":
        return None, []
    obstacle = capture_obstacle(
        accelerator.device,
        accelerator.num_processes,
        optimizer,
        moves_momentum=schedule.momentum_at is not None,
        scaler=accelerator.scaler is not None,
        shards=recipe.logical_shards is not None,
        compile_mode=recipe.compile,
    )
    if obstacle is None:
        return CapturedStep(accelerator.device, STEPS_A_REPLAY if recipe.engine.capture == "epoch" else 1), []
    expected = recipe.engine.capture != "auto" or accelerator.device.type == "cuda"
    return None, [f"engine.capture: all steps are eager: {obstacle}"] if expected else []


def set_determinism(deterministic: bool) -> None:
    """Bit-for-bit repeatable kernels where PyTorch has them; it warns of those it has not."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    # The filling of fresh memory is a debugging aid that costs time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # torch declares it nowhere


def set_kernels(recipe: Recipe) -> None:
    """What a GPU may choose: kernels by trial, and products of fewer bits."""
    torch.backends.cudnn.benchmark = recipe.engine.cudnn_benchmark and not recipe.deterministic
    torch.backends.cudnn.allow_tf32 = recipe.engine.tf32 != "off"
    torch.backends.cuda.matmul.allow_tf32 = recipe.engine.tf32 == "on"
