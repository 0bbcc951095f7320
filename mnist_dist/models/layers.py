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
        # A compiler cannot trace a draw whose size depends on the numbers drawn.
        if values.device.type != "cpu" or self.p > HIGHEST_SPARSE_RATE or torch.compiler.is_compiling():
            return F.dropout(values, self.p)
        positions = draw_bernoulli_positions(values.numel(), self.p)
        return ZeroAndScale.apply(values, positions, 1 / (1 - self.p), memory_format_of(values))

    def extra_repr(self) -> str:
        return f"p={self.p}"


def draw_bernoulli_positions(count: int, p: float) -> Tensor:
    """Where `count` independent trials of probability `p` succeed: int64, ascending, each below `count`.

    Exact: the number of trials up to the next success is geometric, and the floor of an exponential is.
    """
    expected = count * p
    draws = int(expected + 8 * math.sqrt(expected) + 16)  # eight standard deviations: a second round is for exactness
    last = -1.0
    rounds = []
    while last < count:
        # float64 holds every whole number up to 2**53, so the running sum is exact.
        gaps = torch.empty(draws, dtype=torch.float64, device="cpu").exponential_(-math.log1p(-p)).floor_().add_(1)
        rounds.append(gaps.cumsum(0).add_(last))
        last = float(rounds[-1][-1])
    positions = torch.cat(rounds)
    return positions[positions < count].to(torch.int64)


class ZeroAndScale(torch.autograd.Function):
    """Multiplies by `scale`, then zeroes the elements at `positions` of the storage; the gradient likewise.

    Keeps for the backward pass the positions alone, not a mask of the activation's size.
    """

    @staticmethod
    def forward(
        context: Any, values: Tensor, positions: Tensor, scale: float, memory_format: torch.memory_format
    ) -> Tensor:
        context.save_for_backward(positions)
        context.scale, context.memory_format = scale, memory_format
        scaled = values.contiguous(memory_format=memory_format) * scale
        scaled.as_strided((scaled.numel(),), (1,)).index_fill_(0, positions, 0)
        return scaled

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Any:
        # A gradient may arrive in another memory format; positions mean the same elements only in the forward's.
        (positions,) = context.saved_tensors
        return ZeroAndScale.apply(gradients[0], positions, context.scale, context.memory_format), None, None, None


def memory_format_of(values: Tensor) -> torch.memory_format:
    if values.dim() == 4 and not values.is_contiguous() and values.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format
