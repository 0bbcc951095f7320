"""Builds the network of a recipe and tries it on images before training."""

from __future__ import annotations

import fnmatch

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mnist_dist.data import Dataset, Images, derive_seed
from mnist_dist.engine.optimizers import build_optimizer
from mnist_dist.engine.train_step import count_micro_batches
from mnist_dist.errors import RecipeError
from mnist_dist.models import build_model
from mnist_dist.recipe.checks import check_freeze
from mnist_dist.recipe.schema import Recipe


def build_module(recipe: Recipe, dataset: Dataset, world_size: int = 1) -> nn.Module:
    """Builds the recipe's network with initial weights from the seed, freezes parameters, and tries it on images.

    The optimizer does not get the frozen parameters, so nothing changes them, not even weight decay. A batch norm whose
    parameters are all frozen stays in eval mode: it normalises with its running statistics and does not update them, so
    a frozen part of the network computes the same function throughout training.

    Raises:
        RecipeError: the network cannot be built, does not map (N, 1, 28, 28) to (N, classes), cannot be trained by the
            optimizer, or cannot train on a single image although a micro-batch of this run has only one.
    """
    classes, name = len(dataset.train.classes), recipe.model.name
    torch.manual_seed(derive_seed(recipe.seed))
    try:
        module = build_model(name, num_classes=classes, **recipe.model.keywords)
        with torch.no_grad():
            output = module.eval()(dataset.train.normalize(dataset.train.images[:2]))
    except Exception as error:  # a user's own class may fail in any way
        message = f"{name} cannot be built for 28×28 images of one channel: {type(error).__name__}: {error}"
        raise RecipeError([recipe.problem("model.name", message, "model")]) from error
    if not isinstance(output, torch.Tensor) or output.shape[1:] != (classes,):
        found = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        message = f"{name} gives {found} for two images; expected (2, {classes})"
        raise RecipeError([recipe.problem("model.name", message, "model")])
    _freeze(recipe, module.train())
    _check_training(recipe, module, dataset.train, world_size)
    return module


def _freeze(recipe: Recipe, module: nn.Module) -> None:
    """Freezes the parameters that `model.freeze` names.

    Raises:
        RecipeError: the network has no parameters, a pattern matches none of them, or none is left to train.
    """
    parameters = dict(module.named_parameters())
    if not parameters:
        raise RecipeError([recipe.problem("model.name", f"{recipe.model.name} has no parameter to train", "model")])
    problems = [recipe.problem(*finding) for finding in check_freeze(recipe.model.freeze, list(parameters))]
    if problems:
        raise RecipeError(problems)
    for pattern in recipe.model.freeze:
        for frozen in fnmatch.filter(parameters, pattern):
            parameters[frozen].requires_grad_(False)
    for part in module.modules():
        if isinstance(part, _BatchNorm) and part.affine and not any(p.requires_grad for p in part.parameters()):
            part.eval()


def _check_training(recipe: Recipe, module: nn.Module, data: Images, world_size: int) -> None:
    """Builds the optimizer and runs the network in training mode, on one image too if a micro-batch has only one.

    Raises:
        RecipeError: one of them failed.
    """
    name, smallest = recipe.model.name, _smallest_micro_batch(recipe, len(data), world_size)
    key, failure = "optimizer.name", f"{recipe.optimizer.name} cannot train {name}"
    try:
        build_optimizer(
            module.parameters(), recipe.optimizer.name, lr=recipe.optimizer.lr or 0.1, **recipe.optimizer.keywords
        )
        key, failure = "model.name", f"{name} cannot be trained"
        output = _run_in_training_mode(module, data.normalize(data.images[:2]))
        if not isinstance(output, torch.Tensor):
            raise TypeError(f"it returns a tensor in evaluation, but {type(output).__name__} in training")
        if smallest[0] == 1:
            key = smallest[1]
            failure = f"{getattr(recipe, key)} gives a process a single image, and {name} cannot be trained on one"
            _run_in_training_mode(module, data.normalize(data.images[:1]))
    except Exception as error:  # a user's own class may fail in any way
        raise RecipeError([recipe.problem(key, f"{failure}: {error}", "model")]) from error


def _run_in_training_mode(module: nn.Module, images: torch.Tensor) -> object:
    """Returns the network's output in training mode; leaves its buffers as they were."""
    before = [buffer.clone() for buffer in module.buffers()]
    with torch.no_grad():
        output = module(images)
        for buffer, value in zip(module.buffers(), before, strict=True):
            buffer.copy_(value)
    return output


def _smallest_micro_batch(recipe: Recipe, samples: int, world_size: int) -> tuple[int, str]:
    """Returns the smallest number of images in a forward pass of an epoch, and the recipe key that determines it."""
    shares, micro = recipe.logical_shards or world_size, recipe.micro_batch_size
    batches = {min(recipe.batch_size, samples), samples % recipe.batch_size} - {0}
    if recipe.sync_batchnorm and world_size > 1:
        return min(batches), "batch_size"  # batch norm sees the images of all processes
    keys: dict[int, str] = {}
    for size in batches:
        largest = -(-size // shares)
        for share in (max(1, size // shares), largest):
            # The number of micro-batches follows from the logical shard's own size, or from the largest share.
            sized = share if recipe.logical_shards else largest
            count = min(count_micro_batches(sized, micro if isinstance(micro, int) else None), share)
            key = "micro_batch_size" if count > 1 else "logical_shards" if recipe.logical_shards else "batch_size"
            keys.setdefault(share // count, key)
    return min(keys.items())


def to_device(module: nn.Module, device: torch.device, *, channels_last: bool) -> nn.Module:
    """Moves a network to the device, with its convolutions in channels-last layout if asked for; returns it."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return module.to(device, memory_format=layout)  # type: ignore[call-overload]  # torch types it for tensors only
