"""The loss against the labels: cross entropy, with a weight for each class if the recipe asks for it."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mnist_dist.data import Batch, Batches, EpochPlan


class LabelLoss:
    """Computes the cross entropy summed over samples.

    Divided by the number of images of the global batch, the sum over the batch is what `F.cross_entropy` returns for
    the complete batch: with class weights, the exact weighted mean, at any number of processes and micro-batches.

    Args:
        label_smoothing: share of the label's probability that is spread evenly over all classes.
        class_weights: of each class; None: all 1.
        device: where the loss is computed.
    """

    def __init__(self, label_smoothing: float, class_weights: tuple[float, ...] | None, device: torch.device):
        self._smoothing = label_smoothing
        self._weights = None if class_weights is None else torch.tensor(class_weights, device=device)

    def weigh(self, batch: Batch, batches: Batches, plan: EpochPlan, index: int, labels: Tensor) -> Batch:
        """Returns a process's part of global batch `index` with the factor of its losses.

        Args:
            labels: int64 (N,), of the complete data set.
        """
        if self._weights is None:
            return batch
        whole = labels[batches.rows(plan, index).to(labels.device)].to(self._weights.device)
        return replace(batch, scale=(batch.size / self._weights[whole].sum()).repeat(len(batch)))

    def __call__(self, logits: Tensor, targets: Tensor, scale: Tensor | None) -> Tensor:
        """Returns the loss (scalar), summed over samples.

        Args:
            logits: float32 (n, classes).
            targets: int64 (n,), or without class weights the probability of each class, float32 (n, classes).
            scale: of the batch; see `weigh`.
        """
        if scale is None:
            return F.cross_entropy(logits, targets, reduction="sum", label_smoothing=self._smoothing)
        weights, smoothing = self._weights, self._smoothing
        losses = F.cross_entropy(logits, targets, weight=weights, reduction="none", label_smoothing=smoothing)
        return (losses * scale).sum()
