"""Traces a network as a PyTorch program, converts the program to ONNX, and opens a model in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mnist_dist.errors import Problem, RecipeError, RunError


def trace_program(network: nn.Module, images: Tensor, name: str) -> Any:
    """Returns a `torch.export.ExportedProgram` of a network for batches of any size.

    Args:
        network: in evaluation mode.
        images: an example of the input; at least two images.
        name: the network's name, for messages.

    Raises:
        RecipeError: PyTorch cannot trace the network for every batch size.
    """
    batch = ({0: torch.export.Dim("batch")},)
    try:
        # The program keeps the storage of the example. Without the clone, that could be the complete test set.
        program = torch.export.export(network, (images[:2].clone(),), dynamic_shapes=batch, strict=False)
    except Exception as error:  # a user's own network may fail in any way
        raise _refuse(name, error) from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it names folders of this machine
    return program


def export_onnx(program: Any, name: str, output: str = "logits") -> Any:
    """Returns a traced program as an `onnx.ModelProto` with the input `images` and a batch dimension of any size.

    Args:
        name: the network's name, for messages.
        output: the name of the model's output.

    Raises:
        RecipeError: PyTorch cannot convert the program.
    """
    try:
        names: dict[str, Any] = {"input_names": ["images"], "output_names": [output]}
        exported: Any = torch.onnx.export(program, dynamo=True, verbose=False, **names)
    except Exception as error:
        raise _refuse(name, error) from error
    model = exported.model_proto
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    return model


def open_session(model: Path | bytes, device: torch.device) -> Any:
    """Returns an `onnxruntime.InferenceSession` with this process's number of threads.

    Args:
        model: an ONNX file, or its content.
        device: a CUDA device runs the model on the GPU if the installed onnxruntime supports it.

    Raises:
        RunError: ONNX Runtime cannot load the model.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors only
    usable = {"CUDAExecutionProvider"} if device.type == "cuda" else set()
    providers = [*usable.intersection(onnxruntime.get_available_providers()), "CPUExecutionProvider"]
    try:
        return onnxruntime.InferenceSession(model, options, providers=providers)
    except Exception as error:  # onnxruntime's exceptions have no common base class
        raise RunError(f"ONNX Runtime cannot load the exported network: {error}") from error


def _refuse(name: str, error: Exception) -> RecipeError:
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    message = f"{name} cannot be exported: PyTorch cannot trace it for every batch size\n{reason.strip()[:300]}"
    return RecipeError([Problem("the network", "model.name", message, "model")])
