"""A network as an ONNX file."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import torch

from mnist_dist.export.verify import Answer
from mnist_dist.run.onnx_export import export_onnx, open_session
from mnist_dist.run.onnx_export import trace_program as trace_program


def write_onnx(program: Any, path: Path, about: dict[str, Any]) -> None:
    import onnx

    model = export_onnx(program, about["model"], "probabilities")
    slim_onnx(model)
    onnx.helper.set_model_props(model, {"classes": json.dumps(about["classes"])})
    onnx.save(model, path)


def onnx_session(path: Path) -> Answer:
    session = open_session(path, torch.device("cpu"))
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def slim_onnx(model: Any) -> None:
    """Takes from an ONNX model what does not change an answer: two thirds of a small network's file.

    That is the exporter's notes (with paths of this machine), long names, and attributes that say the default.
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
            result_keys = [each for each in node.attribute if not _is_default(each, schema)]
            del node.attribute[:]
            node.attribute.extend(result_keys)

    if any(attribute.HasField("g") for node in graph.node for attribute in node.attribute):
        return  # a branch or a loop names tensors from around it
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
    # The standard gives these three in its text only.
    plain = {"strides": {1}, "dilations": {1}, "pads": {0}}.get(attribute.name)
    if plain is not None:
        return set(value) == plain
    default = schema.attributes[attribute.name].default_value
    return bool(default.name) and onnx.helper.get_attribute_value(default) == value
