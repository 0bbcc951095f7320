"""One update: rows of the global batch -> images -> loss -> gradients -> clip -> optimizer -> averaged weights."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from mnist_dist.data import Batches, EpochPlan, Images, derive_seed
from mnist_dist.engine.metrics import Meter


class Update:
    """Computes this process's share of a global batch and makes the update that the whole batch asks for.

    The loss is the mean over the *global* batch: each process weighs its summed loss with world_size / batch size, so
    that the average over processes, which data parallel takes of gradients, is exact for uneven shares too.

    Args:
        model: as prepared by Accelerate. module: the same network, bare.
        data: images and labels on the device.
        micro_batch_size: samples computed at once; None for the whole share.
        average: averaged weights to keep up to date, or None.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        module: nn.Module,
        optimizer: Optimizer,
        batches: Batches,
        data: Images,
        *,
        meter: Meter,
        clip_grad_norm: float | None = None,
        label_smoothing: float = 0.0,
        micro_batch_size: int | None = None,
        average: AveragedModel | None = None,
    ):
        self.accelerator, self.model, self.module, self.optimizer = accelerator, model, module, optimizer
        self.batches, self.data = batches, data
        self.meter, self.average = meter, average
        self.clip_grad_norm, self.label_smoothing = clip_grad_norm, label_smoothing
        self.micro_batch_size = micro_batch_size
        self._norm_before_clipping: Tensor | None = None

    def __call__(self, plan: EpochPlan, index: int, step: int) -> None:
        """Trains on global batch `index` of the epoch; `step` counts updates from the start of the run."""
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        rows = self.batches.rows(plan, index, rank=rank, world_size=world_size)
        weight = world_size / self.batches.size(index)
        if len(rows) == 0:  # a short last batch can leave a process nothing, but all must meet in the reduction
            rows, weight = plan.order[:1], 0.0
        # Dropout's generator follows from the step, so there is no random state to save.
        torch.manual_seed(derive_seed(self.batches.seed, step, rank))

        self.optimizer.zero_grad()
        pieces = rows.split(self.micro_batch_size or len(rows))
        for number, piece in enumerate(pieces, start=1):
            last = number == len(pieces)
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                self._accumulate(plan, piece, weight)

        if self.clip_grad_norm is not None:
            self._norm_before_clipping = self.accelerator.clip_grad_norm_(self.model.parameters(), self.clip_grad_norm)
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.module)
        self.meter.end_step()

    def _accumulate(self, plan: EpochPlan, rows: Tensor, weight: float) -> None:
        """Adds the gradient of `rows` (int64, sample indices)."""
        labels = self.data.labels[rows]
        logits = self.model(self.inputs(plan, rows)).float()
        loss_sum = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=self.label_smoothing)
        self.accelerator.backward(loss_sum * weight)
        if weight:
            self.meter.add(loss_sum.detach(), logits.detach(), labels)

    def inputs(self, plan: EpochPlan, rows: Tensor) -> Tensor:
        """Augmented and normalised images of `rows`: float32 (n, 1, 28, 28)."""
        images = self.data.images[rows]
        if plan.warps is not None:
            assert self.batches.augmentation is not None
            images = self.batches.augmentation.apply(images.float(), plan.warps[rows])
        return self.data.normalize(images)

    def grad_norm(self) -> float:
        """Norm of the last update's gradient over all parameters, before clipping. Waits for the device."""
        if self._norm_before_clipping is not None:
            return float(self._norm_before_clipping)
        return float(nn.utils.get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None]))
