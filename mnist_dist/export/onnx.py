"""Traces a network as a PyTorch program and writes it as an ONNX file."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch

from mnist_dist.export.verify import Predictor
from mnist_dist.run.onnx_model import export_onnx, open_session


def write_onnx(program: Any, path: Path, name: str, metadata: dict[str, str]) -> None:
    """Writes a program as an ONNX file with metadata.

    Args:
        name: the network's name, for messages.

    Raises:
        RecipeError: torch.onnx cannot convert the program.
    """
    import onnx

    model = export_onnx(program, name, "probabilities")
    slim_onnx(model)
    onnx.helper.set_model_props(model, metadata)
    onnx.save(model, path)


def onnx_session(path: Path) -> Predictor:
    """Returns a function that runs an ONNX file on the CPU.

    Raises:
        RunError: onnxruntime cannot run the file.
    """
    session = open_session(path, torch.device("cpu"))
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def slim_onnx(model: Any) -> None:
    """Removes everything that changes no result from an ONNX model: two thirds of the file of a small network.

    Removed are the exporter's notes (with paths of this machine), long names, and attributes with a default value.
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
    # The schema of ONNX lacks the defaults of these three; they are in the text of the standard.
    plain = {"strides": {1}, "dilations": {1}, "pads": {0}}.get(attribute.name)
    if plain is not None:
        return set(value) == plain
    default = schema.attributes[attribute.name].default_value
    return bool(default.name) and onnx.helper.get_attribute_value(default) == value
