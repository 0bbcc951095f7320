"""A training step as one CUDA graph: recorded once, replayed with new rows, learning rate and random seed.

The small networks here are bound by the launching of kernels, not by their work; a graph launches them all at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mnist_dist.data import EpochPlan

if TYPE_CHECKING:
    from mnist_dist.engine.step import Update

WARM_UP_STEPS = 3
"""Eager steps before the recording: kernels are chosen, and the optimizer's state gets its memory."""

Record = Callable[[Callable[[], None]], Callable[[], None]]
"""Records what a function does on the device, and returns what does it again."""


def record_cuda_graph(body: Callable[[], object], stream: torch.cuda.Stream) -> Callable[[], None]:
    """The kernels of `body` as a CUDA graph; returns its replay."""
    graph = torch.cuda.CUDAGraph()
    # Other threads (W&B, the watchdog) may call CUDA while this one records.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        body()
    return graph.replay


class CapturedStep:
    """Makes an `Update`'s full batches by replaying one recorded step; the short last batch of an epoch stays eager.

    The first steps of a run, also of one that goes on, are eager: they are steps like all others and warm up what is
    recorded after them. A replay reads the rows, the epoch's warps and the learning rate from tensors that keep their
    place, and is seeded as an eager step is, so it makes the same numbers within rounding. Whatever Python decides in a
    forward pass is recorded as it was decided then.

    Args:
        record: a CUDA graph unless a test says otherwise.
        say: hears, once, why a step could not be recorded; from then on all steps are eager.
    """

    def __init__(self, device: torch.device, record: Record | None = None, say: Callable[[str], None] = print):
        self.say = say
        self.is_recording = False
        self.seconds = 0.0
        """What the recording took."""
        self._stream = torch.cuda.Stream(device) if record is None else None
        self._record = record or self._record_graph
        self._replay: Callable[[], None] | None = None
        self._plan: EpochPlan | None = None
        self._source: EpochPlan | None = None
        """Whose warps stand in `_plan`."""
        self._warm, self._failed = 0, False

    def __call__(self, update: Update, plan: EpochPlan, index: int, step: int) -> bool:
        """Makes the update of global batch `index`; False if it is the caller's to make eagerly."""
        if self._failed or update.batches.size(index) < update.batches.batch_size:
            return False
        if self._warm < WARM_UP_STEPS:
            self._warm += 1
            return self._warm_up(update, plan, index, step)
        self._take(plan, update.rows(plan, index))
        if self._replay is None and not self._try_to_record(update, step):
            return False
        assert self._replay is not None
        update.seed(step, 0)
        self._replay()
        return True

    def _warm_up(self, update: Update, plan: EpochPlan, index: int, step: int) -> bool:
        """An eager step on the stream of the recording, where its kernels and gradients will be looked for."""
        if self._stream is None:
            return False
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            update.compute(plan, index, step)
        torch.cuda.current_stream().wait_stream(self._stream)
        return True

    def _take(self, plan: EpochPlan, rows: Tensor) -> None:
        """Puts a batch's rows, and a new epoch's warps, where the recorded step looks for them."""
        if self._plan is None:
            self._plan = EpochPlan(plan.epoch, rows.clone(), None if plan.warps is None else plan.warps.clone())
        else:
            self._plan.order.copy_(rows)
            if plan.warps is not None and plan is not self._source:
                assert self._plan.warps is not None
                self._plan.warps.copy_(plan.warps)
        self._source = plan

    def _try_to_record(self, update: Update, step: int) -> bool:
        static, started = self._plan, time.perf_counter()
        assert static is not None
        rates_on_device(update.optimizer)
        self.is_recording = True
        try:
            # The rows alone are the order of an epoch of one batch.
            self._replay = self._record(lambda: update.compute(static, 0, step))
        except Exception as error:  # whatever a network does that a graph cannot hold
            self._failed = True
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            self.say(f"engine.capture: this step cannot be recorded ({reason}); all steps are eager")
            return False
        finally:
            self.is_recording = False
            self.seconds = time.perf_counter() - started
        return True

    def _record_graph(self, body: Callable[[], None]) -> Callable[[], None]:
        assert self._stream is not None
        return record_cuda_graph(body, self._stream)


def rates_on_device(optimizer: Optimizer) -> None:
    """Turns every group's learning rate into a tensor beside its parameters, which a recorded step reads anew."""
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(float(group["lr"]), device=group["params"][0].device)
        if "capturable" in group:
            group["capturable"] = True


def why_not(
    device: torch.device, world_size: int, optimizer: Optimizer, *, moves_momentum: bool, scaler: bool,
    shards: bool, compile_mode: str | bool,
) -> str | None:  # fmt: skip
    """Why a run's steps cannot be captured, in words for the user; None if they can, as far as is known before."""
    if device.type != "cuda":
        return f"a {device.type} records no graphs"
    if world_size > 1:
        return "several processes reduce their gradients eagerly"
    if scaler:
        return "fp16's scaler has to ask the device at every step; bf16 does not"
    if shards:
        return "logical_shards are computed one by one"
    if moves_momentum:
        return "the schedule moves the momentum; schedule.cycle_momentum=false keeps it"
    if not optimizer.defaults.get("fused"):
        return f"{type(optimizer).__name__} has no fused kernel that reads its learning rate from the device"
    if compile_mode not in (False, True, "default"):
        return f"compile={compile_mode} makes graphs of its own"
    return None


def compile_network(module: nn.Module, mode: str | bool) -> None:
    """Has `torch.compile` compile the network's forward and backward pass at its first call; names stay as they are."""
    if mode:
        module.compile(mode=None if mode is True else mode)
