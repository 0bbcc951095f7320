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
    from mnist_dist.engine.train_step import Update

STEPS_A_REPLAY = 10
"""Of `engine.capture: epoch`; it divides the usual numbers of steps between two log lines."""
WARM_UP_STEPS = 3
"""Eager steps before the recording: kernels are chosen, and the optimizer's state gets its memory."""

Record = Callable[[Callable[[], None]], Callable[[], None]]
"""Records what a function does on the device, and returns what does it again."""


def capture_cuda_graph(body: Callable[[], object], stream: torch.cuda.Stream) -> Callable[[], None]:
    """The kernels of `body` as a CUDA graph; returns its replay."""
    graph = torch.cuda.CUDAGraph()
    # Other threads (W&B, the watchdog) may call CUDA while this one records.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        body()
    return graph.replay


class CapturedStep:
    """Makes an `Update`'s full batches by replaying recorded steps; the short last batch of an epoch stays eager.

    The first steps of a run, also of one that goes on, are eager: they are steps like all others and warm up what is
    recorded after them. A replay reads the rows, the epoch's warps and the learning rate from tensors that keep their
    place, and is seeded as an eager step is, so it makes the same numbers within rounding. Whatever Python decides in a
    forward pass is recorded as it was decided then.

    Args:
        steps: of one replay. More than one wait until so many have come together, or until `finish`. Each step of a
            network with dropout is seeded by its number, which one replay of several could not do: those get one.
        record: a CUDA graph unless a test says otherwise.
        say: hears, once, why a step could not be recorded, and from then on all steps are eager; or why not several.
    """

    def __init__(
        self,
        device: torch.device,
        steps: int = 1,
        record: Record | None = None,
        say: Callable[[str], None] = print,
    ):
        self.say = say
        self.is_capturing = False
        self.seconds = 0.0
        """What the recording took."""
        self._steps = steps
        self._stream = torch.cuda.Stream(device) if record is None else None
        self._record = record or self._capture_graph
        self._replay_one: Callable[[], None] | None = None
        self._replay_all: Callable[[], None] | None = None
        self._plan: EpochPlan | None = None
        """What a recorded step reads: the rows of `steps` batches as the order of an epoch, and its warps."""
        self._rates: Tensor | None = None
        """The learning rates of these batches, (steps, parameter groups)."""
        self._source: EpochPlan | None = None
        """Whose warps stand in `_plan`."""
        self._waiting: list[int] = []
        """Numbers of the steps whose rows and rates stand in `_plan` and are still to be made."""
        self._gradients: dict[Callable[[], None], list[Tensor | None]] = {}
        """Where each recording leaves the parameters' gradients."""
        self._last: Callable[[], None] | None = None
        """The replay that made the last step; None if it was an eager one."""
        self._warm, self._failed = 0, False

    def __call__(self, update: Update, plan: EpochPlan, index: int, step: int) -> bool:
        """Makes the update of global batch `index`, now or with others; False if it is the caller's to make eagerly."""
        if self._failed or update.batches.size(index) < update.batches.batch_size:
            self.finish(update)
            self._last = None
            return False
        if self._warm < WARM_UP_STEPS:
            self._warm += 1
            return self._warm_up(update, plan, index, step)
        if self._plan is None:
            self._prepare(update, plan, step)
        if plan is not self._source:
            self.finish(update)  # with the warps that they belong to
        self._take(update, plan, index)
        if self._replay_one is None and not self._try_to_capture(update, step):
            return False
        self._waiting.append(step)
        if len(self._waiting) == self._steps:
            assert self._replay_all is not None
            self._make(update, self._replay_all, step)
            self._waiting.clear()
        return True

    def finish(self, update: Update) -> None:
        """Makes the steps that wait. Whoever looks at weights, gradients or counters has this done before."""
        if self._waiting:
            assert self._replay_one is not None and self._plan is not None and self._rates is not None
            size, now = update.batches.batch_size, [group["lr"].clone() for group in update.optimizer.param_groups]
            for place, step in enumerate(self._waiting):  # the recorded single step reads the first place
                self._plan.order[:size].copy_(self._plan.order[place * size : (place + 1) * size])
                self._rates[0].copy_(self._rates[place])
                self._make(update, self._replay_one, step)
            for group, rate in zip(update.optimizer.param_groups, now, strict=True):
                group["lr"].copy_(rate)  # that of the newest step, which may be an eager one
            self._waiting.clear()
        if self._last is not None:
            for parameter, gradient in zip(update.module.parameters(), self._gradients[self._last], strict=True):
                parameter.grad = gradient

    def _make(self, update: Update, replay: Callable[[], None], step: int) -> None:
        update.seed(step, 0)
        replay()
        self._last = replay

    def _prepare(self, update: Update, plan: EpochPlan, step: int) -> None:
        """Makes the tensors that a recorded step reads, for as many steps as a replay can have."""
        # Never more than an epoch's full batches: a new epoch brings other warps.
        self._steps = min(self._steps, update.batches.num_samples // update.batches.batch_size)
        if self._steps > 1 and update.drew(step - 1):
            self._steps = 1
            self.say("engine.capture: the network draws random numbers, seeded at each step: one step a replay")
        rates_on_device(update.optimizer)
        order = plan.order[:1].repeat(self._steps * update.batches.batch_size)
        self._plan = EpochPlan(plan.epoch, order, None if plan.warps is None else plan.warps.clone())
        groups = update.optimizer.param_groups
        self._rates = torch.stack([group["lr"] for group in groups]).repeat(self._steps, 1)
        self._source = plan

    def _warm_up(self, update: Update, plan: EpochPlan, index: int, step: int) -> bool:
        """An eager step on the stream of the recording, where its kernels and gradients will be looked for."""
        if self._stream is None:
            return False
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            update.compute(plan, index, step)
        torch.cuda.current_stream().wait_stream(self._stream)
        return True

    def _take(self, update: Update, plan: EpochPlan, index: int) -> None:
        """Puts a batch's rows and rates, and a new epoch's warps, where the recorded steps look for them."""
        assert self._plan is not None and self._rates is not None
        place, size = len(self._waiting), update.batches.batch_size
        self._plan.order[place * size : (place + 1) * size].copy_(update.rows(plan, index))
        if self._steps > 1:
            self._rates[place].copy_(torch.stack([group["lr"] for group in update.optimizer.param_groups]))
        if plan.warps is not None and plan is not self._source:
            assert self._plan.warps is not None
            self._plan.warps.copy_(plan.warps)
        self._source = plan

    def _try_to_capture(self, update: Update, step: int) -> bool:
        def body(count: int) -> None:
            assert self._plan is not None and self._rates is not None
            for place in range(count):
                if self._steps > 1:  # a single step reads the rate where the schedule writes it
                    for group, rate in zip(update.optimizer.param_groups, self._rates[place], strict=True):
                        group["lr"].copy_(rate)
                update.compute(self._plan, place, step)

        def record(count: int) -> Callable[[], None]:
            replay = self._record(lambda: body(count))
            self._gradients[replay] = [parameter.grad for parameter in update.module.parameters()]
            return replay

        started = time.perf_counter()
        self.is_capturing = True
        try:
            self._replay_one = record(1)
            self._replay_all = record(self._steps) if self._steps > 1 else self._replay_one
        except Exception as error:  # whatever a network does that a graph cannot hold
            self._failed, self._replay_one = True, None
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            self.say(f"engine.capture: this step cannot be recorded ({reason}); all steps are eager")
            return False
        finally:
            self.is_capturing = False
            self.seconds = time.perf_counter() - started
        return True

    def _capture_graph(self, body: Callable[[], None]) -> Callable[[], None]:
        assert self._stream is not None
        return capture_cuda_graph(body, self._stream)


def rates_on_device(optimizer: Optimizer) -> None:
    """Turns every group's learning rate into a tensor beside its parameters, which a recorded step reads anew."""
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(float(group["lr"]), device=group["params"][0].device)
        if "capturable" in group:
            group["capturable"] = True
    optimizer._warned_capturable_if_run_uncaptured = True  # short batches stay eager


def capture_obstacle(
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
