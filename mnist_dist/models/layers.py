"""What several networks share: dropout that is fast on a CPU, and a check of constructor arguments."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HIGHEST_SPARSE_RATE = 0.2
"""Highest dropout rate for which the gaps between zeros are drawn; above it one draw per element is faster."""


def require_positive(**sizes: int) -> None:
    """Raises ValueError with the name of the argument unless every size is at least 1."""
    for keyword, size in sizes.items():
        if size < 1:
            raise ValueError(f"{keyword} must be at least 1, not {size}")


def sides_after(image_size: tuple[int, int], reduce: Callable[[int], int]) -> tuple[int, int]:
    """Returns height and width of what a network's layers leave of an image.

    Args:
        image_size: height and width of the image.
        reduce: the side of the image -> the side after the layers.

    Raises:
        ValueError: nothing is left.
    """
    height, width = image_size
    left = reduce(height), reduce(width)
    if min(left) < 1:
        raise ValueError(f"an image of {height}×{width} pixels is too small for this network")
    return left


class Dropout(nn.Module):
    """Zeroes each element with probability `p` and divides the others by 1 - p, like `nn.Dropout` but faster on a CPU.

    `nn.Dropout` draws one random number per element. This layer draws only the gaps between zeros, which have a
    geometric distribution: about n × p numbers for n elements. Forward and backward pass of model_v1 (fp32, batch 128,
    p = 0.01, one thread of an AMD EPYC) took 55 ms with `nn.Dropout`, 37 ms with this layer and 30 ms without dropout.

    The gaps are drawn on a CPU for p up to `HIGHEST_SPARSE_RATE`; otherwise the layer calls `F.dropout`. The output has
    the dtype, shape and memory format of the input; a memory format other than contiguous and channels-last becomes
    contiguous. Random numbers come from torch's global generator.

    Args:
        p: probability of a zero, at least 0 and below 1; 0 makes the layer an identity.

    Raises:
        ValueError: p is out of range.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {p}")
        self.p = p

    def forward(self, values: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return values
        if values.device.type != "cpu" or self.p > HIGHEST_SPARSE_RATE:
            return F.dropout(values, self.p)
        memory_format = memory_format_of(values)
        if torch.compiler.is_compiling():  # a compiler cannot trace positions whose number is random
            return sparse_dropout(values, self.p, memory_format == torch.channels_last)[0]
        positions = draw_bernoulli_positions(values.numel(), self.p)
        return ZeroAndScale.apply(values, positions, 1 / (1 - self.p), memory_format)

    def extra_repr(self) -> str:
        return f"p={self.p}"


def draw_bernoulli_positions(count: int, p: float) -> Tensor:
    """Returns the positions at which `count` independent trials of probability `p` succeed.

    The distribution is exact: the number of trials up to the next success has a geometric distribution, and so has one
    plus the floor of an exponential random number.

    Returns:
        int64, ascending, each below `count`.
    """
    draws, last = bound_zeros(count, p), -1.0
    rounds = []
    while last < count:
        # float64 holds every whole number up to 2**53, so the running sum is exact.
        gaps = torch.empty(draws, dtype=torch.float64, device="cpu").exponential_(-math.log1p(-p)).floor_().add_(1)
        rounds.append(gaps.cumsum(0).add_(last))
        last = float(rounds[-1][-1])
    positions = torch.cat(rounds)
    return positions[positions < count].to(torch.int64)


def bound_zeros(count: int, p: float) -> int:
    """Returns a bound of the number of successes in `count` trials, exceeded about once in 10¹⁴ times (8 sigma)."""
    return int(count * p + 8 * math.sqrt(count * p) + 16)


def zero_and_scale(values: Tensor, positions: Tensor, scale: float, memory_format: torch.memory_format) -> Tensor:
    """Returns a new tensor of `values` times `scale`, with zeros at `positions`.

    Args:
        positions: int64, counted in the order of the elements in memory.
        memory_format: of the new tensor.
    """
    scaled = values.contiguous(memory_format=memory_format) * scale
    scaled.as_strided((scaled.numel(),), (1,)).index_fill_(0, positions, 0)
    return scaled


class ZeroAndScale(torch.autograd.Function):
    """`zero_and_scale` with its gradient. Saves the positions for the backward pass, not a mask of all elements."""

    @staticmethod
    def forward(
        context: Any, values: Tensor, positions: Tensor, scale: float, memory_format: torch.memory_format
    ) -> Tensor:
        context.save_for_backward(positions)
        context.scale, context.memory_format = scale, memory_format
        return zero_and_scale(values, positions, scale, memory_format)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Any:
        # The gradient may have another memory format, but the positions refer to that of the forward pass.
        (positions,) = context.saved_tensors
        return ZeroAndScale.apply(gradients[0], positions, context.scale, context.memory_format), None, None, None


# --- for torch.compile --------------------------------------------------------------------------------------------

# Custom operations, which the compiler calls without tracing them, so that compiled and eager networks drop the same
# elements. Compiled `F.dropout` draws one number per element: model_v1 took 71 ms a step with it, 30 ms with this one
# and 34 ms eager (fp32, batch 128, one thread).


@torch.library.custom_op("mnist_dist::sparse_dropout", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def sparse_dropout(values: Tensor, p: float, channels_last: bool) -> tuple[Tensor, Tensor]:
    """Applies dropout at rate `p`.

    Returns:
        The result, and the positions of its zeros as in `zero_and_scale`: int64 (bound_zeros(n, p),), filled up with
        -1, because a compiler needs sizes that do not depend on random numbers.
    """
    positions = values.new_full((bound_zeros(values.numel(), p),), -1, dtype=torch.int64)
    drawn = draw_bernoulli_positions(values.numel(), p)[: len(positions)]
    positions[: len(drawn)] = drawn
    return zero_and_scale(values, drawn, 1 / (1 - p), _memory_format(channels_last)), positions


@sparse_dropout.register_fake
def _(values: Tensor, p: float, channels_last: bool) -> tuple[Tensor, Tensor]:
    positions = values.new_empty((bound_zeros(values.numel(), p),), dtype=torch.int64)
    return torch.empty_like(values, memory_format=_memory_format(channels_last)), positions


@torch.library.custom_op("mnist_dist::sparse_dropout_backward", mutates_args=())
def sparse_dropout_backward(gradient: Tensor, positions: Tensor, p: float, channels_last: bool) -> Tensor:
    """Returns the gradient of `sparse_dropout`'s input."""
    return zero_and_scale(gradient, positions[positions >= 0], 1 / (1 - p), _memory_format(channels_last))


@sparse_dropout_backward.register_fake
def _(gradient: Tensor, positions: Tensor, p: float, channels_last: bool) -> Tensor:
    return torch.empty_like(gradient, memory_format=_memory_format(channels_last))


def _keep_positions(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:  # torch's names
    _, ctx.p, ctx.channels_last = inputs
    ctx.save_for_backward(output[1])


def _drop_gradient(context: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
    (positions,) = context.saved_tensors
    return sparse_dropout_backward(gradient, positions, context.p, context.channels_last), None, None


sparse_dropout.register_autograd(_drop_gradient, setup_context=_keep_positions)


def _memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def memory_format_of(values: Tensor) -> torch.memory_format:
    """Returns channels-last for a 4-D tensor that is channels-last only, else contiguous."""
    if values.dim() == 4 and not values.is_contiguous() and values.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format
