"""Builds the network of a recipe and tries it on images before training."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from mnist_dist.data import Dataset, Images, derive_seed, describe_shape
from mnist_dist.distributed.launcher import asks_for_fsdp
from mnist_dist.engine.shares import count_micro_batches, largest_share
from mnist_dist.errors import RecipeError
from mnist_dist.models import build_model
from mnist_dist.recipe.checks import check_freeze
from mnist_dist.recipe.schema import Recipe
from mnist_dist.run.model_trial import (
    Trial,
    TrialError,
    copy_of,
    keep_random_state,
    micro_batch_effects,
    try_network,
)
from mnist_dist.run.text_output import listed


@dataclass(frozen=True)
class PreparedModel:
    """A network that can be trained, and what its trial has found."""

    module: nn.Module
    """The network with initial weights, in training mode, on the CPU."""
    recipe: Recipe
    """The recipe, with `engine.channels_last` false if the network cannot train in that layout."""
    notes: list[str]
    """Notes for the user on what the trial found."""


def build_module(recipe: Recipe, dataset: Dataset, world_size: int = 1) -> nn.Module:
    """Returns the network that `prepare_model` builds and tries on the CPU."""
    return prepare_model(recipe, dataset, world_size).module


def prepare_model(
    recipe: Recipe, dataset: Dataset, world_size: int = 1, device: torch.device | None = None
) -> PreparedModel:
    """Builds the recipe's network with initial weights from the seed, freezes parameters, and tries it on images.

    The optimizer does not get the frozen parameters, so nothing changes them, not even weight decay. A batch norm whose
    parameters are all frozen stays in eval mode: it normalises with its running statistics and does not update them, so
    a frozen part of the network computes the same function throughout training.

    Args:
        world_size: number of processes.
        device: the device that the run trains on; None for the CPU.

    Raises:
        RecipeError: the network cannot be built, does not map (N, C, H, W) to (N, classes), cannot be trained by the
            optimizer in the recipe's precision, does not use all its parameters although data parallel needs that, or
            cannot train on a single image although a micro-batch of this run has only one.
    """
    device = device or torch.device("cpu")
    module, output = _build(recipe, dataset, device)
    _freeze(recipe, module.train())
    sharded = asks_for_fsdp() and world_size > 1
    # Sharded parameters and logical shards reduce their gradients themselves, and tolerate a missing one.
    reduces = world_size > 1 and not sharded and recipe.logical_shards is None
    every_parameter = reduces and not recipe.ddp.find_unused_parameters
    try:
        trial = try_network(recipe, module, dataset.train, device, sharded=sharded, every_parameter=every_parameter)
    except TrialError as error:
        raise RecipeError([recipe.problem(error.key, str(error), "model")]) from error
    if trial.without_gradient and every_parameter:
        message = (
            f"{recipe.model.name} does not use all its parameters in every step; no gradient for "
            f"{listed(trial.without_gradient)}\nwith {world_size} processes, set ddp.find_unused_parameters=true, or "
            "remove these parameters"
        )
        raise RecipeError([recipe.problem("ddp.find_unused_parameters", message, "conflict")])
    _check_single_image(recipe, module, dataset.train, world_size)
    notes = _notes(recipe, trial, output) + _micro_batch_notes(recipe, module, dataset.train, world_size)
    if trial.layout_failure:
        engine = recipe.engine.model_copy(update={"channels_last": False})
        recipe = recipe.model_copy(update={"engine": engine})
    return PreparedModel(module, recipe, notes)


def _build(recipe: Recipe, dataset: Dataset, device: torch.device) -> tuple[nn.Module, torch.Tensor]:
    """Builds the network and evaluates it on two images. Returns the network and its outputs."""
    classes, name = len(dataset.train.classes), recipe.model.name
    torch.manual_seed(derive_seed(recipe.seed))
    dtype = torch.get_default_dtype()
    try:
        module = build_model(
            name,
            num_classes=classes,
            in_channels=dataset.train.shape[0],
            image_size=dataset.train.shape[1:],
            pretrained=recipe.model.pretrained,
            **recipe.model.keywords,
        )
        names = set(module.state_dict())
        before = [(buffer, buffer.clone()) for buffer in module.buffers() if not is_lazy(buffer)]
        with keep_random_state(device), torch.no_grad():
            output = module.eval()(dataset.train.normalize(dataset.train.images[:2]))
            for buffer, value in before:
                buffer.copy_(value)
    except (Exception, SystemExit) as error:  # a user's own class may fail in any way
        message = f"{name} cannot be built for images of {describe_shape(dataset.train.shape)}: "
        message += f"{type(error).__name__}: {error}"
        raise RecipeError([recipe.problem("model.name", message, "model")]) from error
    finally:
        torch.set_default_dtype(dtype)  # a user's own class may set it for the process, and the images are float32
    if new := sorted(module.state_dict().keys() - names):
        message = (
            f"{name} creates {listed(new)} in its first forward pass, so its weights could not be loaded again\n"
            "create these layers in __init__; lazy layers such as nn.LazyLinear take their size from the first images"
        )
        raise RecipeError([recipe.problem("model.name", message, "model")])
    if not isinstance(output, torch.Tensor) or output.shape[1:] != (classes,):
        found = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        message = f"{name} gives {found} for two images; expected (2, {classes})"
        if not isinstance(output, torch.Tensor):
            message += ", or a mapping or an object with such `logits` and without auxiliary outputs (aux…)"
        raise RecipeError([recipe.problem("model.name", message, "model")])
    return module, output


def _are_probabilities(output: torch.Tensor) -> bool:
    """Returns whether each row is positive and sums to 1, as after a softmax."""
    return bool((output >= 0).all()) and torch.allclose(output.sum(dim=1), torch.ones(len(output)), atol=1e-4)


def _notes(recipe: Recipe, trial: Trial, output: torch.Tensor) -> list[str]:
    """Returns what the user should know about the network: one note for each finding."""
    notes, name = [], recipe.model.name
    if trial.layout_failure:
        notes.append(
            f"engine.channels_last: {name} cannot train in this layout and trains in the contiguous one: "
            f"{trial.layout_failure}"
        )
    if trial.without_gradient:
        notes.append(f"{name}: no gradient for {listed(trial.without_gradient)}; these parameters do not train")
    if _are_probabilities(output.float()):
        notes.append(f"{name}: the outputs are probabilities, but the loss expects logits; remove the softmax")
    if trial.blind_region:
        notes.append(f"{name}: part of the image cannot change the output: {trial.blind_region}")
    return notes


def _micro_batch_notes(recipe: Recipe, module: nn.Module, data: Images, world_size: int) -> list[str]:
    """Returns a note if the run splits its batches into micro-batches and that changes the result."""
    size, share = recipe.micro_batch_size, largest_share(recipe.batch_size, recipe.logical_shards or world_size)
    # Whether `auto` splits the batches depends on the memory, which is not known here.
    if size is None or (isinstance(size, int) and count_micro_batches(share, size) == 1):
        return []
    try:
        effects = micro_batch_effects(module, data)
    except Exception:  # e.g. a network without a gradient for its input; it can be trained nevertheless
        return []
    if not effects:
        return []
    return [f"micro_batch_size: the result depends on it, because {recipe.model.name} {' and '.join(effects)}"]


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


def _check_single_image(recipe: Recipe, module: nn.Module, data: Images, world_size: int) -> None:
    """Runs the network in training mode on one image if a micro-batch of this run has only one.

    Raises:
        RecipeError: the network, which can be trained on two images, cannot be trained on one.
    """
    size, key = _smallest_micro_batch(recipe, len(data), world_size)
    if size != 1:
        return
    try:
        with keep_random_state(torch.device("cpu")), copy_of(module) as copied, torch.no_grad():
            copied(data.normalize(data.images[:1]))
    except (Exception, SystemExit) as error:  # a user's own class may fail in any way
        name, value = recipe.model.name, getattr(recipe, key)
        message = f"{value} gives a process a single image, and {name} cannot be trained on one: {error}"
        raise RecipeError([recipe.problem(key, message, "model")]) from error


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
            # Each logical shard chooses its number of micro-batches. Processes agree on that of the largest share.
            sized = share if recipe.logical_shards else largest
            count = min(count_micro_batches(sized, micro if isinstance(micro, int) else None), share)
            key = "micro_batch_size" if count > 1 else "logical_shards" if recipe.logical_shards else "batch_size"
            keys.setdefault(share // count, key)
    return min(keys.items())
