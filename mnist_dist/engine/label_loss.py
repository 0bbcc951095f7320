"""The loss against the labels: cross entropy, with a weight for each class if the recipe asks for it."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mnist_dist.data import Batch, Batches, EpochPlan


class LabelLoss:
    """Computes the cross entropy, summed over samples.

    The sum over all samples of the global batch, divided by their number, equals the result of `F.cross_entropy` for
    the global batch. With class weights this is the weighted mean. It does not depend on the number of processes and
    micro-batches.

    Args:
        label_smoothing: share of the label's probability that is spread evenly over all classes.
        class_weights: of each class; None: all 1.
        device: where the loss is computed.
    """

    def __init__(self, label_smoothing: float, class_weights: tuple[float, ...] | None, device: torch.device):
        self._smoothing = label_smoothing
        self._weights = None if class_weights is None else torch.tensor(class_weights, device=device)

    def weigh(self, batch: Batch, batches: Batches, plan: EpochPlan, index: int, labels: Tensor) -> Batch:
        """Returns a process's part of global batch `index` with its `scale`: batch size / sum of the samples' weights.

        Args:
            labels: int64 (N,), of the complete data set.
        """
        if self._weights is None:
            return batch
        all_labels = labels[batches.rows(plan, index).to(labels.device)].to(self._weights.device)
        return replace(batch, scale=(batch.size / self._weights[all_labels].sum()).repeat(len(batch)))

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
