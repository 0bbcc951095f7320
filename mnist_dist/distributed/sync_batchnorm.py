"""Batch norm over the global batch, on any device: PyTorch's own SyncBatchNorm is for GPUs alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def synchronize_batch_norm(module: nn.Module, device: torch.device) -> nn.Module:
    """Replaces every batch norm by one over the rows of all processes; parameters, buffers and names stay."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, _BatchNorm):
                setattr(parent, name, SynchronizedBatchNorm.like(child))
    return module


class SynchronizedBatchNorm(_BatchNorm):
    """Batch norm whose mean and variance are those of all processes' rows, however unevenly these are shared.

    (N, C, …) of any floating dtype, in float32 within; the same output as `nn.BatchNorm2d` over the whole batch, up to
    the order of summation. Evaluation is `nn.BatchNorm2d`'s.
    """

    @classmethod
    def like(cls, other: _BatchNorm) -> SynchronizedBatchNorm:
        """A synchronized one that shares the parameters and buffers of `other`."""
        new = cls(other.num_features, other.eps, other.momentum, other.affine, other.track_running_stats)
        new.weight, new.bias = other.weight, other.bias
        new.running_mean, new.running_var = other.running_mean, other.running_var
        new.num_batches_tracked = other.num_batches_tracked
        return new.train(other.training)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least two dimensions, got {input.dim()}")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        values, dims = input if input.dtype == torch.float64 else input.float(), [0, *range(2, input.dim())]
        shape = (1, -1, *(1 for _ in dims[1:]))
        count = values.new_tensor([values.numel() / values.shape[1]])
        *sums, seen = SumOverProcesses.apply(torch.cat([values.sum(dims), count])).split([self.num_features, 1])
        mean = sums[0] / seen
        # Two passes: the mean of squares less the square of the mean would lose digits.
        centered = values - mean.view(shape)
        variance = SumOverProcesses.apply(centered.square().sum(dims)) / seen
        self._keep_statistics(mean.detach(), (variance * seen / (seen - 1)).detach())
        output = centered * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            output = output * self.weight.view(shape) + self.bias.view(shape)
        return output.to(input.dtype)

    def _keep_statistics(self, mean: Tensor, variance: Tensor) -> None:
        if not self.track_running_stats:
            return
        assert self.num_batches_tracked is not None and self.running_mean is not None and self.running_var is not None
        self.num_batches_tracked.add_(1)
        # PyTorch: momentum None means the plain average of all batches.
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance, momentum)


class SumOverProcesses(torch.autograd.Function):
    """All-reduce by addition; its gradient is the sum of all processes' gradients."""

    @staticmethod
    def forward(context: Any, values: Tensor) -> Tensor:
        return _all_reduced(values)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        return _all_reduced(gradients[0])


def _all_reduced(values: Tensor) -> Tensor:
    total = values.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total
