"""Exact evaluation: every image once, in the same fixed batches, whatever the number of processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from mnist_dist.data import Images


@dataclass(frozen=True)
class Evaluation:
    """`accuracy` in percent, `loss` the mean cross entropy, `probabilities` float32 (N, classes) on the CPU.

    `confusion`: int64 (classes, classes), images by truth (rows) and prediction (columns).
    """

    accuracy: float
    loss: float
    probabilities: Tensor
    confusion: Tensor


class Interrupted(Exception):
    """Evaluation was asked to stop before it had an answer."""


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """While entered, the network stands in eval mode; afterwards each of its parts, frozen ones too, as before."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@torch.no_grad()
def evaluate(
    accelerator: Accelerator,
    module: nn.Module,
    data: Images,
    *,
    batch_size: int,
    interrupted: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Judges `module` on `data`; the processes take whole batches in turn.

    Batches stay whole because a network may normalise by the evaluated batch (SimpleCNN). Each process fills its own
    rows of one table and the tables are added, so all processes hold the same figures, bit for bit at any world size.

    Args:
        interrupted: asked between batches, by all processes alike.

    Raises:
        Interrupted: because it said so.
    """
    table = torch.zeros(len(data), len(data.classes), device=accelerator.device)
    with evaluating(module):
        for turn in range(0, len(data), batch_size * accelerator.num_processes):
            if interrupted():
                raise Interrupted
            start = turn + accelerator.process_index * batch_size
            rows = slice(start, start + batch_size)
            if start < len(data):
                with accelerator.autocast():
                    logits = module(data.normalize(data.images[rows]))
                table[rows] = F.log_softmax(logits.float(), dim=1)
    return score(accelerator.reduce(table, reduction="sum").cpu(), data.labels.cpu())


def score(log_probabilities: Tensor, labels: Tensor) -> Evaluation:
    """What log-probabilities, (N, classes) of any floating dtype, are worth beside the labels, int64 (N,)."""
    loss = F.nll_loss(log_probabilities.double(), labels).item()
    classes = log_probabilities.shape[1]
    pairs = labels * classes + log_probabilities.argmax(dim=1)
    confusion = torch.bincount(pairs, minlength=classes**2).view(classes, classes)
    correct = int(confusion.diagonal().sum())
    return Evaluation(100 * correct / len(labels), loss, log_probabilities.exp().float(), confusion)
