"""Measures inference time of a recipe's network, for one image and for batches.

The network runs eagerly, compiled, captured as a CUDA graph, and in ONNX Runtime. It has its initial weights. The
images are normalised and on the device. Each call is synchronized before the next one.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mnist_dist.benchmark.baselines import BenchmarkSetup, captured, fastest_kernels, median_and_range
from mnist_dist.engine.precision import PRECISION_NAMES
from mnist_dist.errors import Problem, RecipeError, RunError
from mnist_dist.recipe.schema import Recipe
from mnist_dist.run.model_setup import build_module
from mnist_dist.run.onnx_model import export_onnx, open_session, trace_program

Call = Callable[[], object]
"""Computes the logits of one fixed batch."""
HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime", "onnxscript"))
LONGEST_ROUND = 0.25
"""Seconds. A round makes fewer calls than requested if they would take longer."""


@fastest_kernels()
def measure_inference(recipe: Recipe, batch_sizes: list[int], rounds: int, calls: int) -> dict[str, Any]:
    """Measures all backends at each batch size, in interleaved rounds.

    Args:
        rounds: number of rounds per backend and batch size.
        calls: largest number of calls per round.

    Returns:
        Plain values. `ms_per_call` is batch size -> backend -> median, min and max.

    Raises:
        RecipeError: there are several processes; or from `BenchmarkSetup.prepare`.
    """
    setup = BenchmarkSetup.prepare(recipe)
    if setup.state.num_processes > 1:
        size = setup.state.num_processes
        message = f"inference is timed in one process, but {size} are running; start it without a launcher"
        raise RecipeError([Problem("the launcher", "--inference", message, "unsupported")])
    session = _session_if_possible(setup)
    times = {str(size): _measure_batch(setup, session, size, rounds, calls) for size in batch_sizes}
    return setup.about() | {"rounds": rounds, "calls_per_round": calls, "ms_per_call": times}


def _session_if_possible(setup: BenchmarkSetup) -> Any:
    """Returns a session of ONNX Runtime; None if the package is missing or the network cannot be exported."""
    if not HAS_ONNX:
        return None
    try:
        return onnx_session(setup)
    except RecipeError as error:
        print(f"ONNX Runtime is not measured: {error.problems[0].message}", file=sys.stderr)
    except RunError as error:
        print(f"ONNX Runtime is not measured: {error}", file=sys.stderr)
    return None


def _measure_batch(
    setup: BenchmarkSetup, session: Any, size: int, rounds: int, calls: int
) -> dict[str, dict[str, float]]:
    """Returns the milliseconds per call of each backend for a batch of `size` images."""
    rows = torch.arange(size) % len(setup.dataset.test)
    images = setup.dataset.test.normalize(setup.dataset.test.images[rows]).to(setup.state.device)
    backends = torch_backends(setup, images) | ({} if session is None else onnx_backend(session, images))
    repeats = {}
    for name, call in backends.items():
        _time(setup, call, 3)  # chooses kernels and allocates memory
        repeats[name] = max(1, min(calls, int(LONGEST_ROUND / _time(setup, call, 1))))
    milliseconds: dict[str, list[float]] = {name: [] for name in backends}
    for _ in range(rounds):
        for name, call in backends.items():
            milliseconds[name].append(1000 * _time(setup, call, repeats[name]) / repeats[name])
    return {name: median_and_range(each, 5) for name, each in milliseconds.items()}


def torch_backends(setup: BenchmarkSetup, images: Tensor) -> dict[str, Call]:
    """Returns the ways in which PyTorch can compute the logits of `images` on this device, by name."""
    module, precision = setup.module().eval(), PRECISION_NAMES[setup.precision]

    def call_of(network: Any) -> Call:
        @torch.inference_mode()
        def call() -> Tensor:
            with setup.autocast():
                return network(images)

        return call

    backends = {f"eager, {precision}": call_of(module)}
    if setup.is_compiled:
        backends[f"compiled, {precision}"] = call_of(torch.compile(module))
    if setup.state.device.type == "cuda":
        backends[f"captured, {precision}"] = captured(call_of(module))
    return backends


def onnx_backend(session: Any, images: Tensor) -> dict[str, Call]:
    """Returns ONNX Runtime's computation of the logits, by name. It reads and writes the memory of the host."""
    provider = session.get_providers()[0].removesuffix("ExecutionProvider")
    feed = {session.get_inputs()[0].name: images.cpu().numpy()}
    return {f"ONNX Runtime ({provider}), fp32": lambda: session.run(None, feed)}


def onnx_session(setup: BenchmarkSetup) -> Any:
    """Returns a session of ONNX Runtime for batches of any size, on the GPU if its package supports it.

    Raises:
        RecipeError: the network cannot be exported.
        RunError: ONNX Runtime cannot run the exported network.
    """
    module = build_module(setup.recipe, setup.dataset).eval()
    example = setup.dataset.test.normalize(setup.dataset.test.images[:2])
    program = trace_program(module, example, setup.recipe.model.name)
    model = export_onnx(program, setup.recipe.model.name)
    return open_session(model.SerializeToString(), setup.state.device)


def _time(setup: BenchmarkSetup, call: Call, count: int) -> float:
    started = time.perf_counter()
    for _ in range(count):
        call()
        setup.synchronize()
    return time.perf_counter() - started
