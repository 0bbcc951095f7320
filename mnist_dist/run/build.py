"""From a recipe to the components of a run, on every process of the world that the launcher made.

The order is: check the world, read the data, build the network, prepare everything. What the user can put right is
found on the way, by all processes together, before anything is trained or written.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from functools import partial

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin, patch_environment
from torch import nn

from mnist_dist.data import Batches, Dataset, Images, load_dataset
from mnist_dist.distributed.collectives import run_on_all_ranks
from mnist_dist.distributed.fsdp import shard_parameters
from mnist_dist.distributed.gradients import GradientClock, reduce_gradients
from mnist_dist.distributed.launcher import asks_for_fsdp, check_engine, fsdp_settings
from mnist_dist.distributed.logical_shards import LogicalShards
from mnist_dist.distributed.sync_batchnorm import synchronize_batch_norm
from mnist_dist.engine.cuda_graph import STEPS_A_REPLAY, CapturedStep, capture_obstacle, compile_network
from mnist_dist.engine.distillation import Distillation
from mnist_dist.engine.ema import MovingAverage
from mnist_dist.engine.metrics import Meter
from mnist_dist.engine.optimizers import build_optimizer, fill_momentum
from mnist_dist.engine.schedules import Schedule, build_schedule, set_rates
from mnist_dist.engine.train_step import Update
from mnist_dist.errors import Problem, RecipeError
from mnist_dist.recipe.schema import Recipe
from mnist_dist.run.components import TrainingComponents
from mnist_dist.run.model_setup import to_device
from mnist_dist.run.reader import Run


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
