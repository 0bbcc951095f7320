"""Runs the training step as a CUDA graph: captured once, then replayed with new rows, learning rate and random seed.

Small networks spend more of a GPU step on launching kernels than on computing. A graph launches all kernels at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.optim import Optimizer

from mnist_dist.data import Batch, Batches, EpochPlan
from mnist_dist.engine.train_step import TrainStep
from mnist_dist.errors import first_line

STEPS_PER_REPLAY = 10
"""Steps per replay with `engine.capture: epoch`. The usual values of `log_every` are multiples of it, so a log line
rarely comes in the middle of a replay."""
WARM_UP_STEPS = 3
"""Eager steps before the capture. They choose kernels and allocate the optimizer's state."""

Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Captures the work that a function gives to the device; returns a function that replays it."""


def capture_cuda_graph(body: Callable[[], object], stream: torch.cuda.Stream) -> Callable[[], None]:
    """Captures the kernels of `body` as a CUDA graph; returns its replay.

    The graph is freed with the last reference to its replay. NCCL's process group cannot end before that. The tensors
    that `body` uses and did not allocate itself must live as long.

    Raises:
        Exception: `body` cannot be captured. Stream and random generator are as before, and the memory is free again.
    """
    graph, usual = torch.cuda.CUDAGraph(), torch.cuda.current_stream(stream.device)
    generator = torch.cuda.default_generators[stream.device.index]
    state = generator.clone_state()
    # PyTorch keeps a workspace of cuBLAS for every stream. The stream's workspace of the warm-up can be freed while the
    # graph still uses it: Lightning's Trainer, for one, frees all of them when it starts. Without this workspace, the
    # capture allocates another one, which belongs to the graph. PyTorch without CUDA, as in tests, lacks the function.
    if hasattr(torch._C, "_cuda_clearCublasWorkspaces"):
        torch._C._cuda_clearCublasWorkspaces()
    try:
        # Other threads (W&B, NCCL, the watchdog) may call CUDA during the capture. The outer context restores the
        # stream: PyTorch does not if the end of the capture fails, as it does after an operation that failed.
        with torch.cuda.stream(usual), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            body()
    except Exception as error:
        generator.graphsafe_set_state(state)  # some versions of PyTorch leave it in the middle of a capture
        graph.reset()
        raise error.__context__ or error from None  # the first error names the operation
    return graph.replay


class CapturedStep:
    """Wraps a `TrainStep` and replays a CUDA graph of it. Has the same methods as `TrainStep`.

    A graph has fixed shapes, so the short last batch of an epoch runs eagerly. The first steps run eagerly too, also
    after a resume. These warm-up steps are ordinary training steps. With several processes, a replay contains the
    reduction of gradients, so all ranks capture and replay at the same steps, or none does.

    A graph reads its inputs from fixed memory. Images, labels, random changes and learning rates are copied there
    before each replay, and the random generator is seeded as before an eager step. Eager steps read the learning rate
    from the device too, so with deterministic kernels both kinds of step must give the same bytes; a test on a GPU
    compares them.
    Python code in a forward pass runs only during the capture. Every replay repeats the operations of that one pass,
    even if they depend on an `if`.

    Args:
        steps: number of steps in one replay. If there are several, a step waits until enough steps have been collected
            or `finish` is called. A network with dropout gets one step per replay, because every step has its own seed
            and a replay can be seeded only once.
        capture: captures a function; None for a CUDA graph. Tests pass a stand-in.
        notify: called with a message if the step cannot be captured (all steps then run eagerly), or if a replay can
            hold only one step.
    """

    def __init__(
        self,
        step: TrainStep,
        steps: int = 1,
        capture: Capture | None = None,
        notify: Callable[[str], None] = print,
    ):
        self.optimizer, self.data, self.average, self.clock = step.optimizer, step.data, step.average, step.clock
        self.notify = notify
        self.seconds = 0.0
        """Duration of the capture."""
        self._step = step
        self._steps = steps
        rates_on_device(step.optimizer)
        self._stream: torch.cuda.Stream | None = None
        if capture is None:
            self._stream = torch.cuda.Stream(step.accelerator.device)
            # Not a method of this object: a reference cycle would keep graphs until the next garbage collection.
            capture = partial(capture_cuda_graph, stream=self._stream)
        self._capture = capture
        self._replay_one: Callable[[], None] | None = None
        self._replay_all: Callable[[], None] | None = None
        self._inputs: list[Batch] = []
        """The batches that the captured steps read."""
        self._rates: Tensor | None = None
        """The learning rates of these batches, (steps, parameter groups)."""
        self._waiting: list[int] = []
        """Numbers of the steps whose batches and rates are in `_inputs` and `_rates`, and which have not run yet."""
        self._gradients: dict[Callable[[], None], list[Tensor | None]] = {}
        """The parameters' gradients that each replay writes."""
        self._last_replay: Callable[[], None] | None = None
        """The replay that made the last step; None if that step was eager."""
        self._warm_up_steps, self._failed = 0, False

    @property
    def batches(self) -> Batches:
        """The batches of the wrapped step."""
        return self._step.batches

    @batches.setter
    def batches(self, batches: Batches) -> None:
        self._step.batches = batches

    def __call__(self, plan: EpochPlan, index: int, step: int) -> None:
        """Trains on global batch `index` of the epoch, now, or later in a replay of several steps."""
        self._step.count_step(index, step)
        batch = self._step.load(plan, index)
        if self._failed or batch.size < self.batches.batch_size:
            self.finish()
            self._last_replay = None
            self._step.compute(batch, step)
        elif self._warm_up_steps < WARM_UP_STEPS:
            self._warm_up_steps += 1
            self._warm_up(batch, step)
        else:
            self._replay_step(batch, step)

    def check(self) -> None:
        """Runs the waiting steps, then checks for a gradient that is not finite, as `TrainStep.check`."""
        self.finish()
        self._step.check()

    def health(self) -> tuple[Tensor, Tensor]:
        """Runs the waiting steps, then returns what `TrainStep.health` returns."""
        self.finish()
        return self._step.health()

    @property
    def skipped(self) -> int:
        """Number of steps skipped so far, as `TrainStep.skipped`. Does not include waiting steps."""
        return self._step.skipped

    def offending_samples(self, step: int) -> list[tuple[int, list[int]]]:
        """Returns the samples with a non-finite loss at `step`, as `TrainStep.offending_samples`."""
        return self._step.offending_samples(step)

    def close(self) -> None:
        """Frees the graphs. Call it before the process group ends: NCCL waits for the end of all graphs that use it."""
        self._replay_one = self._replay_all = self._last_replay = None
        self._gradients.clear()

    def finish(self) -> None:
        """Runs the waiting steps. `check` calls it. Call it before weights, gradients or counters are used."""
        if self._waiting:
            assert self._replay_one is not None and self._rates is not None
            groups = self.optimizer.param_groups
            newest = [group["lr"].clone() for group in groups]
            for slot, step in enumerate(self._waiting):  # the graph of one step reads the first slot
                if slot:
                    self._inputs[0].copy_(self._inputs[slot])
                    self._rates[0].copy_(self._rates[slot])
                self._replay(self._replay_one, step)
            for group, rate in zip(groups, newest, strict=True):
                group["lr"].copy_(rate)  # the rate of the newest step, which may be an eager one
            self._waiting.clear()
        if self._last_replay is not None:
            gradients = self._gradients[self._last_replay]
            for parameter, gradient in zip(self._step.module.parameters(), gradients, strict=True):
                parameter.grad = gradient

    def _replay_step(self, batch: Batch, step: int) -> None:
        """Copies a step's inputs, captures the step if it is not captured yet, and replays once enough steps wait."""
        if not self._inputs:
            self._allocate_inputs(batch, step)
        self._copy_inputs(batch)
        if self._replay_one is None and not self._try_to_capture(step):
            self._step.compute(batch, step)
            return
        self._waiting.append(step)
        if len(self._waiting) == self._steps:
            assert self._replay_all is not None
            self._replay(self._replay_all, step)
            self._waiting.clear()

    def _replay(self, replay: Callable[[], None], step: int) -> None:
        self._step.seed(step, self._step.accelerator.process_index)
        replay()
        self.clock.reductions += 1
        self._last_replay = replay

    def _warm_up(self, batch: Batch, step: int) -> None:
        """Runs an eager step on the stream of the capture, because the capture reuses its gradients and workspaces."""
        if self._stream is None:
            self._step.compute(batch, step)
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._step.compute(batch, step)
        torch.cuda.current_stream().wait_stream(self._stream)

    def _allocate_inputs(self, batch: Batch, step: int) -> None:
        """Allocates the tensors that a captured step reads, for the steps of one replay."""
        # An evaluation after an epoch ends a replay early, so more slots than full batches would never be filled.
        self._steps = min(self._steps, self.batches.num_samples // self.batches.batch_size)
        if self._steps > 1 and self._step.used_random_numbers(step - 1):
            self._steps = 1
            self.notify("engine.capture: one step per replay, because the network draws random numbers at every step")
        self._inputs = [batch.clone() for _ in range(self._steps)]
        self._rates = torch.stack([group["lr"] for group in self.optimizer.param_groups]).repeat(self._steps, 1)

    def _copy_inputs(self, batch: Batch) -> None:
        """Copies a batch and its learning rates to the tensors that the captured steps read."""
        assert self._rates is not None
        slot = len(self._waiting)
        self._inputs[slot].copy_(batch)
        if self._steps > 1:
            self._rates[slot].copy_(torch.stack([group["lr"] for group in self.optimizer.param_groups]))

    def _try_to_capture(self, step: int) -> bool:
        """Captures one step, and several if a replay holds several; returns whether that succeeded on all ranks."""

        def body(count: int) -> None:
            assert self._rates is not None
            for slot in range(count):
                if self._steps > 1:  # a single step reads the rate where the schedule writes it
                    for group, rate in zip(self.optimizer.param_groups, self._rates[slot], strict=True):
                        group["lr"].copy_(rate)
                self._step.compute(self._inputs[slot], step)

        def capture(count: int) -> Callable[[], None]:
            replay = self._capture(lambda: body(count))
            self._gradients[replay] = [parameter.grad for parameter in self._step.module.parameters()]
            return replay

        started, failure = time.perf_counter(), ""
        self._step.seeds_itself = False  # the generator cannot be seeded during a capture; `_replay` seeds it
        try:
            self._replay_one = capture(1)
            self._replay_all = capture(self._steps) if self._steps > 1 else self._replay_one
        except Exception as error:  # a network may contain operations that a graph cannot contain
            failure = first_line(error)
        finally:
            self._step.seeds_itself = True
            self.seconds = time.perf_counter() - started
        if failures := [each for each in gather_object([failure]) if each]:
            self._failed = True
            self.close()
            if self._step.accelerator.is_main_process:
                self.notify(f"engine.capture: all steps run eagerly, because a step cannot be captured: {failures[0]}")
        return not failures


def rates_on_device(optimizer: Optimizer) -> None:
    """Replaces every group's learning rate by a tensor on the parameters' device, which each replay reads."""
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(float(group["lr"]), device=group["params"][0].device)
        if "capturable" in group:
            group["capturable"] = True
    optimizer._warned_capturable_if_run_uncaptured = True  # short batches run eagerly, and PyTorch would warn about it


def capture_obstacle(
    device: torch.device, optimizer: Optimizer, *, moves_momentum: bool, scaler: bool, shards: bool, fsdp: bool,
    allows_unused: bool, compile_mode: str | bool,
) -> str | None:  # fmt: skip
    """Returns the reason, for the user, why a run's steps cannot be captured; None if no reason is known yet."""
    if device.type != "cuda":
        return f"CUDA graphs need a CUDA device (this run uses {'the CPU' if device.type == 'cpu' else device.type})"
    if fsdp:
        return "FSDP2 gathers parameters during the step, which is not captured"
    if allows_unused:
        return "ddp.find_unused_parameters waits for the device at every step"
    if scaler:
        return "fp16's gradient scaler waits for the device at every step; use mixed_precision=bf16"
    if shards:
        return "logical_shards computes the shards one after another, which is not captured"
    if moves_momentum:
        return "the schedule changes the momentum; set schedule.cycle_momentum=false to keep it constant"
    if not optimizer.defaults.get("fused"):
        return f"{type(optimizer).__name__} has no fused kernel that reads its learning rate from the device"
    if compile_mode not in (False, True, "default"):
        return f"compile={compile_mode} captures its own CUDA graphs"
    return None
