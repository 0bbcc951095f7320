"""What several networks share: dropout that is cheap on a CPU, and the checks of constructor arguments."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Above this rate so many elements are dropped that one draw per element is the cheaper way.
HIGHEST_SPARSE_RATE = 0.2


def require_positive(**sizes: int) -> None:
    """Raises ValueError, naming the keyword, unless every size is at least 1."""
    for keyword, size in sizes.items():
        if size < 1:
            raise ValueError(f"{keyword} must be at least 1, not {size}")


class Dropout(nn.Module):
    """Zeroes each element with probability `p` and divides the others by 1 - p: the distribution of `nn.Dropout`.

    `nn.Dropout` draws one number per element, on one thread of a CPU: a third of a training step of the small networks
    here. This one draws only the gaps between zeros, which are geometric, so it takes about n × p draws. It does so on
    a CPU for p up to 0.2, and is `F.dropout` elsewhere. Any floating dtype, shape and memory format, which the output
    keeps (dense and 4-D channels-last; others become contiguous). Random numbers come from torch's global generator.

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
        if torch.compiler.is_compiling():  # which cannot look into a draw whose size depends on the numbers drawn
            return sparse_dropout(values, self.p, memory_format == torch.channels_last)[0]
        positions = draw_bernoulli_positions(values.numel(), self.p)
        return ZeroAndScale.apply(values, positions, 1 / (1 - self.p), memory_format)

    def extra_repr(self) -> str:
        return f"p={self.p}"


def draw_bernoulli_positions(count: int, p: float) -> Tensor:
    """Where `count` independent trials of probability `p` succeed: int64, ascending, each below `count`.

    Exact: the number of trials up to the next success is geometric, and the floor of an exponential is.
    """
    draws, last = most_zeros(count, p), -1.0
    rounds = []
    while last < count:
        # float64 holds every whole number up to 2**53, so the running sum is exact.
        gaps = torch.empty(draws, dtype=torch.float64, device="cpu").exponential_(-math.log1p(-p)).floor_().add_(1)
        rounds.append(gaps.cumsum(0).add_(last))
        last = float(rounds[-1][-1])
    positions = torch.cat(rounds)
    return positions[positions < count].to(torch.int64)


def most_zeros(count: int, p: float) -> int:
    """Eight standard deviations more than are expected of `count` trials: more come once in 10¹⁴ times."""
    return int(count * p + 8 * math.sqrt(count * p) + 16)


def zero_and_scale(values: Tensor, positions: Tensor, scale: float, memory_format: torch.memory_format) -> Tensor:
    """A new tensor of that memory format: `values` times `scale`, and zero at `positions` of the storage."""
    scaled = values.contiguous(memory_format=memory_format) * scale
    scaled.as_strided((scaled.numel(),), (1,)).index_fill_(0, positions, 0)
    return scaled


class ZeroAndScale(torch.autograd.Function):
    """`zero_and_scale`, of the gradient likewise.

    Keeps for the backward pass the positions alone, not a mask of the activation's size.
    """

    @staticmethod
    def forward(
        context: Any, values: Tensor, positions: Tensor, scale: float, memory_format: torch.memory_format
    ) -> Tensor:
        context.save_for_backward(positions)
        context.scale, context.memory_format = scale, memory_format
        return zero_and_scale(values, positions, scale, memory_format)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Any:
        # A gradient may arrive in another memory format; positions mean the same elements only in the forward's.
        (positions,) = context.saved_tensors
        return ZeroAndScale.apply(gradients[0], positions, context.scale, context.memory_format), None, None, None


# The same for a compiler: operations that it calls but does not look into, with the random numbers of the eager ones.


@torch.library.custom_op("mnist_dist::sparse_dropout", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def sparse_dropout(values: Tensor, p: float, channels_last: bool) -> tuple[Tensor, Tensor]:
    """Dropout at rate `p`, and the positions of the zeros, int64, in the storage of that memory format.

    The positions have room for `most_zeros`, as a compiler wants sizes that do not depend on what is drawn; -1 is none.
    """
    positions = values.new_full((most_zeros(values.numel(), p),), -1, dtype=torch.int64)
    drawn = draw_bernoulli_positions(values.numel(), p)[: len(positions)]
    positions[: len(drawn)] = drawn
    return zero_and_scale(values, drawn, 1 / (1 - p), _memory_format(channels_last)), positions


@sparse_dropout.register_fake
def _(values: Tensor, p: float, channels_last: bool) -> tuple[Tensor, Tensor]:
    positions = values.new_empty((most_zeros(values.numel(), p),), dtype=torch.int64)
    return torch.empty_like(values, memory_format=_memory_format(channels_last)), positions


@torch.library.custom_op("mnist_dist::sparse_dropout_backward", mutates_args=())
def sparse_dropout_backward(gradient: Tensor, positions: Tensor, p: float, channels_last: bool) -> Tensor:
    """The gradient of `sparse_dropout`."""
    return zero_and_scale(gradient, positions[positions >= 0], 1 / (1 - p), _memory_format(channels_last))


@sparse_dropout_backward.register_fake
def _(gradient: Tensor, positions: Tensor, p: float, channels_last: bool) -> Tensor:
    return torch.empty_like(gradient, memory_format=_memory_format(channels_last))


def _keep_positions(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:  # torch names them so
    _, ctx.p, ctx.channels_last = inputs
    ctx.save_for_backward(output[1])


def _drop_gradient(context: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
    (positions,) = context.saved_tensors
    return sparse_dropout_backward(gradient, positions, context.p, context.channels_last), None, None


sparse_dropout.register_autograd(_drop_gradient, setup_context=_keep_positions)


def _memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def memory_format_of(values: Tensor) -> torch.memory_format:
    if values.dim() == 4 and not values.is_contiguous() and values.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format
