"""Counters of training that stay on the device until they are read."""

from __future__ import annotations

import time
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from torch import Tensor

from mnist_dist.distributed.gradients import GradientClock


class Meter:
    """Sums loss, correct predictions and samples on the device. Only `read` and `state_dict` wait for the device."""

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self._sums = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
        self._epoch_sums = [0.0, 0.0, 0.0]
        self._steps = 0
        self._before_step = torch.zeros_like(self._sums)
        self._started = time.perf_counter()
        self._steps_before, self._seconds_before = 0, 0.0
        """Steps since the last read, and their duration by rank 0's clock, that a resumed run made before."""
        self._own_samples = 0
        self.own_seconds = 0.0
        """Seconds of training in this process, without the time before a resume."""
        self.train_seconds = 0.0
        """Seconds of training since the start of the run, by rank 0's clock; equal on all processes."""
        self.seconds_per_step = 0.0
        """Mean seconds of a step between the last two reads; equal on all processes."""
        self._speeds: list[float] = []

    def add(self, loss_sum: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Adds a micro-batch: its summed loss (scalar), logits (n, classes) and labels int64 (n,).

        The targets of mixed images are the classes' probabilities, float (n, classes). Such an image counts as correct
        with the probability of the predicted class.
        """
        found = logits.argmax(dim=1)
        correct = (found == targets).sum() if targets.ndim == 1 else targets.gather(1, found[:, None]).sum()
        count = torch.full_like(correct, len(targets))
        self._sums += torch.stack([loss_sum.double(), correct.double(), count.double()])

    def count_step(self, samples: int) -> None:
        """Counts a step and this process's samples in it, on the host."""
        self._steps += 1
        self._own_samples += samples

    def begin_step(self) -> None:
        """Stores the sums, so that `forget_step` can restore them."""
        self._before_step.copy_(self._sums)

    def forget_step(self, bad: Tensor) -> None:
        """Restores the sums that `begin_step` stored, if `bad` (bool scalar on the device)."""
        self._sums.copy_(torch.where(bad, self._before_step, self._sums))

    def read(self) -> dict[str, float]:
        """Returns mean loss, accuracy in percent and images/s over all processes since the last read; resets the sums.

        Waits for the device. Collective: call on every rank.
        """
        own = self._sums.tolist()  # waits for the device, so the clock below includes its work
        seconds = self._seconds_unread() if self._accelerator.is_main_process else 0.0
        seen_by = [0.0] * self._accelerator.num_processes
        seen_by[self._accelerator.process_index] = own[2]
        row = torch.tensor([*own, seconds, *seen_by], dtype=torch.float64, device=self._accelerator.device)
        loss, correct, seen, seconds, *seen_by = self._accelerator.reduce(row, reduction="sum").tolist()
        self._speeds = [each / seconds for each in seen_by]
        self.own_seconds += seconds - self._seconds_before
        self._epoch_sums = [old + new for old, new in zip(self._epoch_sums, (loss, correct, seen), strict=True)]
        self.train_seconds += seconds
        self.seconds_per_step = seconds / max(self._steps + self._steps_before, 1)
        self._steps_before, self._seconds_before = 0, 0.0
        self._sums.zero_()
        self.resume()
        seen_or_one = max(seen, 1.0)  # all steps since the last read may have been skipped
        return {
            "train/loss": loss / seen_or_one,
            "train/accuracy": 100 * correct / seen_or_one,
            "train/images_per_second": seen / seconds,
        }

    def read_epoch(self) -> dict[str, float]:
        """Returns mean loss and accuracy of everything read since the last call: the epoch's training figures."""
        loss, correct, seen = self._epoch_sums
        self._epoch_sums = [0.0, 0.0, 0.0]
        return {"train/epoch_loss": loss / max(seen, 1), "train/epoch_accuracy": 100 * correct / max(seen, 1)}

    def gauges(self) -> dict[str, float]:
        """Returns the memory in MB on rank 0, and each process's images/s between the last two reads.

        Memory is the peak of tensors on a GPU, or the current size of the process on a CPU.
        """
        device = self._accelerator.device
        on_gpu = device.type == "cuda"
        used = torch.cuda.max_memory_allocated(device) if on_gpu else psutil.Process().memory_info().rss
        speeds = {f"process/{rank}/images_per_second": speed for rank, speed in enumerate(self._speeds)}
        return {"train/memory_mb": used / 2**20, **speeds}

    def per_process(self, clock: GradientClock) -> dict[str, list[float]]:
        """Returns each process's images/s since it started, and the share of that time that it waited for others.

        Collective: call on every rank.
        """
        own = [self._own_samples / max(self.own_seconds, 1e-9), clock.seconds / max(self.own_seconds, 1e-9)]
        table = self._accelerator.gather(torch.tensor([own], dtype=torch.float64, device=self._accelerator.device))
        speed, waited = table.T.tolist()
        return {
            "images_per_second_per_process": [round(each, 1) for each in speed],
            "communication_share_per_process": [round(each, 4) for each in waited],
        }

    def resume(self) -> None:
        """Restarts the clock after time that does not count as training, such as an evaluation."""
        self._steps = 0
        self._started = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        """Returns the sums of all processes that have not been read yet, with their steps and duration.

        Collective: call on every rank.
        """
        sums = self._accelerator.gather(self._sums[None]).tolist()  # waits for the device
        steps = self._steps + self._steps_before
        # Without a step since the last read, the time was spent on an evaluation.
        seconds = self._seconds_unread() if self._steps else self._seconds_before
        return {
            "sums": sums,
            "steps": steps,
            "seconds": seconds,
            "epoch_sums": self._epoch_sums,
            "train_seconds": self.train_seconds,
        }

    def _seconds_unread(self) -> float:
        return time.perf_counter() - self._started + self._seconds_before

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the sums: each process its own, or rank 0 their total if the number of processes has changed."""
        sums = torch.tensor(state["sums"], dtype=torch.float64)
        rank, world_size = self._accelerator.process_index, self._accelerator.num_processes
        if len(sums) != world_size:
            sums = torch.cat([sums.sum(dim=0, keepdim=True), torch.zeros(world_size - 1, 3, dtype=torch.float64)])
        self._sums.copy_(sums[rank])
        self._epoch_sums, self.train_seconds = state["epoch_sums"], state["train_seconds"]
        # Earlier versions did not save the last two.
        self._steps_before, self._seconds_before = state.get("steps", 0), state.get("seconds", 0.0)
