"""One update: rows of the global batch -> images -> loss -> gradients -> clip -> optimizer -> averaged weights."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import find_executable_batch_size, gather_object
from torch import Tensor, nn
from torch.optim import Optimizer

from mnist_dist.data import Batches, EpochPlan, Images, derive_seed
from mnist_dist.distributed.fsdp import unshard, unsharded_parameters
from mnist_dist.distributed.gradients import GradientClock
from mnist_dist.distributed.logical_shards import LogicalShards
from mnist_dist.engine.cuda_graph import CapturedStep
from mnist_dist.engine.distillation import Distillation
from mnist_dist.engine.ema import MovingAverage
from mnist_dist.engine.evaluation import evaluating
from mnist_dist.engine.metrics import Meter


class NotFinite(Exception):
    """A step's gradient is not finite; weights, buffers and counters are as they were before it, on all processes."""

    def __init__(self, step: int):
        super().__init__(f"the gradient of step {step} is not finite")
        self.step = step


def guards_on_device(optimizer: Optimizer, accelerator: Accelerator) -> bool:
    """Whether the optimizer's kernel can pass over a bad gradient itself, where asking the device means to wait."""
    return accelerator.device.type != "cpu" and accelerator.scaler is None and bool(optimizer.defaults.get("fused"))


def count_pieces(largest_share: int, micro_batch_size: int | None) -> int:
    """Into how many micro-batches each share of a batch is cut, by the largest of the shares."""
    return -(-largest_share // (micro_batch_size or largest_share))


class Update:
    """Computes this process's share of a global batch and makes the update that the whole batch asks for.

    The loss is the mean over the *global* batch: each process weighs its summed loss with world_size / batch size, so
    that the average over processes, which data parallel takes of gradients, is exact for uneven shares too.

    Args:
        model: as prepared by Accelerate. module: the same network, bare.
        data: images and labels on the device.
        micro_batch_size: samples computed at once; None for the whole share.
        average: averaged weights to keep up to date, or None.
        shards: the fixed pieces of the global batch to compute instead of this process's share, or None.
        meets_in_forward: the network communicates in its forward pass, so all processes must pass equally often.
        distillation: makes the loss against the labels one that learns from teachers too, or None.
        on_nonfinite: raise `NotFinite` before an update whose gradient is not finite, or pass over it. fp16's scaler
            passes over some to find its scale: there it is raised once the scale has fallen below 1.
        captured: replays full batches from one graph, or None.
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
        average: MovingAverage | None = None,
        clock: GradientClock | None = None,
        shards: LogicalShards | None = None,
        meets_in_forward: bool = False,
        distillation: Distillation | None = None,
        on_nonfinite: Literal["stop", "skip"] = "stop",
        captured: CapturedStep | None = None,
    ):
        self.accelerator, self.model, self.module, self.optimizer = accelerator, model, module, optimizer
        self.batches, self.data = batches, data
        self.meter, self.average, self.shards = meter, average, shards
        self.clock = clock or GradientClock()
        self.clip_grad_norm, self.label_smoothing = clip_grad_norm, label_smoothing
        self.micro_batch_size, self.meets_in_forward = micro_batch_size, meets_in_forward
        self.on_nonfinite, self.captured, self.distillation = on_nonfinite, captured, distillation
        self.latches = guards_on_device(optimizer, accelerator)
        # Written in place, never replaced: a captured step knows them by their address.
        device = accelerator.device
        self._norm = torch.zeros((), device=device)
        self._bad = torch.zeros((), dtype=torch.bool, device=device)
        self._found_inf = torch.zeros((), device=device)
        self._made, self._skipped = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
        self._first_bad = torch.full((), -1, dtype=torch.int64, device=device)
        self._last_step = -1

        self._parameters, self._buffers = list(module.parameters()), list(module.buffers())

    def __call__(self, plan: EpochPlan, index: int, step: int) -> None:
        """Trains on global batch `index` of the epoch; `step` counts updates from the start of the run.

        Raises:
            NotFinite: on all processes alike, for all see the same reduced gradient. Where that is judged on the device
                it is `check` that raises.
        """
        self._last_step = step
        self.meter.count_step(len(self.rows(plan, index)))
        if self.captured is None or not self.captured(self, plan, index, step):
            self.compute(plan, index, step)

    def compute(self, plan: EpochPlan, index: int, step: int) -> None:
        """What a step does on the device; also what is captured."""
        self.meter.begin_step()
        before = [buffer.clone() for buffer in self._buffers]
        self.optimizer.zero_grad()
        if self.shards is None:
            self._compute_share(plan, index, step)
        else:
            self._compute_shards(self.shards, plan, index, step)

        self._norm.copy_(self._clip())
        if self.accelerator.scaler is None:
            self._guard_nonfinite(before)
            if not self.latches and self._bad:
                self.check()
                return
            self.optimizer.step()
        else:  # fp16's scaler passes over a gradient that is not finite itself, and halves its scale
            self.optimizer.step()
            self._bad.copy_(~torch.isfinite(self._norm))
            self._skipped += self._bad
            self._take_back(before, self._bad)
        if self.average is not None:
            self.average.move(self.module, self._bad)

    def _compute_share(self, plan: EpochPlan, index: int, step: int) -> None:
        """Gradients of this process's rows; the last backward pass averages them over the processes."""
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        rows, weight = self.rows(plan, index), world_size / self.batches.size(index)
        if len(rows) == 0 and not self.meets_in_forward:
            # A short last batch can leave a process nothing, but all must meet in the reduction.
            rows, weight = plan.order[:1], 0.0
        self.seed(step, rank)
        pieces = self._pieces(rows, -(-self.batches.size(index) // world_size))
        for number, piece in enumerate(pieces, start=1):
            last = number == len(pieces)
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                self._accumulate(self.model, plan, piece, weight, reduces=last)

    def _compute_shards(self, shards: LogicalShards, plan: EpochPlan, index: int, step: int) -> None:
        """Gradients of this process's logical shards, each with its own random numbers; then the sum of all."""
        size = self.batches.size(index)
        used = min(shards.count, size)
        for shard in shards.each(used):
            self.seed(step, shard)
            rows = self.batches.rows(plan, index, rank=shard, world_size=shards.count)
            for piece in self._pieces(rows, len(rows)):
                self._accumulate(self.module, plan, piece, 1 / size)
        shards.combine(used)

    def seed(self, step: int, piece: int) -> None:
        """Dropout's random numbers follow from the step and the piece of its batch, so there is no state to save.

        For this device alone: the other kinds that `torch.manual_seed` seeds too cost a CPU 1 % of a step.
        """
        if self.captured is not None and self.captured.is_capturing:
            return  # each replay is seeded before it begins
        seed = derive_seed(self.batches.seed, step, piece)
        if self.accelerator.device.type in ("cpu", "cuda"):
            self._generator().manual_seed(seed)
        else:
            torch.manual_seed(seed)

    def drew(self, step: int) -> bool:
        """Whether `step`, the newest, drew random numbers: its seed alone would have left the generator otherwise."""
        after = self._generator().get_state()
        self.seed(step, 0)
        return not torch.equal(after, self._generator().get_state())

    def _generator(self) -> torch.Generator:
        device = self.accelerator.device
        return torch.cuda.default_generators[device.index or 0] if device.type == "cuda" else torch.default_generator

    def rows(self, plan: EpochPlan, index: int) -> Tensor:
        """The sample indices that this process computes."""
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        return self.batches.rows(plan, index, rank=rank, world_size=world_size)

    def _pieces(self, rows: Tensor, largest_share: int) -> tuple[Tensor, ...]:
        """Micro-batches; equally many on all processes where they meet in the forward pass."""
        count = count_pieces(largest_share, self.micro_batch_size)
        return rows.tensor_split(count if self.meets_in_forward else min(count, len(rows)))

    def _accumulate(
        self, model: nn.Module, plan: EpochPlan, rows: Tensor, weight: float, reduces: bool = False
    ) -> None:
        """Adds the gradient of `rows` (int64, sample indices)."""
        labels = self.data.labels[rows]
        images = self.inputs(plan, rows)
        logits = model(images).float()
        loss_sum = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=self.label_smoothing)
        if self.distillation is not None:
            loss_sum = self.distillation(loss_sum, images, logits)
        with self.clock.backward() if reduces else nullcontext():
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

    def _clip(self) -> Tensor:
        """Scales the gradient down where the recipe says so; its norm before that (scalar on the device)."""
        if self.clip_grad_norm is not None:
            return unshard(self.accelerator.clip_grad_norm_(self._parameters, self.clip_grad_norm))
        if self.accelerator.scaler is not None:
            self.accelerator.unscale_gradients(self.optimizer)
        return unshard(nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None]))

    def grad_norm(self) -> float:
        """Norm of the last update's gradient over all parameters, before clipping. Waits for the device."""
        self.check()
        return float(self._norm)

    @property
    def skipped(self) -> int:
        """Steps passed over so far, as of the last `check`. Waits for the device."""
        return int(self._skipped)

    # --- what can go wrong --------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raises NotFinite for the first step whose gradient was not, where the run shall stop. Waits for the device.

        To be asked before anything is made of the weights: since that step nothing has changed but the step's number,
        and steps that wait to be replayed together are made now.
        """
        if self.captured is not None:
            self.captured.finish(self)
        if self.accelerator.scaler is not None:
            # Whatever its scale, this gradient is not finite; the last of the steps passed over stands for all.
            if self.on_nonfinite == "stop" and self.accelerator.scaler.get_scale() < 1:
                self.accelerator.scaler.update(1.0)
                raise NotFinite(self._last_step)
        elif self.on_nonfinite == "stop" and self._bad:
            step = self._last_step - int(self._made - self._first_bad)
            self._bad.zero_()
            self._first_bad.fill_(-1)
            raise NotFinite(step)

    def _guard_nonfinite(self, before: list[Tensor]) -> None:
        """Has the update do nothing, and undoes what the forward pass did, if the gradient is not finite.

        On a GPU without waiting for it: the optimizer's kernel reads the flag, as it does for a gradient scaler, and
        steps after a bad one change nothing either until `check` is asked.
        """
        bad = ~torch.isfinite(self._norm)
        self._bad.copy_(bad if self.on_nonfinite == "skip" else self._bad | bad)
        self._made += 1  # the device counts for itself: result_keys it the step would be one more transfer
        if self.latches or self._bad:
            self._first_bad.copy_(torch.where(self._bad & (self._first_bad < 0), self._made, self._first_bad))
        if self.latches:
            self.optimizer.found_inf = self._found_inf.copy_(self._bad)  # type: ignore[attr-defined]  # torch reads it but declares it nowhere
        elif self._bad:
            self.optimizer.zero_grad()
        else:
            return
        self._skipped += self._bad
        self._take_back(before, self._bad)

    def _take_back(self, before: list[Tensor], bad: Tensor) -> None:
        """Undoes what a forward pass left in buffers and counters if `bad` (bool scalar on the device)."""
        for buffer, value in zip(self._buffers, before, strict=True):
            buffer.copy_(torch.where(bad, value, buffer))
        self.meter.forget_step(bad)

    @torch.no_grad()
    def offending_samples(self, step: int) -> list[tuple[int, list[int]]]:
        """For each rank whose rows of that step give a loss that is not finite: (rank, sample indices).

        Asks all processes. Samples are judged one by one (batch norm as in evaluation), so that one bad image does not
        accuse its batch.
        """
        epoch, index = divmod(step, self.batches.steps_per_epoch)
        plan = self.batches.plan(epoch, self.accelerator.device)
        rows, found = self.rows(plan, index), []
        with unsharded_parameters(self.module), evaluating(self.module):
            for row in rows:
                logits = self.module(self.inputs(plan, row[None])).float()
                if not torch.isfinite(F.cross_entropy(logits, self.data.labels[row[None]])):
                    found.append(int(row))
        return [
            (rank, samples) for rank, samples in gather_object([(self.accelerator.process_index, found)]) if samples
        ]

    def find_micro_batch_size(self, plan: EpochPlan) -> int:
        """The largest micro-batch that fits into memory, by halving the largest share; the same on all processes."""
        size = -(-self.batches.batch_size // self.accelerator.num_processes)

        def halve() -> int:
            nonlocal size
            size //= 2
            return size

        @find_executable_batch_size(starting_batch_size=size, reduce_batch_size_fn=halve)
        def attempt(size: int) -> None:
            labels = self.data.labels[plan.order[:size]]
            images = self.inputs(plan, plan.order[:size])
            logits = self.module(images).float()
            loss = F.cross_entropy(logits, labels)
            self.accelerator.backward(self.distillation(loss, images, logits) if self.distillation else loss)

        before = [buffer.clone() for buffer in self._buffers]
        attempt()
        self._take_back(before, torch.ones_like(self._bad))
        self.optimizer.zero_grad()
        return min(gather_object([size]))
