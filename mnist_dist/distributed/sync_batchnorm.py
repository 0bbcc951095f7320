"""Batch norm over the global batch on any device. PyTorch's own SyncBatchNorm supports GPUs only."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def synchronize_batch_norm(module: nn.Module, device: torch.device) -> nn.Module:
    """Replaces every batch norm by a batch norm over the rows of all processes; keeps parameters, buffers and names."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, _BatchNorm):
                setattr(parent, name, SynchronizedBatchNorm.like(child))
    return module


class SynchronizedBatchNorm(_BatchNorm):
    """Batch norm with the mean and the variance over the rows of all processes, which may have unequal numbers of rows.

    The input is (N, C, …) of any floating dtype; sums are float32, or float64 for float64 input. In training mode the
    output equals that of `nn.BatchNorm2d` over the global batch, up to the order of summation. In evaluation mode the
    output is that of `nn.BatchNorm2d`. Collective in training mode, forward and backward: call on every rank.
    """

    @classmethod
    def like(cls, other: _BatchNorm) -> SynchronizedBatchNorm:
        """Returns a synchronized batch norm that shares the parameters and buffers of `other`."""
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
        *sums, total = SumOverProcesses.apply(torch.cat([values.sum(dims), count])).split([self.num_features, 1])
        mean = sums[0] / total
        # Two passes: the mean of squares minus the square of the mean would lose precision.
        centered = values - mean.view(shape)
        variance = SumOverProcesses.apply(centered.square().sum(dims)) / total
        self._keep_statistics(mean.detach(), (variance * total / (total - 1)).detach())
        output = centered * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            output = output * self.weight.view(shape) + self.bias.view(shape)
        return output.to(input.dtype)

    def _keep_statistics(self, mean: Tensor, variance: Tensor) -> None:
        if not self.track_running_stats:
            return
        assert self.num_batches_tracked is not None and self.running_mean is not None and self.running_var is not None
        self.num_batches_tracked.add_(1)
        # In PyTorch momentum None means the plain average over all batches.
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance, momentum)


class SumOverProcesses(torch.autograd.Function):
    """Sums over all processes; the gradient is the sum over all processes too. Collective, forward and backward."""

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
