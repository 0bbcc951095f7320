"""Learning from trained networks: Hinton, Vinyals, Dean, "Distilling the knowledge in a neural network", 2015."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Distillation:
    """(1 - weight) × the loss against the labels + weight × temperature² × KL(teachers ‖ student), summed over samples.

    Both sides of the divergence are softened: their logits are divided by the temperature. Several teachers count by
    the mean of their softened probabilities. Each sample has a divergence of its own, so the sum over a batch does not
    depend on how it is cut; a teacher that normalises by the batch (SimpleCNN) is the exception.

    Args:
        teachers: in eval mode, on the device, each with the (mean, std) that it was trained with.
        mean, std: those that the student's images are normalised with.
        autocast: the precision that the student is computed in.
    """

    def __init__(
        self,
        teachers: list[tuple[nn.Module, float, float]],
        *,
        weight: float,
        temperature: float,
        mean: float,
        std: float,
        autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
    ):
        self._teachers = [
            (module, std / own_std, (mean - own_mean) / own_std) for module, own_mean, own_std in teachers
        ]
        self._weight, self._temperature, self._autocast = weight, temperature, autocast

    def __call__(self, loss_sum: Tensor, images: Tensor, logits: Tensor) -> Tensor:
        """The whole loss (scalar).

        Args:
            loss_sum: against the labels, summed. images: normalised, as the student saw them, (n, 1, 28, 28).
            logits: the student's, float32 (n, classes).
        """
        student = F.log_softmax(logits / self._temperature, dim=1)
        divergence = F.kl_div(student, self.probabilities(images), reduction="sum")
        return (1 - self._weight) * loss_sum + self._weight * self._temperature**2 * divergence

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """The mean of the teachers' softened probabilities, float32 (n, classes)."""
        softened = []
        for module, scale, shift in self._teachers:
            own = images if (scale, shift) == (1, 0) else images * scale + shift
            with self._autocast():
                logits = module(own)
            softened.append(F.softmax(logits.float() / self._temperature, dim=1))
        return torch.stack(softened).mean(dim=0)
