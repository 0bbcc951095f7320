"""Building the network of a recipe, and trying it before training."""

from __future__ import annotations

import fnmatch

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mnist_dist.data import Dataset, Images, derive_seed
from mnist_dist.engine.optimizers import build_optimizer
from mnist_dist.engine.train_step import count_pieces
from mnist_dist.errors import RecipeError
from mnist_dist.models import build_model
from mnist_dist.recipe.checks import check_freeze
from mnist_dist.recipe.schema import Recipe


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


def to_device(module: nn.Module, device: torch.device, *, channels_last: bool) -> nn.Module:
    """Moves a network to the device, in a memory layout; returns it."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return module.to(device, memory_format=layout)  # type: ignore[call-overload]  # torch types it for tensors only
