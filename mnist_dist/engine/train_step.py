"""The training step: rows of the global batch -> images -> loss -> gradient -> clip -> optimizer -> average."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.optim import Optimizer

from mnist_dist.data import Batch, Batches, EpochPlan, Images, Loader, derive_seed
from mnist_dist.data.batches import piece
from mnist_dist.distributed.fsdp import is_sharded, unshard, unsharded_parameters
from mnist_dist.distributed.gradients import FlatGradients, GradientClock
from mnist_dist.distributed.logical_shards import LogicalShards
from mnist_dist.engine.distillation import Distillation
from mnist_dist.engine.ema import MovingAverage
from mnist_dist.engine.evaluation import evaluating
from mnist_dist.engine.guard import Guard, UpdateGuard
from mnist_dist.engine.label_loss import LabelLoss
from mnist_dist.engine.metrics import Meter
from mnist_dist.engine.optimizers import keeps_state_on_device
from mnist_dist.engine.shares import Shares, count_micro_batches


class NotFinite(Exception):
    """Raised on every process when the gradient of a step contains inf or NaN.

    Weights, buffers and counters are as they were before that step.
    """

    def __init__(self, step: int):
        super().__init__(f"the gradient of step {step} is not finite")
        self.step = step


@dataclass(frozen=True)
class StepSettings:
    """The recipe's settings of a training step."""

    clip_grad_norm: float | None = None
    """Largest norm of the gradient; None: no clipping."""
    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] | None = None
    """Weight of each class in the loss, which is the weighted mean over the global batch; None: all 1."""
    micro_batch_size: int | None = None
    """Samples per forward and backward pass; None: all samples of this process.

    Apart from rounding, it changes the update only of a network with batch norm or dropout.
    """
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What happens after a gradient that is not finite: raise `NotFinite`, or continue with the next step."""


@dataclass(frozen=True)
class TrainedNetwork:
    """The network that a step trains, and the objects that change its weights."""

    module: nn.Module
    """The network, with Accelerate's autocast."""
    optimizer: Optimizer
    average: MovingAverage | None = None
    """Averaged weights, updated after every step."""
    reduction: FlatGradients | None = None
    """Sums the gradient over the processes; None: one process, or FSDP2 averages the gradient in the backward pass."""
    shards: LogicalShards | None = None
    """Computes fixed shards of the global batch instead of this process's share."""
    communicates_in_forward: bool = False
    """Whether the forward pass is collective, as with synchronized batch norm.

    All processes then run the same number of forward passes.
    """


def guards_on_device(optimizer: Optimizer, accelerator: Accelerator) -> bool:
    """Returns whether the device skips or undoes a bad update, so that the host need not wait for it."""
    return accelerator.device.type == "cuda" and accelerator.scaler is None and keeps_state_on_device(optimizer)


class TrainStep:
    """Computes the gradient of this process's share of a global batch, then makes the update of the global batch.

    The loss is the mean over the *global* batch: gradients are summed over the processes, and each process divides its
    summed loss by the size of the global batch. The result is exact for shares of unequal size too.

    A step whose gradient contains inf or NaN changes no weight, buffer or counter. There are three ways to detect it:

    - On a CPU, and for an optimizer with state on the host, the host reads a flag once after the backward passes.
    - Otherwise the flag stays on the GPU, and the host never waits. The fused kernel of an optimizer reads the flag and
      skips the update; the update of an optimizer without such a kernel is undone. The norm of the gradient is computed
      only when it is clipped or read, or when the gradient is sharded. With on_nonfinite="stop" the flag stays set, so
      no later step changes anything until `check` raises `NotFinite`.
    - In fp16 the GradScaler skips such steps while it looks for a scale. With on_nonfinite="stop", `check` raises
      `NotFinite` once the scale is below 1: the gradient is then not finite at any scale.

    Args:
        data: training images and labels, on the device or on the CPU.
        ahead: whether a thread loads the next batch; needed if `data` is not on the device.
        clock: measures how long this process waits for the gradients of the others.
        distillation: adds the loss against teachers to the loss against the labels.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        network: TrainedNetwork,
        batches: Batches,
        data: Images,
        meter: Meter,
        settings: StepSettings | None = None,
        *,
        ahead: bool = False,
        clock: GradientClock | None = None,
        distillation: Distillation | None = None,
    ):
        settings = settings or StepSettings()
        self.accelerator, self.batches, self.data, self.meter = accelerator, batches, data, meter
        self.module, self.optimizer = network.module, network.optimizer
        self.average, self.shards, self.reduction = network.average, network.shards, network.reduction
        self.communicates_in_forward = network.communicates_in_forward
        rank, world_size, shards = accelerator.process_index, accelerator.num_processes, network.shards
        count = None if shards is None else shards.count
        self.shares = Shares(rank, world_size, count, network.communicates_in_forward)
        self._loader = Loader(data, self.shares.loaded, accelerator.device, ahead)
        self._label_loss = LabelLoss(settings.label_smoothing, settings.class_weights, accelerator.device)
        self.clip_grad_norm = settings.clip_grad_norm
        self.micro_batch_size, self.on_nonfinite = settings.micro_batch_size, settings.on_nonfinite
        self.clock, self.distillation = clock or GradientClock(), distillation
        self.seeds_itself = True
        """Whether `compute` seeds the random generator. False while the caller seeds it instead."""
        self._norm = torch.zeros((), device=accelerator.device)
        self._last_step, self._parameters = -1, list(self.module.parameters())
        buffers = list(dict.fromkeys(self.module.buffers()))
        self._guard = Guard(meter.sums, buffers, stays_set=self.on_nonfinite == "stop")
        self.guard_is_on_device = guards_on_device(self.optimizer, accelerator)
        is_fused = bool(self.optimizer.defaults.get("fused"))
        self._update_guard = UpdateGuard(self.optimizer) if self.guard_is_on_device and not is_fused else None
        is_sharded_here = any(map(is_sharded, self._parameters))
        self._norm_is_needed = self.clip_grad_norm is not None or not self.guard_is_on_device or is_sharded_here
        """Whether a step computes the norm of the gradient."""

    def __call__(self, plan: EpochPlan, index: int, step: int) -> None:
        """Trains on global batch `index` of the epoch; `step` counts updates from the start of the run.

        Collective: call on every rank.

        Raises:
            NotFinite: on every process, because all see the same reduced gradient. If the device guards the step,
                `check` raises it instead.
        """
        self.count_step(index, step)
        self.compute(self.load(plan, index), step)

    def count_step(self, index: int, step: int) -> None:
        """Counts a step on the host."""
        self._last_step = step
        self.meter.count_step(len(self.shares.own(self.batches.size(index))))

    def load(self, plan: EpochPlan, index: int) -> Batch:
        """Returns this process's part of global batch `index` of the epoch."""
        batch = self._loader.load(self.batches, plan, index)
        return self._label_loss.weigh(batch, self.batches, plan, index, self.data.labels)

    def compute(self, batch: Batch, step: int) -> None:
        """Computes a step on the device. Can be captured and replayed if the guard is on the device."""
        self._guard.store()
        self.optimizer.zero_grad()
        if self.shards is None:
            self._compute_share(batch, step)
        else:
            self._compute_shards(self.shards, batch, step)

        if self._norm_is_needed:
            self._norm.copy_(self._clip())
        if self.accelerator.scaler is None:
            if self._guard_nonfinite():
                self.check()
                return
            if self._update_guard is not None:
                self._update_guard.store()
            self.optimizer.step()
            if self._update_guard is not None:
                self._update_guard.undo(self._guard.bad)
        else:  # GradScaler skips a gradient that is not finite and halves its scale
            self.optimizer.step()
            self._guard.bad.copy_(~torch.isfinite(self._norm))
            self._guard.undo()
        if self.average is not None:
            self.average.move(self.module, self._guard.found_inf if self.guard_is_on_device else self._guard.bad)

    def _compute_share(self, batch: Batch, step: int) -> None:
        """Computes the gradient of this process's rows, then the sum over the processes."""
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        scale = 1 if self.reduction else world_size  # FSDP2 averages over the processes
        weight = scale / batch.size if self.shares.own(batch.size) else 0.0
        self.seed(step, rank)
        *others, last = self._micro_batches(batch, -(-batch.size // world_size))
        for micro_batch in others:
            self._accumulate(micro_batch, weight)
        if self.reduction is not None:
            self.reduction.start()
        self._accumulate(last, weight)
        if self.reduction is not None:
            self.reduction.finish()

    def _compute_shards(self, shards: LogicalShards, batch: Batch, step: int) -> None:
        """Computes the gradient of this process's logical shards, then the sum over all shards of all processes."""
        used = min(shards.count, batch.size)
        for shard in shards.each(used):
            self.seed(step, shard)
            positions = piece(batch.size, shard, shards.count)
            part = batch[positions.start - batch.start : positions.stop - batch.start]
            for micro_batch in self._micro_batches(part, len(part)):
                self._accumulate(micro_batch, 1 / batch.size)
        shards.combine(used)

    def seed(self, step: int, share: int) -> None:
        """Seeds dropout from the step and the number of the share or shard, so a checkpoint needs no random state.

        Only the generator of this device is seeded: `torch.manual_seed`, which seeds those of other device types too,
        costs a CPU 1 % of a step.
        """
        if not self.seeds_itself:
            return
        seed = derive_seed(self.batches.seed, step, share)
        if self.accelerator.device.type in ("cpu", "cuda"):
            self._generator().manual_seed(seed)
        else:
            torch.manual_seed(seed)

    def used_random_numbers(self, step: int) -> bool:
        """Returns whether `step`, the latest one, drew random numbers, as a network with dropout does."""
        after = self._generator().get_state()
        self.seed(step, self.accelerator.process_index)  # a step that draws nothing leaves the generator in this state
        return not torch.equal(after, self._generator().get_state())

    def _generator(self) -> torch.Generator:
        if (device := self.accelerator.device).type != "cuda":
            return torch.default_generator
        return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]

    def _micro_batches(self, batch: Batch, largest_share: int) -> list[Batch]:
        """Splits a batch into micro-batches. All processes have equally many if the forward pass is collective."""
        count = count_micro_batches(largest_share, self.micro_batch_size)
        return batch.split(count if self.communicates_in_forward else min(count, len(batch)))

    def _accumulate(self, batch: Batch, weight: float) -> None:
        """Adds the gradient of a micro-batch, whose summed loss is multiplied by `weight`."""
        images, targets = self.inputs(batch), self.targets(batch)
        logits = self.module(images).float()
        loss_sum = self._label_loss(logits, targets, batch.scale)
        if self.distillation is not None:
            loss_sum = self.distillation(loss_sum, images, logits)
        # The same as the gradient of loss_sum * weight, without a kernel for the product.
        self.accelerator.backward(loss_sum, gradient=torch.full_like(loss_sum, weight))
        if weight:
            self.meter.add(loss_sum.detach(), logits.detach(), targets)

    def inputs(self, batch: Batch) -> Tensor:
        """Returns the augmented and normalised images of a batch, float32 (n, C, H, W)."""
        return batch.images if batch.is_prepared else self.data.normalize(self.batches.augmented(batch))

    def targets(self, batch: Batch) -> Tensor:
        """Returns the labels, int64 (n,), or for mixed images the classes' probabilities, float32 (n, classes)."""
        return self.batches.targets(batch, len(self.data.classes))

    def _clip(self) -> Tensor:
        """Clips the gradient if the recipe asks for it; returns its norm before clipping (scalar on the device)."""
        if self.clip_grad_norm is not None:
            return unshard(self.accelerator.clip_grad_norm_(self._parameters, self.clip_grad_norm))
        if self.accelerator.scaler is not None:
            self.accelerator.unscale_gradients(self.optimizer)
        return self._total_norm()

    def _total_norm(self) -> Tensor:
        return unshard(nn.utils.get_total_norm(self._gradients()))

    def _gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self._parameters if parameter.grad is not None]

    def health(self) -> tuple[Tensor, Tensor]:
        """Returns the norm of the last gradient over all parameters before clipping, and whether a gradient was bad.

        Both are scalars on the device. If the second is true, `check` may raise `NotFinite`.
        """
        if not self._norm_is_needed:  # else every step computes it
            self._norm.copy_(self._total_norm())
        return self._norm, self._guard.bad

    @property
    def skipped(self) -> int:
        """Number of steps skipped so far because their gradient was not finite. Waits for the device."""
        return self._guard.skipped

    # --- gradients that are not finite ----------------------------------------------------------------------------

    def check(self) -> None:
        """Raises NotFinite if a step since the last check had a bad gradient and on_nonfinite is "stop".

        Waits for the device. Call it before weights, gradients or counters are used: no step after the bad one has
        changed them.
        """
        if self.accelerator.scaler is not None:
            if self.on_nonfinite == "stop" and self.accelerator.scaler.get_scale() < 1:
                self.accelerator.scaler.update(1.0)
                raise NotFinite(self._last_step)  # all skipped steps had a bad gradient; this names the last one
        elif self.on_nonfinite == "stop" and self._guard.bad:
            # The flag stays set, so all steps since the first bad one were skipped too.
            raise NotFinite(self._last_step - self._guard.take() + 1)

    def _guard_nonfinite(self) -> bool:
        """Undoes the step if the gradient is not finite, and has a fused kernel skip the update.

        Returns:
            Whether the host must skip the update. To know it the host waits for the device, once.
        """
        if self.guard_is_on_device:
            self._guard.find_on_device([self._norm] if self._norm_is_needed else self._gradients())
            if self._update_guard is None:
                self.optimizer.found_inf = self._guard.found_inf  # type: ignore[attr-defined]  # torch reads this attribute but does not declare it
        else:
            self._guard.find(self._norm)
            if not self._guard.bad:
                return False
            self.optimizer.zero_grad()
        self._guard.undo()
        return not self.guard_is_on_device

    @torch.no_grad()
    def offending_samples(self, step: int) -> list[tuple[int, list[int]]]:
        """Returns (rank, sample indices) for each rank that has samples with a non-finite loss at `step`.

        Collective: call on every rank. Samples are evaluated one by one, with batch norm in eval mode, so that one bad
        image does not make the losses of other images non-finite.
        """
        epoch, index = divmod(step, self.batches.steps_per_epoch)
        plan, found = self.batches.plan(epoch), []
        batch, order = self.load(plan, index), plan.order[index * self.batches.batch_size :]
        with unsharded_parameters(self.module), evaluating(self.module):
            for number in range(len(batch) if self.shards or self.shares.own(batch.size) else 0):
                sample = batch[number : number + 1]
                if not torch.isfinite(F.cross_entropy(self.module(self.inputs(sample)).float(), self.targets(sample))):
                    found.append(int(order[batch.start + number]))
        return [
            (rank, samples) for rank, samples in gather_object([(self.accelerator.process_index, found)]) if samples
        ]
