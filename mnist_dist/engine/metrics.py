"""Counters that stay on the device until somebody asks."""

from __future__ import annotations

import time
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from torch import Tensor

from mnist_dist.distributed.gradients import GradientClock


class Meter:
    """Sums loss, hits and samples on the device; reading is the one moment at which the host waits for it."""

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self._sums = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
        self._epoch_sums = [0.0, 0.0, 0.0]
        self._steps = 0
        self._before_step = torch.zeros_like(self._sums)
        self._started = time.perf_counter()
        self._own_samples = 0
        self.own_seconds = 0.0
        """Time spent training by this process, without those that the run was resumed from."""
        self.train_seconds = 0.0
        """Time spent training, all intervals together, by rank 0's clock; equal on all processes."""
        self.seconds_per_step = 0.0
        """Of the last interval; equal on all processes."""
        self._speeds: list[float] = []

    def add(self, loss_sum: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Adds a piece of a batch: its summed loss (scalar), logits (n, classes) and labels int64 (n,)."""
        correct = (logits.argmax(dim=1) == labels).sum()
        self._sums += torch.stack([loss_sum.double(), correct.double(), torch.full_like(correct, len(labels)).double()])

    def count_step(self, samples: int) -> None:
        """One more step, of so many of this process's samples: what the host counts."""
        self._steps += 1
        self._own_samples += samples

    def begin_step(self) -> None:
        """Remembers the sums, for `forget_step`."""
        self._before_step.copy_(self._sums)

    def forget_step(self, bad: Tensor) -> None:
        """Takes back what the current step added if `bad` (bool scalar on the device)."""
        self._sums.copy_(torch.where(bad, self._before_step, self._sums))

    def read(self) -> dict[str, float]:
        """Mean loss, accuracy in percent and images/s, over all processes, since the last read; starts anew."""
        mine = self._sums.tolist()  # waits for the device, so that the clock below sees its work
        seconds = time.perf_counter() - self._started if self._accelerator.is_main_process else 0.0
        seen_by = [0.0] * self._accelerator.num_processes
        seen_by[self._accelerator.process_index] = mine[2]
        together = torch.tensor([*mine, seconds, *seen_by], dtype=torch.float64, device=self._accelerator.device)
        loss, correct, seen, seconds, *seen_by = self._accelerator.reduce(together, reduction="sum").tolist()
        self._speeds = [each / seconds for each in seen_by]
        self.own_seconds += seconds
        self._epoch_sums = [old + new for old, new in zip(self._epoch_sums, (loss, correct, seen), strict=True)]
        self.train_seconds += seconds
        self.seconds_per_step = seconds / max(self._steps, 1)
        self._sums.zero_()
        self.resume()
        seen_or_one = max(seen, 1.0)  # every step of the interval may have been skipped
        return {
            "train/loss": loss / seen_or_one,
            "train/accuracy": 100 * correct / seen_or_one,
            "train/images_per_second": seen / seconds,
        }

    def read_epoch(self) -> dict[str, float]:
        """Mean loss and accuracy of all intervals read since the last call: the epoch's training figures."""
        loss, correct, seen = self._epoch_sums
        self._epoch_sums = [0.0, 0.0, 0.0]
        return {"train/epoch_loss": loss / max(seen, 1), "train/epoch_accuracy": 100 * correct / max(seen, 1)}

    def gauges(self) -> dict[str, float]:
        """How the machine does, no result of the training: rank 0's memory in MB, each process's images/s of late.

        Memory is what tensors took at most on a GPU, what the process takes now on a CPU.
        """
        device = self._accelerator.device
        on_gpu = device.type == "cuda"
        used = torch.cuda.max_memory_allocated(device) if on_gpu else psutil.Process().memory_info().rss
        speeds = {f"process/{rank}/images_per_second": speed for rank, speed in enumerate(self._speeds)}
        return {"train/memory_mb": used / 2**20, **speeds}

    def per_process(self, clock: GradientClock) -> dict[str, list[float]]:
        """Each process's images/s since it started, and the share of that time it waited; asks all processes."""
        mine = [self._own_samples / max(self.own_seconds, 1e-9), clock.seconds / max(self.own_seconds, 1e-9)]
        table = self._accelerator.gather(torch.tensor([mine], dtype=torch.float64, device=self._accelerator.device))
        speed, waited = table.T.tolist()
        return {
            "images_per_second_per_process": [round(each, 1) for each in speed],
            "communication_share_per_process": [round(each, 4) for each in waited],
        }

    def resume(self) -> None:
        """Starts the clock again after time that was not training."""
        self._steps = 0
        self._started = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        """What has been summed and not read yet; asks all processes."""
        sums = self._accelerator.gather(self._sums[None])
        return {"sums": sums.tolist(), "epoch_sums": self._epoch_sums, "train_seconds": self.train_seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up the sums: each process its own, or rank 0 all of them where the world has another size now."""
        sums = torch.tensor(state["sums"], dtype=torch.float64)
        rank, world_size = self._accelerator.process_index, self._accelerator.num_processes
        if len(sums) != world_size:
            sums = torch.cat([sums.sum(dim=0, keepdim=True), torch.zeros(world_size - 1, 3, dtype=torch.float64)])
        self._sums.copy_(sums[rank])
        self._epoch_sums, self.train_seconds = state["epoch_sums"], state["train_seconds"]
