"""Finds the largest micro-batch that fits into memory."""

from __future__ import annotations

import torch.nn.functional as F
from accelerate.utils import find_executable_batch_size, gather_object

from mnist_dist.data import EpochPlan
from mnist_dist.engine.shares import largest_share
from mnist_dist.engine.train_step import TrainStep


def find_micro_batch_size(step: TrainStep, plan: EpochPlan) -> int:
    """Returns the largest micro-batch that fits into the memory of every process; 0 if not one image fits.

    Starts with the largest share of a batch and halves it until it fits. Leaves weights, buffers and gradients
    unchanged. Collective: call on every rank.
    """
    share = largest_share(step.batches.batch_size, step.accelerator.num_processes)
    batch = step.load(plan, 0)

    def halve() -> int:
        nonlocal share
        share //= 2
        return share

    @find_executable_batch_size(starting_batch_size=share, reduce_batch_size_fn=halve)
    def attempt(size: int) -> None:
        images = step.inputs(batch[:size])
        logits = step.module(images).float()
        loss = F.cross_entropy(logits, step.targets(batch[:size]))
        step.accelerator.backward(step.distillation(loss, images, logits) if step.distillation else loss)

    buffers = list(step.module.buffers())
    before = [buffer.clone() for buffer in buffers]
    try:
        attempt()
    except RuntimeError:
        if share > 0:
            raise
    for buffer, value in zip(buffers, before, strict=True):
        buffer.copy_(value)
    step.optimizer.zero_grad()
    return min(gather_object([share]))
