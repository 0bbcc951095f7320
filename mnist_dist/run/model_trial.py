"""Trains a copy of a network for one step before the run, with the run's layout, precision, device and optimizer."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnist_dist.data import Images
from mnist_dist.engine.optimizers import build_optimizer
from mnist_dist.errors import first_line
from mnist_dist.recipe.schema import Recipe

MORE_PASSES = 8
"""Number of further passes that look for parameters without a gradient. A layer that is called in half of the passes
escapes notice in fewer than 1 of 256 trials."""

BLIND_SHARE = 0.05
"""A note is printed if more than this share of the pixels cannot change the output. The last row and the last column do
not count: strided convolutions often leave them out."""

BLIND_IMAGES = 64
"""Number of random images for which a pixel's gradient must be zero. One image is not enough: max-pooling drops pixels
whose values are not the largest."""


class TrialError(Exception):
    """Raised if the network cannot be trained.

    Attributes:
        key: the recipe key concerned.
    """

    def __init__(self, key: str, message: str):
        super().__init__(message)
        self.key = key


ONEDNN_BLOCK = 16
"""Channels that oneDNN's kernels for AVX-512 compute at once; those for AVX2 compute 8."""


@dataclass(frozen=True)
class Trial:
    """What a trial has found out about a network that can be trained."""

    channels_last: bool
    """Whether the network runs in channels-last layout; False if the recipe does not ask for it."""
    layout_failure: str
    """Why the network does not run in the channels-last layout that the recipe asks for; empty if it does."""
    without_gradient: list[str]
    """Names of trained parameters that received no gradient in at least one pass."""
    blind_region: str
    """The part of the image that cannot change the output; empty if it is small."""


@contextmanager
def keep_random_state(device: torch.device) -> Iterator[None]:
    """Restores the random state of Python, NumPy and PyTorch at the end of the context."""
    python, numpy = random.getstate(), np.random.get_state()
    gpu = device.type not in ("cpu", "meta")
    try:
        with torch.random.fork_rng(devices=[device] if gpu else [], device_type=device.type if gpu else "cuda"):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def try_network(
    recipe: Recipe, module: nn.Module, data: Images, device: torch.device, *, sharded: bool, every_parameter: bool
) -> Trial:
    """Trains a copy of the network for one step on two images. The network and the random state do not change.

    The copy is in channels-last layout if the recipe asks for it, and in contiguous layout if that fails or is unsafe.

    Args:
        module: the network in training mode, on the CPU, with frozen parameters.
        data: the training images.
        device: the device that the run trains on.
        sharded: whether FSDP shards the parameters; their layout is then contiguous.
        every_parameter: whether every parameter must receive a gradient in every step. If so, several passes look for
            parameters that sometimes receive none.

    Raises:
        TrialError: the network cannot be trained.
    """
    with keep_random_state(device):
        wanted = recipe.engine.channels_last and not sharded
        failure = unsafe_layers(module, device) if wanted else ""
        channels_last = wanted and not failure
        if channels_last:
            try:
                missing = _train(recipe, module, data, device, channels_last=True, every_parameter=every_parameter)
            except TrialError as error:
                channels_last, failure = False, first_line(error.__cause__ or error)
        if not channels_last:
            missing = _train(recipe, module, data, device, channels_last=False, every_parameter=every_parameter)
        blind = _blind_region(module, data)
    return Trial(channels_last, failure, missing, blind)


def unsafe_layers(module: nn.Module, device: torch.device) -> str:
    """Returns the layers whose training in channels-last layout would damage memory, and why; empty if there are none.

    Source: https://github.com/uxlfoundation/oneDNN/issues/6035. A backward pass seldom fails visibly: it overwrites the
    memory of other tensors, or the process ends much later.
    """
    if device.type != "cpu":
        return ""
    names = [
        name
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Conv2d)
        and layer.kernel_size == (1, 1)
        and max(layer.stride) > 1
        and layer.in_channels // layer.groups < ONEDNN_BLOCK
    ]
    reason = "in this layout oneDNN writes outside its memory (its issue 6035) in the backward pass of 1×1 convolutions"
    return f"{reason} with a stride and fewer than {ONEDNN_BLOCK} input channels: {', '.join(names)}" if names else ""


def to_device(module: nn.Module, device: torch.device, *, channels_last: bool) -> nn.Module:
    """Moves a network to the device, with its convolutions in channels-last layout if asked for; returns it."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return module.to(device, memory_format=layout)  # type: ignore[call-overload]  # torch types it for tensors only


@contextmanager
def copy_of(module: nn.Module) -> Iterator[nn.Module]:
    """Yields a copy of the network. If it cannot be copied, yields the network itself and restores it at the end."""
    try:
        copied = copy.deepcopy(module)
    except Exception:  # e.g. the network holds a torch.Generator or a lock
        copied = None
    # A copy of a TorchScript module cannot be trained: its parameters are results of `clone`, not leaf tensors.
    if copied is not None and all(each.is_leaf for each in copied.parameters()):
        yield copied
        return
    parameters = [(each, each.requires_grad, each.detach().clone()) for each in module.parameters()]
    parts = list(module.modules())
    modes = [part.training for part in parts]
    buffers = [
        (part, name, each, each.clone()) for part in parts for name, each in part._buffers.items() if each is not None
    ]
    try:
        yield module
    finally:
        for parameter, trained, value in parameters:
            parameter.data, parameter.grad = value, None
            parameter.requires_grad_(trained)
        for part, name, buffer, value in buffers:
            part._buffers[name] = buffer
            buffer.data = value
        for part, mode in zip(parts, modes, strict=True):
            part.training = mode


# --- one step -----------------------------------------------------------------------------------------------------


def _train(
    recipe: Recipe, module: nn.Module, data: Images, device: torch.device, *, channels_last: bool, every_parameter: bool
) -> list[str]:
    """Trains and evaluates a copy of the network; returns the parameters that receive no gradient in some pass."""
    cannot_step = f"{recipe.optimizer.name} cannot train {recipe.model.name}"
    cannot_train = f"{recipe.model.name} cannot be trained"
    if recipe.ema_decay is not None:
        with _refusing("ema_decay", f"averaging weights needs a copy of {recipe.model.name}, which cannot be copied"):
            copy.deepcopy(module)
    with copy_of(module) as copied:
        with _refusing("model.name", cannot_train):
            to_device(copied, device, channels_last=channels_last)
        with _refusing("optimizer.name", cannot_step):
            optimizer = build_optimizer(
                copied, recipe.optimizer.name, lr=recipe.optimizer.lr or 0.1, **recipe.optimizer.keywords
            )
        with _refusing("model.name", cannot_train):
            missing = _backward(recipe, copied, data, device, 0)
            _refuse_sparse_gradients(copied)
        with _refusing("optimizer.name", cannot_step):
            optimizer.step()
        with _refusing("model.name", cannot_train):
            for number in range(1, MORE_PASSES + 1) if every_parameter else ():
                missing |= _backward(recipe, copied, data, device, number)
            with torch.no_grad(), _autocast(recipe, device):
                copied.eval()(data.normalize(data.images[:2].to(device)))
        return [name for name, _ in copied.named_parameters() if name in missing]


@contextmanager
def _refusing(key: str, message: str) -> Iterator[None]:
    """Raises any error inside the context as a TrialError. A user's own class may fail in any way."""
    try:
        yield
    except (Exception, SystemExit) as error:
        raise TrialError(key, f"{message}: {str(error) or type(error).__name__}") from error


def _backward(recipe: Recipe, module: nn.Module, data: Images, device: torch.device, number: int) -> set[str]:
    """Computes the gradient of two images; returns the trained parameters that received none.

    Args:
        number: the number of this pass; each pass has different images and random numbers.
    """
    module.zero_grad()
    first = 2 * number % max(1, len(data) - 1)
    images = data.normalize(data.images[first : first + 2].to(device))
    with _autocast(recipe, device):
        output = module(images)
    if not isinstance(output, Tensor):
        raise TypeError(f"it returns a tensor in evaluation, but {type(output).__name__} in training")
    if output.shape != (len(images), len(data.classes)):
        expected = (len(images), len(data.classes))
        raise ValueError(f"it gives {tuple(output.shape)} for {len(images)} images in training; expected {expected}")
    F.cross_entropy(output.float(), data.labels[first : first + 2].to(device)).backward()
    return {name for name, each in module.named_parameters() if each.requires_grad and each.grad is None}


def _autocast(recipe: Recipe, device: torch.device) -> torch.autocast:
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(recipe.mixed_precision or "no")
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def _refuse_sparse_gradients(module: nn.Module) -> None:
    names = [name for name, each in module.named_parameters() if each.grad is not None and each.grad.is_sparse]
    if names:
        message = f"the gradient of {', '.join(names)} is sparse, and clipping, data parallel and fused optimizers need"
        raise ValueError(f"{message} dense gradients; build the layer with sparse=False")


# --- micro-batches ------------------------------------------------------------------------------------------------


def micro_batch_effects(module: nn.Module, data: Images) -> list[str]:
    """Returns why the number of images in a forward pass of training changes the result; empty if it does not.

    Rounding does not count. The network and the random state do not change.

    Args:
        module: the network in training mode, on the CPU.
    """
    with keep_random_state(torch.device("cpu")), copy_of(module) as copied:
        _fill_zeros(copied)
        images = torch.randn(2, *data.images.shape[1:], requires_grad=True)
        before = torch.get_rng_state()
        output = copied(images)
        draws = not torch.equal(before, torch.get_rng_state())
        (gradient,) = torch.autograd.grad((output[0] * torch.randn_like(output[0])).sum(), images, allow_unused=True)
    effects = ["normalises over the images of a micro-batch (batch norm)"] if gradient[1].any() else []
    return effects + ["draws random numbers for each micro-batch (dropout)"] * draws


# --- the pixels that matter ---------------------------------------------------------------------------------------


def _blind_region(module: nn.Module, data: Images) -> str:
    """Describes the part of the image that cannot change the output of the network in eval mode.

    A pixel belongs to it if the gradient of the outputs is exactly zero there for many random images, and if other
    values there leave the outputs exactly as they are.
    """
    try:
        # On the CPU in float32: a GPU's recurrent layers compute no gradient in eval mode.
        with copy_of(module) as copied:
            copied.to("cpu", torch.float32).eval().requires_grad_(False)
            _fill_zeros(copied)
            blind, count = _zero_gradient(copied, data, 2), 2
            while count < BLIND_IMAGES and _share(blind) > BLIND_SHARE:
                blind, count = blind & _zero_gradient(copied, data, 8), count + 8
            if _share(blind) <= BLIND_SHARE or blind.all():
                return ""
            images = torch.randn(2, *data.images.shape[1:])
            changed = torch.where(blind, 3 * torch.randn_like(images), images)
            with torch.no_grad():
                same = torch.equal(copied(images), copied(changed))
    except Exception:  # e.g. a network without a gradient for its input; it can be trained nevertheless
        return ""
    return describe_region(blind) if same else ""


def _share(blind: Tensor) -> float:
    """Returns the share of True pixels that are neither in the last row nor in the last column."""
    return int(blind[:-1, :-1].sum()) / blind.numel()


def _fill_zeros(module: nn.Module) -> None:
    """Gives small random values to parameters that are all zero: behind them no pixel would have an effect."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.is_floating_point() and not parameter.any():
                parameter.normal_(std=0.02)


def _zero_gradient(module: nn.Module, data: Images, count: int) -> Tensor:
    """Returns where the gradient of the outputs is zero for all of `count` random images: bool (height, width)."""
    images = torch.randn(count, *data.images.shape[1:], requires_grad=True)
    output = module(images)
    (gradient,) = torch.autograd.grad((output * torch.randn_like(output)).sum(), images)
    return (gradient == 0).all(dim=0).all(dim=0)


def describe_region(blind: Tensor) -> str:
    """Returns a description of the True pixels of a mask, with rows and columns counted from 1.

    Args:
        blind: bool (height, width).
    """
    share = f"{100 * blind.float().mean():.0f} % of the pixels"
    rows, columns = (_ranges(blind.all(dim=dim)) for dim in (1, 0))
    parts = [f"rows {rows}"] if rows else []
    parts += [f"columns {columns}"] if columns else []
    inner = blind[~blind.all(dim=1)][:, ~blind.all(dim=0)]
    if inner.any() and parts:
        parts.append("some pixels elsewhere")
    return f"{' and '.join(parts) or 'scattered pixels'} ({share})"


def _ranges(mask: Tensor) -> str:
    """Returns the positions of the True values, counted from 1, as text such as "1, 5 to 8"."""
    positions = (mask.nonzero().flatten() + 1).tolist()
    runs: list[list[int]] = []
    for each in positions:
        if runs and each == runs[-1][-1] + 1:
            runs[-1].append(each)
        else:
            runs.append([each])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)
