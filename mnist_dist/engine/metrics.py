"""Counters of training that stay on the device until they are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from torch import Tensor

from mnist_dist.distributed.devices import Moment, peak_memory, runs_behind, sum_dtype
from mnist_dist.distributed.gradients import GradientClock


@dataclass(frozen=True)
class Reading:
    """The figures of an interval of training, on their way from the device to the host."""

    figures: Tensor
    """On the host: sums of loss, correct predictions and samples, seconds that all processes agree on, samples
    of each process, on a CPU the percentage of its time that each process waited, then the values that were read with
    them. Valid once `end` has come."""
    own_sums: Tensor
    """The sums of this process, on the device."""
    steps: int
    """Steps of the interval, including `steps_before`."""
    steps_before: int
    seconds_before: float
    """Steps of the interval, and their seconds, that an earlier process of a resumed run made."""
    agreed_steps: int
    """Number of steps whose seconds are in `figures`."""
    start: Moment
    end: Moment


class Meter:
    """Sums loss, correct predictions and samples on the device, and measures the time.

    The figures are read in two parts. `start_reading` queues the copy to the host and ends the interval; nothing waits.
    `finish_reading` waits for the copy. If other work is queued between the two, the device is never idle.

    Args:
        clock: measures how long this process waits for the gradients of the others.
    """

    def __init__(self, accelerator: Accelerator, clock: GradientClock | None = None):
        self._accelerator, self._clock = accelerator, clock or GradientClock()
        self.reads_behind = runs_behind(accelerator.device) and accelerator.scaler is None
        """Whether figures are better read an interval late. With a gradient scaler the host waits anyway."""
        several = accelerator.num_processes > 1
        self._sees_waits = several and accelerator.device.type == "cpu" and not self.reads_behind
        """Whether `clock` sees the waits: the host of a GPU does not wait for gradients."""
        self._dtype = sum_dtype(accelerator.device)
        self.sums = torch.zeros(3, dtype=self._dtype, device=accelerator.device)
        """Loss, correct predictions and samples since the last reading. Written in place and never replaced."""
        self._rows: dict[int, Tensor] = {}
        """Number of samples -> loss, correct predictions and number of the latest micro-batch of that size."""
        self._epoch_sums = [0.0, 0.0, 0.0]
        self._steps = 0
        self._start = Moment(accelerator.device)
        self._steps_before, self._seconds_before = 0, 0.0
        self._unsent = 0, 0.0
        """Steps and seconds by this process's clock that no row has sent to the other processes."""
        self._own_samples = 0
        self.steps_made = 0
        """Steps of this process. Other threads read the number to see whether the training moves."""
        self.own_seconds = 0.0
        """Seconds of training in this process, without the time before a resume."""
        self.train_seconds = 0.0
        """Seconds of training since the start of the run, by rank 0's clock; equal on all processes."""
        self.seconds_per_step = 0.0
        """Mean seconds of a step in the latest interval that all processes know; 0 before the first. Equal on all."""
        self._waited = 0.0
        """Seconds that this process had waited at the last reading."""
        self._speeds: list[float] = []
        self._waits: list[float] = []

    def add(self, loss_sum: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Adds a micro-batch: its summed loss (scalar), logits (n, classes) and labels int64 (n,).

        The targets of mixed images are the classes' probabilities, float (n, classes). Such an image counts as correct
        with the probability of the predicted class.
        """
        count, found = len(targets), logits.argmax(dim=1)
        if count not in self._rows:  # filled on the device, without a transfer
            self._rows[count] = torch.full((3,), float(count), dtype=self._dtype, device=loss_sum.device)
        row = self._rows[count]
        row[0].copy_(loss_sum)
        if targets.ndim == 1:
            torch.sum(found == targets, dim=0, dtype=self._dtype, out=row[1])
        else:
            row[1].copy_(targets.gather(1, found[:, None]).sum())
        self.sums += row

    def count_step(self, samples: int) -> None:
        """Counts a step and this process's samples in it, on the host."""
        self._steps += 1
        self.steps_made += 1
        self._own_samples += samples

    def read(self) -> dict[str, float]:
        """Returns mean loss, accuracy in percent and images/s over all processes since the last read; resets the sums.

        Waits for the device. Collective: call on every rank.
        """
        figures = self.finish_reading(self.start_reading())
        self.agree()
        return figures

    def start_reading(self, *values: Tensor) -> Reading:
        """Queues the copy of the figures since the last reading to the host, and resets them.

        Collective: call on every rank.

        Args:
            values: scalars on the device, which are read with the figures; see `Reading.figures`.
        """
        device, rank = self._accelerator.device, self._accelerator.process_index
        steps, start, own_sums = self._steps + self._steps_before, self._start, self.sums.clone()
        if not self.reads_behind:  # the row holds the seconds of this interval, else of intervals that are finished
            end = Moment(device)
            own_seconds = end.seconds_since(start)
            self._count_time(steps, own_seconds, self._seconds_before)
        agreed_steps, seconds = self._unsent
        self._unsent = 0, 0.0
        size = self._accelerator.num_processes
        row = torch.zeros(4 + size * (1 + self._sees_waits), dtype=self._dtype, device=device)
        row[:3], row[4 + rank] = own_sums, own_sums[2]
        if self._sees_waits:
            row[4 + size + rank] = 100 * (self._clock.seconds - self._waited) / max(own_seconds, 1e-9)
            self._waited = self._clock.seconds
        row[3] = seconds if self._accelerator.is_main_process else 0.0
        row = self._accelerator.reduce(row, reduction="sum")
        row = torch.cat([row, *(value.to(self._dtype).reshape(1) for value in values)])
        figures = row.to("cpu", non_blocking=self.reads_behind)
        if self.reads_behind:
            end = Moment(device)
        reading = Reading(figures, own_sums, steps, self._steps_before, self._seconds_before, agreed_steps, start, end)
        self.sums.zero_()
        self._steps = self._steps_before = 0
        self._seconds_before = 0.0
        self._start = end
        return reading

    def finish_reading(self, reading: Reading) -> dict[str, float]:
        """Returns mean loss, accuracy in percent and images/s over all processes in the interval of `reading`.

        Waits until the device has finished the interval.
        """
        reading.end.wait()
        size = self._accelerator.num_processes
        loss, correct, seen, agreed_seconds, *others = reading.figures.tolist()
        seconds = reading.end.seconds_since(reading.start) + reading.seconds_before
        if self.reads_behind:
            self._count_time(reading.steps, seconds - reading.seconds_before, reading.seconds_before)
        self._note_agreed(reading.agreed_steps, agreed_seconds)
        self._speeds = [each / seconds for each in others[:size]]
        if self._sees_waits and self._clock.reductions:
            self._waits = others[size : 2 * size]
        self._epoch_sums = [old + new for old, new in zip(self._epoch_sums, (loss, correct, seen), strict=True)]
        seen_or_one = max(seen, 1.0)  # all steps since the last read may have been skipped
        return {
            "train/loss": loss / seen_or_one,
            "train/accuracy": 100 * correct / seen_or_one,
            "train/images_per_second": seen / seconds,
        }

    def take_back(self, reading: Reading) -> None:
        """Undoes `start_reading`: the figures of `reading`, which was made an interval ago, are unread again."""
        reading.end.wait()
        self._note_agreed(reading.agreed_steps, float(reading.figures[3]))
        self.sums += reading.own_sums
        self._steps += reading.steps - reading.steps_before
        self._steps_before, self._seconds_before = reading.steps_before, reading.seconds_before
        self._start = reading.start

    def agree(self) -> None:
        """Makes `train_seconds` complete on all processes. Waits for the device. Collective: call on every rank."""
        if self.reads_behind:
            steps, seconds = self._unsent
            self._unsent = 0, 0.0
            known = torch.tensor([seconds if self._accelerator.is_main_process else 0.0], dtype=self._dtype)
            self._note_agreed(
                steps, float(self._accelerator.reduce(known.to(self._accelerator.device), reduction="sum"))
            )

    def _count_time(self, steps: int, own_seconds: float, seconds_before: float) -> None:
        self.own_seconds += own_seconds
        self._unsent = self._unsent[0] + steps, self._unsent[1] + own_seconds + seconds_before

    def _note_agreed(self, steps: int, seconds: float) -> None:
        self.train_seconds += seconds
        if steps:
            self.seconds_per_step = seconds / steps

    def read_epoch(self) -> dict[str, float]:
        """Returns mean loss and accuracy of everything read since the last call: the epoch's training figures."""
        loss, correct, seen = self._epoch_sums
        self._epoch_sums = [0.0, 0.0, 0.0]
        return {"train/epoch_loss": loss / max(seen, 1), "train/epoch_accuracy": 100 * correct / max(seen, 1)}

    def process_figures(self) -> dict[str, float]:
        """Returns each process's images/s between the last two reads.

        If several processes reduce gradients on CPUs, also the percentage of the time that each of them waited for the
        gradients of the others, and the mean. The process that waits least is the slowest.
        """
        found = {f"process/{rank}/images_per_second": round(each, 2) for rank, each in enumerate(self._speeds)}
        found |= {f"process/{rank}/waiting_percent": round(each, 2) for rank, each in enumerate(self._waits)}
        if self._waits:
            found["train/waiting_percent"] = round(sum(self._waits) / len(self._waits), 2)
        return found

    def gauges(self) -> dict[str, float]:
        """Returns the memory in MB on rank 0: the peak of tensors on a GPU that counts them, or of the process now."""
        device = self._accelerator.device
        counts_tensors = device.type in ("cuda", "xpu")
        used = peak_memory(device) if counts_tensors else psutil.Process().memory_info().rss
        return {"train/memory_mb": used / 2**20}

    def per_process(self) -> dict[str, list[float]]:
        """Returns each process's images/s since it started, and the share of that time that it waited for others.

        Collective: call on every rank.
        """
        own = [self._own_samples / max(self.own_seconds, 1e-9), self._clock.seconds / max(self.own_seconds, 1e-9)]
        table = self._accelerator.gather(torch.tensor([own], dtype=self._dtype, device=self._accelerator.device))
        speed, waited = table.T.tolist()
        return {
            "images_per_second_per_process": [round(each, 1) for each in speed],
            "communication_share_per_process": [round(each, 4) for each in waited],
        }

    def resume(self) -> None:
        """Restarts the clock after time that does not count as training, such as an evaluation."""
        self._steps, self._waited = 0, self._clock.seconds
        self._start = Moment(self._accelerator.device)

    def state_dict(self) -> dict[str, Any]:
        """Returns the sums of all processes that have not been read yet, with their steps and duration.

        Every reading must be finished. Collective: call on every rank.
        """
        sums = self._accelerator.gather(self.sums[None]).tolist()  # waits for the device
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
        return Moment(self._accelerator.device).seconds_since(self._start) + self._seconds_before

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the sums: each process its own, or rank 0 their total if the number of processes has changed."""
        sums = torch.tensor(state["sums"], dtype=torch.float64)
        rank, world_size = self._accelerator.process_index, self._accelerator.num_processes
        if len(sums) != world_size:
            sums = torch.cat([sums.sum(dim=0, keepdim=True), torch.zeros(world_size - 1, 3, dtype=torch.float64)])
        self.sums.copy_(sums[rank])
        self._epoch_sums, self.train_seconds = state["epoch_sums"], state["train_seconds"]
        # Earlier versions did not save `steps` and `seconds`.
        self._steps_before, self._seconds_before = state.get("steps", 0), state.get("seconds", 0.0)
