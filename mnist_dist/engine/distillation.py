"""Computes the distillation loss, which compares a network (the student) with trained networks (the teachers).

Hinton, Vinyals, Dean: "Distilling the Knowledge in a Neural Network", 2015.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnist_dist.data.images import as_numbers, per_channel


class Distillation:
    """Computes (1 - weight) × label loss + weight × temperature² × KL(teachers ‖ student), summed over samples.

    Both sides of the divergence are softened: their logits are divided by the temperature. Several teachers contribute
    the mean of their softened probabilities. The divergence is computed for each sample separately, so the sum over a
    batch does not depend on micro-batches or processes. The exception is a teacher whose batch norm uses the statistics
    of the evaluated batch (SimpleCNN).

    Args:
        teachers: networks in eval mode on the device, each with the (mean, std) that its training images were
            normalised with.
        weight: share of the teachers in the loss, between 0 and 1.
        temperature: above 0.
        mean, std: the values that the student's images are normalised with: one number, or one for each channel.
        autocast: context manager of the precision that the student is computed in.
    """

    def __init__(
        self,
        teachers: list[tuple[nn.Module, float | Sequence[float], float | Sequence[float]]],
        *,
        weight: float,
        temperature: float,
        mean: float | Sequence[float],
        std: float | Sequence[float],
        autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
    ):
        self._teachers = [
            (module, *_between(mean, std, teacher_mean, teacher_std)) for module, teacher_mean, teacher_std in teachers
        ]
        self._weight, self._temperature, self._autocast = weight, temperature, autocast

    def __call__(self, loss_sum: Tensor, images: Tensor, logits: Tensor) -> Tensor:
        """Returns the total loss (scalar), summed over samples.

        Args:
            loss_sum: the loss against the labels, summed over samples (scalar).
            images: the student's normalised images, float32 (n, C, H, W).
            logits: the student's logits, float32 (n, classes).
        """
        student = F.log_softmax(logits / self._temperature, dim=1)
        divergence = F.kl_div(student, self.probabilities(images), reduction="sum")
        return (1 - self._weight) * loss_sum + self._weight * self._temperature**2 * divergence

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """Returns the mean of the teachers' softened probabilities, float32 (n, classes).

        Args:
            images: normalised for the student, float32 (n, C, H, W).
        """
        softened = []
        for module, scale, shift in self._teachers:
            inputs = images
            if any(each != 1 for each in scale) or any(shift):
                inputs = images * per_channel(scale, images.device) + per_channel(shift, images.device)
            with self._autocast():
                logits = module(inputs)
            softened.append(F.softmax(logits.float() / self._temperature, dim=1))
        return torch.stack(softened).mean(dim=0)


def _between(*statistics: float | Sequence[float]) -> tuple[list[float], list[float]]:
    """Returns scale and shift from the student's normalised images to the teacher's, one number for each channel.

    Args:
        statistics: mean and std of the student, mean and std of the teacher.
    """
    lists = [as_numbers(each) for each in statistics]
    channels = max(map(len, lists))
    rows = list(zip(*(each * channels if len(each) == 1 else each for each in lists), strict=True))
    return [std / other for _, std, _, other in rows], [(mean - off) / other for mean, _, off, other in rows]
