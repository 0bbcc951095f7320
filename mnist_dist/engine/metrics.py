"""Counters that stay on the device until somebody asks."""

from __future__ import annotations

import time

import torch
from accelerate import Accelerator
from torch import Tensor


class Meter:
    """Sums loss, hits and samples on the device; reading is the one moment at which the host waits for it."""

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self._sums = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
        self._epoch_sums = [0.0, 0.0, 0.0]
        self._started = time.perf_counter()
        self.train_seconds = 0.0
        """Time spent training, all intervals together, in seconds."""

    def add(self, loss_sum: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Adds a piece of a batch: its summed loss (scalar), logits (n, classes) and labels int64 (n,)."""
        correct = (logits.argmax(dim=1) == labels).sum()
        self._sums += torch.stack([loss_sum.double(), correct.double(), torch.full_like(correct, len(labels)).double()])

    def read(self) -> dict[str, float]:
        """Mean loss, accuracy in percent and images/s, over all processes, since the last read; starts anew."""
        loss, correct, seen = self._accelerator.reduce(self._sums, reduction="sum").tolist()
        seconds = time.perf_counter() - self._started
        self.train_seconds += seconds
        self._epoch_sums = [old + new for old, new in zip(self._epoch_sums, (loss, correct, seen), strict=True)]
        self._sums.zero_()
        self.resume()
        return {
            "train/loss": loss / seen,
            "train/accuracy": 100 * correct / seen,
            "train/images_per_second": seen / seconds,
        }

    def read_epoch(self) -> dict[str, float]:
        """Mean loss and accuracy of all intervals read since the last call: the epoch's training figures."""
        loss, correct, seen = self._epoch_sums
        self._epoch_sums = [0.0, 0.0, 0.0]
        return {"train/epoch_loss": loss / seen, "train/epoch_accuracy": 100 * correct / seen}

    def resume(self) -> None:
        """Starts the clock again after time that was not training."""
        self._started = time.perf_counter()
