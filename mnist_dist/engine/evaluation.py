"""Evaluates a network exactly: every image once, in the same fixed batches at any number of processes."""

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
    """The result of an evaluation on N images."""

    accuracy: float
    """Percent."""
    loss: float
    """Mean cross entropy."""
    probabilities: Tensor
    """float32 (N, classes), on the CPU."""
    confusion: Tensor
    """Number of images by true class (rows) and predicted class (columns), int64 (classes, classes)."""


class Mirrored(nn.Module):
    """A network that sees every image mirrored from left to right."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> Tensor:
        """Returns the logits of mirrored images (N, C, H, W)."""
        return self.module(images.flip(-1))


class Interrupted(Exception):
    """Raised when an evaluation is stopped before its end."""


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Sets a network to eval mode inside the context. Afterwards each submodule has its previous mode again.

    `module.train()` would be wrong afterwards: it would also set frozen batch norm layers to training mode.
    """
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
    """Evaluates `module` on `data`. Process r of n computes the batches r, r + n, r + 2n, …

    A batch is never divided among processes, because batch norm may use the statistics of the evaluated batch
    (SimpleCNN). Each process fills its own rows of a table of zeros, and the tables are added. All processes therefore
    return the same result, bit-identical at any world size.

    Collective: call on every rank.

    Args:
        data: images on the device or on the CPU.
        interrupted: called between batches; must return the same value on all ranks.

    Raises:
        Interrupted: `interrupted` returned True.
    """
    table = torch.zeros(len(data), len(data.classes), device=accelerator.device)
    labels = data.labels.to("cpu", non_blocking=True)  # complete when the table is
    with evaluating(module):
        for turn in range(0, len(data), batch_size * accelerator.num_processes):
            if interrupted():
                raise Interrupted
            start = turn + accelerator.process_index * batch_size
            # FSDP2 plans the communication of the next training step by the forward passes that it has seen. A process
            # without a batch therefore computes the first one too, and drops the result.
            first = start if start < len(data) else 0
            rows = slice(first, first + batch_size)
            with accelerator.autocast():
                logits = module(data.normalize(data.images[rows].to(accelerator.device)))
            if start < len(data):
                table[rows] = F.log_softmax(logits.float(), dim=1)
    return score(accelerator.reduce(table, reduction="sum").cpu(), labels)  # the only wait for the device


def score(log_probabilities: Tensor, labels: Tensor) -> Evaluation:
    """Compares log-probabilities with labels.

    Args:
        log_probabilities: (N, classes) of any floating dtype, on the CPU.
        labels: int64 (N,), on the CPU.
    """
    loss = F.nll_loss(log_probabilities.double(), labels).item()
    classes = log_probabilities.shape[1]
    pairs = labels * classes + log_probabilities.argmax(dim=1)
    confusion = torch.bincount(pairs, minlength=classes**2).view(classes, classes)
    correct = int(confusion.diagonal().sum())
    return Evaluation(100 * correct / len(labels), loss, log_probabilities.exp().float(), confusion)


def evaluate_mean(evaluations: list[Evaluation], labels: Tensor) -> Evaluation:
    """Returns the evaluation of the mean of several evaluations' probabilities.

    Args:
        labels: int64 (N,), on the CPU.
    """
    probabilities = torch.stack([each.probabilities for each in evaluations]).mean(dim=0)
    # A probability may have been rounded to 0 in float32, and the loss needs its logarithm.
    return score(probabilities.double().clamp(min=torch.finfo(torch.float32).tiny).log(), labels)
