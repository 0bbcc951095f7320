"""Traces a network as a PyTorch program and writes it as an ONNX file."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mnist_dist.errors import Problem, RecipeError, RunError
from mnist_dist.export.verify import Deployed, Predictor


def _refuse(name: str, error: Exception) -> RecipeError:
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    message = f"{name} cannot be exported: PyTorch cannot trace it for every batch size\n{reason.strip()[:300]}"
    return RecipeError([Problem("the network", "model.name", message, "model")])


def trace_program(deployed: Deployed, images: Tensor, name: str) -> Any:
    """Returns a `torch.export.ExportedProgram` for any batch size.

    Args:
        images: uint8 (N, 1, 28, 28), examples.
        name: the model, for the message.

    Raises:
        RecipeError: PyTorch cannot trace the network.
    """
    batch = ({0: torch.export.Dim("batch")},)
    try:
        # A clone: the program keeps the example and its whole storage, which would be the test set.
        program = torch.export.export(deployed, (images[:2].clone(),), dynamic_shapes=batch, strict=False)
    except Exception as error:  # a user's own network may raise anything
        raise _refuse(name, error) from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it holds paths of this machine
    return program


def write_onnx(program: Any, path: Path, about: dict[str, Any]) -> None:
    """Writes a program as an ONNX file. The metadata `classes` holds the names of the classes as JSON.

    Raises:
        RecipeError: torch.onnx cannot convert the program.
    """
    import onnx

    try:
        names: dict[str, Any] = {"input_names": ["images"], "output_names": ["probabilities"]}
        exported: Any = torch.onnx.export(program, dynamo=True, verbose=False, **names)
    except Exception as error:
        raise _refuse(about["model"], error) from error
    model = exported.model_proto
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    slim_onnx(model)
    onnx.helper.set_model_props(model, {"classes": json.dumps(about["classes"])})
    onnx.save(model, path)


def onnx_session(path: Path) -> Predictor:
    """Returns a function that runs an ONNX file on the CPU.

    Raises:
        RunError: onnxruntime cannot run the file.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no common base
        raise RunError(f"onnxruntime cannot run the file; nothing was written: {error}") from error
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def slim_onnx(model: Any) -> None:
    """Removes what changes no result from an ONNX model: two thirds of a small network's file.

    These are the exporter's notes (with paths of this machine), long names, and attributes with their default value.
    """
    import onnx

    graph = model.graph
    del graph.value_info[:], graph.metadata_props[:]
    for part in (*graph.input, *graph.output, *graph.initializer, *graph.node):
        del part.metadata_props[:]
    versions = {each.domain: each.version for each in model.opset_import}
    for node in graph.node:
        node.name = ""
        if node.domain == "":
            schema = onnx.defs.get_schema(node.op_type, versions[""])
            needed = [each for each in node.attribute if not _is_default(each, schema)]
            del node.attribute[:]
            node.attribute.extend(needed)

    if any(attribute.HasField("g") for node in graph.node for attribute in node.attribute):
        return  # the graph of a branch or loop refers to outer tensors by name
    kept = {value.name for value in (*graph.input, *graph.output)} | {""}
    numbers = map("{:x}".format, itertools.count())
    short: dict[str, str] = {}

    def rename(names: Any) -> list[str]:
        return [name if name in kept else short.get(name) or short.setdefault(name, next(numbers)) for name in names]

    for tensor in graph.initializer:
        [tensor.name] = rename([tensor.name])
    for node in graph.node:
        node.input[:], node.output[:] = rename(node.input), rename(node.output)


def _is_default(attribute: Any, schema: Any) -> bool:
    import onnx

    value = onnx.helper.get_attribute_value(attribute)
    # The schema does not hold the defaults of these three; the standard's text does.
    plain = {"strides": {1}, "dilations": {1}, "pads": {0}}.get(attribute.name)
    if plain is not None:
        return set(value) == plain
    default = schema.attributes[attribute.name].default_value
    return bool(default.name) and onnx.helper.get_attribute_value(default) == value
