"""How long a recipe's network takes to answer: one image and batches; eager, compiled, captured, in ONNX Runtime.

The weights are the initial ones, the images lie normalised on the device, and each answer is waited for.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mnist_dist.benchmark.baselines import PRECISIONS, BenchmarkSetup, captured, fastest_kernels, median_and_range
from mnist_dist.errors import Problem, RecipeError
from mnist_dist.recipe.schema import Recipe
from mnist_dist.run.model_setup import build_module

Answer = Callable[[], object]
HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnxruntime", "onnxscript"))
ENOUGH = 0.25
"""Seconds after which a round makes no further call, however many were asked for."""


@fastest_kernels()
def measure_inference(recipe: Recipe, batch_sizes: list[int], rounds: int, calls: int) -> dict[str, Any]:
    """Interleaved rounds of up to `calls` calls at each batch size; returns the table as plain values.

    Raises:
        RecipeError: the world is of several processes, or what `BenchmarkSetup.prepare` finds.
    """
    task = BenchmarkSetup.prepare(recipe)
    if task.state.num_processes > 1:
        raise RecipeError([Problem("the launcher", "", "inference is timed in one process, not in several")])
    session, found = None, {}
    if HAS_ONNX:
        try:
            session = onnx_session(task)
        except Exception as error:  # what cannot be exported fails in many ways; PyTorch's figures need no file
            print(f"no ONNX Runtime: {type(error).__name__}, the network cannot be exported", file=sys.stderr)
    for size in batch_sizes:
        rows = torch.arange(size) % len(task.dataset.test)
        images = task.dataset.test.normalize(task.dataset.test.images[rows]).to(task.state.device)
        answers = ways_to_answer(task, images) | ({} if session is None else in_onnx_runtime(session, images))
        repeats = {}
        for name, answer in answers.items():
            _time(task, answer, 3)  # kernels are chosen, memory is fetched
            repeats[name] = max(1, min(calls, int(ENOUGH / _time(task, answer, 1))))
        seconds: dict[str, list[float]] = {name: [] for name in answers}
        for _ in range(rounds):
            for name, answer in answers.items():
                seconds[name].append(_time(task, answer, repeats[name]) / repeats[name])
        found[str(size)] = {
            name: median_and_range([1000 * each for each in times], 5) for name, times in seconds.items()
        }
    return task.about() | {"rounds": rounds, "calls_per_round": calls, "ms_per_call": found}


def ways_to_answer(task: BenchmarkSetup, images: Tensor) -> dict[str, Answer]:
    """Each way in which PyTorch computes the logits of `images` here, under its name."""
    module, precision = task.module().eval(), PRECISIONS[task.precision]

    def calls(network: Any) -> Answer:
        @torch.inference_mode()
        def answer() -> Tensor:
            with task.autocast():
                return network(images)

        return answer

    ways = {f"eager, {precision}": calls(module)}
    if task.is_compiled:
        ways[f"compiled, {precision}"] = calls(torch.compile(module))
    if task.state.device.type == "cuda":
        ways[f"captured, {precision}"] = captured(calls(module))
    return ways


def in_onnx_runtime(session: Any, images: Tensor) -> dict[str, Answer]:
    """ONNX Runtime's way; it takes images from the host's memory and brings logits there."""
    provider = session.get_providers()[0].removesuffix("ExecutionProvider")
    feed = {session.get_inputs()[0].name: images.cpu().numpy()}
    return {f"ONNX Runtime ({provider}), fp32": lambda: session.run(None, feed)}


def onnx_session(task: BenchmarkSetup) -> Any:
    """The network in ONNX Runtime, for batches of any size, on the GPU where it can."""
    import onnxruntime

    module, images = build_module(task.recipe, task.dataset).eval(), torch.zeros(2, 1, 28, 28)
    any_size = ({0: torch.export.Dim.DYNAMIC},)
    program: Any = torch.onnx.export(module, (images,), dynamo=True, dynamic_shapes=any_size, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    usable = {"CUDAExecutionProvider"} if task.state.device.type == "cuda" else set()
    chosen = [*usable.intersection(onnxruntime.get_available_providers()), "CPUExecutionProvider"]
    return onnxruntime.InferenceSession(program.model_proto.SerializeToString(), options, providers=chosen)


def _time(task: BenchmarkSetup, answer: Answer, calls: int) -> float:
    started = time.perf_counter()
    for _ in range(calls):
        answer()
        task.wait()
    return time.perf_counter() - started
