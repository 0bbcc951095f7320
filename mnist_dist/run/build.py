"""Builds the components of a run from its recipe, on every process of the launcher's world.

The order is: `check_world`, `load_data`, `model_setup.prepare_model`, `build_components`. All mistakes that a user can
correct are found on the way, by all processes together, before anything is trained or written.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import partial

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin, patch_environment
from torch import nn

from mnist_dist.data import Batches, Images
from mnist_dist.data.cache import describe_bytes
from mnist_dist.data.images import balanced_weights
from mnist_dist.data.store import Place, choose_place, describe_place, place_images
from mnist_dist.distributed.collectives import run_on_all_ranks
from mnist_dist.distributed.devices import (
    count_local_processes,
    device_name,
    emulates_bf16,
    supports_precision,
    unused_gpu,
)
from mnist_dist.distributed.fsdp import shard_parameters
from mnist_dist.distributed.gradients import FlatGradients, GradientClock
from mnist_dist.distributed.launcher import asks_for_fsdp, check_engine, fsdp_settings
from mnist_dist.distributed.logical_shards import LogicalShards
from mnist_dist.distributed.sync_batchnorm import synchronize_batch_norm
from mnist_dist.engine.cuda_graph import STEPS_PER_REPLAY, CapturedStep, capture_obstacle
from mnist_dist.engine.distillation import Distillation
from mnist_dist.engine.ema import MovingAverage
from mnist_dist.engine.metrics import Meter
from mnist_dist.engine.micro_batch_size import find_micro_batch_size
from mnist_dist.engine.optimizers import build_optimizer, fill_momentum
from mnist_dist.engine.precision import PRECISION_NAMES
from mnist_dist.engine.schedules import Schedule, build_schedule, set_rates
from mnist_dist.engine.train_step import StepSettings, TrainedNetwork, TrainStep
from mnist_dist.errors import Kind, Problem, RecipeError
from mnist_dist.recipe.schema import Recipe
from mnist_dist.run.components import TrainingComponents
from mnist_dist.run.kernels import set_determinism, set_kernels
from mnist_dist.run.model_trial import to_device
from mnist_dist.run.reader import Run

# --- the world ----------------------------------------------------------------------------------------------------


def check_world(recipe: Recipe, state: PartialState) -> str:
    """Returns the precision to train in, "no", "bf16" or "fp16".

    Raises:
        RecipeError: this device, launcher or number of processes cannot train the recipe.
    """
    check_engine()
    precision = recipe.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    _check_fsdp(recipe, precision, state)
    problem = recipe.problem if recipe.mixed_precision else partial(Problem, "the launcher")
    if precision not in PRECISION_NAMES:
        message = f"{precision} is not supported; use {', '.join(PRECISION_NAMES)}"
        raise RecipeError([problem("mixed_precision", message, "unsupported")])
    if not supports_precision(state.device, precision):
        message = "fp16 needs a GPU; on a CPU use bf16 or no"
        if precision == "bf16":
            message = f"{device_name(state.device)} cannot compute in bf16; use fp16 or no"
        raise RecipeError([problem("mixed_precision", message, "unsupported")])
    if recipe.batch_size < state.num_processes:
        message = f"a global batch of {recipe.batch_size} has too few samples for {state.num_processes} processes"
        raise RecipeError([recipe.problem("batch_size", message, "unsupported")])
    if recipe.logical_shards and recipe.logical_shards < state.num_processes:
        message = f"{recipe.logical_shards} shards are too few for {state.num_processes} processes"
        raise RecipeError([recipe.problem("logical_shards", message, "unsupported")])
    return precision


NEEDS_UNSHARDED_PARAMETERS = ("ema_decay", "logical_shards", "sync_batchnorm", "micro_batch_size")
"""Keys of features that need unsharded parameters on every process. Their defaults switch the feature off."""


def _check_fsdp(recipe: Recipe, precision: str, state: PartialState) -> None:
    if not _uses_fsdp(state.num_processes):
        return
    message = "does not work with FSDP; remove it, or launch without FSDP (launch/accelerate/multi_gpu.yaml)"
    default = {key: field.default for key, field in type(recipe).model_fields.items()}
    chosen = [key for key in NEEDS_UNSHARDED_PARAMETERS if getattr(recipe, key) != default[key]]
    problems = [recipe.problem(key, message, "unsupported") for key in chosen]
    if precision == "fp16":
        problems.append(recipe.problem("mixed_precision", f"fp16 {message}; or use bf16", "unsupported"))
    if problems:
        raise RecipeError(problems)


def _uses_fsdp(world_size: int) -> bool:
    """Returns whether the launcher asks for FSDP and there are several processes to shard over."""
    return asks_for_fsdp() and world_size > 1


# --- the components -----------------------------------------------------------------------------------------------


def check_fit(recipe: Recipe, data: Images) -> None:
    """Compares the values that depend on the images with the training images.

    Raises:
        RecipeError: the augmentation does not fit their shape, or there is not one weight for each class.
    """
    misfits = recipe.data.augment.build().misfits(data.shape)
    problems = [recipe.problem(f"data.augment.{key}", message, "conflict") for key, message in misfits]
    weights, classes = recipe.data.class_weights, data.classes
    if not isinstance(weights, str) and len(weights) != len(classes):
        names = f"one for each class ({', '.join(classes)[:80]})"
        message = f"expected {len(classes)} weights, {names}, got {len(weights)}"
        problems.append(recipe.problem("data.class_weights", message, "conflict"))
    if problems:
        raise RecipeError(problems)


def build_components(
    recipe: Recipe,
    precision: str,
    train_data: Images,
    module: nn.Module,
    teachers: Sequence[Run] = (),
    accelerator: Accelerator | None = None,
) -> TrainingComponents:
    """Builds everything that the training loop uses, on the device. Collective: call on every rank.

    Args:
        precision: as `check_world` returns it.
        module: the network with its initial weights, as `prepare_model` returns it.
        teachers: runs whose networks the distillation learns from.
        accelerator: None for one that follows recipe and launcher.
    """
    set_determinism(recipe.deterministic)
    set_kernels(recipe)
    accelerator = accelerator or _build_accelerator(recipe, precision)
    device = accelerator.device
    check_fit(recipe, train_data)
    augmentation = recipe.data.augment.build()
    batches = Batches(len(train_data), recipe.batch_size, recipe.seed, train_data.shape, augmentation)
    total_steps = min(recipe.epochs * batches.steps_per_epoch, recipe.max_steps or sys.maxsize)
    schedule = build_schedule(
        recipe.schedule.name,
        lr=recipe.optimizer.lr,
        steps_per_epoch=batches.steps_per_epoch,
        total_steps=total_steps,
        **recipe.schedule.keywords,
    )
    clock = GradientClock()
    meter = Meter(accelerator, clock)
    network = _build_network(recipe, accelerator, module, schedule, clock)
    stored, place, placement = run_on_all_ranks(PartialState(), lambda: _place(recipe, train_data, device))
    step = TrainStep(
        accelerator,
        network,
        batches,
        stored,
        meter,
        _step_settings(recipe, train_data),
        ahead=place != "device",
        clock=clock,
        distillation=_build_distillation(recipe, accelerator, train_data, teachers),
    )
    if recipe.micro_batch_size == "auto":
        step.micro_batch_size = find_micro_batch_size(step, batches.plan(0))
        if not step.micro_batch_size:
            message = f"not one image at once fits into the memory of every rank ({device_name(device)})"
            raise RecipeError([recipe.problem("micro_batch_size", message, "unsupported")])
    update, obstacles = _capture(recipe, step, schedule)
    eval_model = network.average.module if network.average else network.module
    notes = placement + _notes(recipe, step) + obstacles
    return TrainingComponents(
        accelerator, batches, schedule, update, network.module, eval_model, meter, place, total_steps, notes
    )


def _place(recipe: Recipe, data: Images, device: torch.device) -> tuple[Images, Place, list[str]]:
    """Returns the images in the place that the recipe asks for, the place, and a note if it is not the usual one.

    Raises:
        RecipeError: the images do not fit there.
    """
    wanted = recipe.data.place
    processes = count_local_processes(PartialState().num_processes)
    place, reason = choose_place(data.images, device, processes) if wanted == "auto" else (wanted, "")
    try:
        stored = place_images(data, place, device)
    except (OSError, MemoryError, torch.OutOfMemoryError) as error:
        message = f"the {describe_bytes(data.images.numel())} of images do not fit there: {error}"
        kind: Kind = "unwritable" if isinstance(error, OSError) else "unsupported"
        raise RecipeError([recipe.problem("data.place", message, kind)]) from error
    usual = wanted in ("auto", "device") and place == "device"
    return stored, place, [] if usual else [describe_place(place, data.images, reason)]


def _build_accelerator(recipe: Recipe, precision: str) -> Accelerator:
    AcceleratorState._reset_state()  # a notebook may train twice, with two precisions
    # Accumulation and compilation are passed explicitly, because the launcher's environment variables must not override
    # the recipe. FSDP is switched off here, because `shard_parameters` does the sharding: Accelerate supports FSDP on
    # GPUs only, and the checkpoints must be the same with and without it.
    with patch_environment(ACCELERATE_USE_FSDP="false"):
        return Accelerator(
            mixed_precision=precision,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            dynamo_backend="no",
        )


def _build_network(
    recipe: Recipe, accelerator: Accelerator, module: nn.Module, schedule: Schedule, clock: GradientClock
) -> TrainedNetwork:
    """Moves the network to the device and adds its optimizer, averaged weights and reduction of gradients."""
    module = _distribute_module(recipe, accelerator, module)
    average = None if recipe.ema_decay is None else MovingAverage(module, recipe.ema_decay)
    optimizer = build_optimizer(module, recipe.optimizer.name, lr=schedule.lr_at(0), **recipe.optimizer.keywords)
    set_rates(optimizer, schedule, 0)  # the schedule may also set the momentum
    fill_momentum(optimizer)
    if recipe.compile:  # at the first call; parameter names do not change
        module.compile(mode=None if recipe.compile is True else recipe.compile)
    accelerator.prepare_model(module, evaluation_mode=True)  # adds autocast in place, no DistributedDataParallel
    if accelerator.scaler is not None:
        optimizer = accelerator.prepare(optimizer)  # without a scaler the wrapper only costs time
    shards = LogicalShards(recipe.logical_shards, accelerator, module, clock) if recipe.logical_shards else None
    synchronizes = _synchronizes_batch_norm(recipe, accelerator)
    reduction = _build_reduction(recipe, accelerator, module, clock)
    return TrainedNetwork(module, optimizer, average, reduction, shards, communicates_in_forward=synchronizes)


def _distribute_module(recipe: Recipe, accelerator: Accelerator, module: nn.Module) -> nn.Module:
    """Moves the network to the device; synchronizes its batch norm and shards its parameters if that is asked for."""
    sharded = _uses_fsdp(accelerator.num_processes)
    # FSDP2 shards contiguous parameters only.
    to_device(module, accelerator.device, channels_last=recipe.engine.channels_last and not sharded)
    if _synchronizes_batch_norm(recipe, accelerator):
        module = synchronize_batch_norm(module, accelerator.device)
    if sharded:
        shard_parameters(module, accelerator.device, **fsdp_settings())
    return module


def _synchronizes_batch_norm(recipe: Recipe, accelerator: Accelerator) -> bool:
    return recipe.sync_batchnorm and accelerator.num_processes > 1


def _build_reduction(
    recipe: Recipe, accelerator: Accelerator, module: nn.Module, clock: GradientClock
) -> FlatGradients | None:
    """Returns the reduction of gradients; None if there is one process, or FSDP2 or logical shards reduce them."""
    if accelerator.num_processes == 1 or _uses_fsdp(accelerator.num_processes) or recipe.logical_shards is not None:
        return None
    return FlatGradients(module, recipe.ddp.comm_hook, recipe.ddp.find_unused_parameters, clock)


def _step_settings(recipe: Recipe, data: Images) -> StepSettings:
    return StepSettings(
        class_weights=class_weights(recipe, data),
        clip_grad_norm=recipe.clip_grad_norm,
        label_smoothing=recipe.label_smoothing,
        micro_batch_size=None if recipe.micro_batch_size == "auto" else recipe.micro_batch_size,
        on_nonfinite=recipe.on_nonfinite,
    )


def class_weights(recipe: Recipe, data: Images) -> tuple[float, ...] | None:
    """Returns the weight of each class, scaled to the mean 1 over the training images; None for equal weights."""
    wanted, classes = recipe.data.class_weights, len(data.classes)
    if wanted == "none":
        return None
    balanced = balanced_weights(data.labels, classes)
    if isinstance(wanted, str):
        return balanced
    mean = float(torch.tensor(wanted, dtype=torch.float64)[data.labels.cpu()].mean())
    return tuple(each / mean for each in wanted)


def _build_distillation(
    recipe: Recipe, accelerator: Accelerator, data: Images, teachers: Sequence[Run]
) -> Distillation | None:
    if not teachers:
        return None
    for teacher in teachers:
        # A teacher that did not run in channels-last layout when it was trained does not run in it now.
        channels_last = recipe.engine.channels_last and teacher.recipe.engine.channels_last
        to_device(teacher.model, accelerator.device, channels_last=channels_last)
    return Distillation(
        [(teacher.model, teacher.about["mean"], teacher.about["std"]) for teacher in teachers],
        weight=recipe.distill.weight,
        temperature=recipe.distill.temperature,
        mean=data.mean,
        std=data.std,
        autocast=accelerator.autocast,
    )


def _capture(recipe: Recipe, step: TrainStep, schedule: Schedule) -> tuple[TrainStep | CapturedStep, list[str]]:
    """Returns the step, captured if the recipe asks for it and it is possible; else a note for users who expect it."""
    if recipe.engine.capture == "off":
        return step, []
    device = step.accelerator.device
    obstacle = capture_obstacle(
        device,
        step.optimizer,
        moves_momentum=schedule.momentum_at is not None,
        scaler=step.accelerator.scaler is not None,
        shards=recipe.logical_shards is not None,
        fsdp=_uses_fsdp(step.accelerator.num_processes),
        allows_unused=step.reduction is not None and step.reduction.allows_unused,
        compile_mode=recipe.compile,
    )
    if obstacle is None:
        return CapturedStep(step, STEPS_PER_REPLAY if recipe.engine.capture == "epoch" else 1), []
    expected = recipe.engine.capture != "auto" or device.type == "cuda"
    return step, [f"engine.capture: all steps run eagerly: {obstacle}"] if expected else []


def _notes(recipe: Recipe, step: TrainStep) -> list[str]:
    """Returns what the user should know about how the recipe was built."""
    notes = []
    if reason := unused_gpu(step.accelerator.device):
        notes.append(f"this machine has an NVIDIA GPU, but the run uses the CPU: {reason}")
    if recipe.mixed_precision == "bf16" and emulates_bf16(step.accelerator.device):
        notes.append(
            "bf16 is emulated: this CPU has no instructions for it, so a step takes several times as long as in fp32. "
            "If you need not compare with bf16 runs, add mixed_precision=no"
        )
    if _uses_fsdp(step.accelerator.num_processes):
        notes.append("FSDP2: parameters, gradients and optimizer state are sharded over the processes")
    if recipe.ddp.comm_hook != "none" and step.reduction is None:
        notes.append("ddp.comm_hook has no effect: this run does not send gradients, or sends them in another way")
    if recipe.micro_batch_size == "auto":
        notes.append(f"micro_batch_size auto: {step.micro_batch_size} images at once fit into memory")
    return notes
