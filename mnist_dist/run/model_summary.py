"""A table of a model's layers as plain text. The layers are found by running a copy of the model once."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

BATCH = 2
"""Number of images in the trial run. With two, an output of shape (98, C) shows that it has 49 rows per image."""

COUNTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
"""Types of layers whose multiply-adds are counted."""


@dataclass(frozen=True)
class _Row:
    name: str
    kind: str
    shape: str
    parameters: int
    multiply_adds: int | None


def summarize_model(model: nn.Module, *, input_shape: Sequence[int] = (1, 28, 28)) -> str:
    """Returns a table of the layers in the order of their calls: output shape, parameters, multiply-adds per image.

    Runs a float32 copy of the model in eval mode on the CPU; the model, its mode and the random numbers do not change.
    If the copy cannot be run, the table lists the layers in the order of definition and a line gives the reason.

    Args:
        model: any module that takes one float32 batch (N, *input_shape).
        input_shape: channels, height and width of one image.
    """
    try:
        # The totals are computed from the copy too, because running it gives lazy layers their shapes.
        model = copy.deepcopy(model).to("cpu", torch.float32).eval()
        rows, note = _trace(model, input_shape), ""
    except Exception as error:  # a user's `forward` may raise anything, and this table must not end a run
        rows = _list_leaves(model)
        reason = (str(error).strip().splitlines() or [""])[0]
        note = f"Layers in the order of definition: the model could not be run ({type(error).__name__}: {reason})"
    if others := _count(model.parameters()) - sum(row.parameters for row in rows):
        rows.append(_Row("(elsewhere)", "not in the layers above", "-", others, None))
    heading = f"{type(model).__name__} on {_shape_text((BATCH, *input_shape))}"
    lines = [heading, "", *_table(rows), "", *_totals(model, rows), note]
    return "\n".join(lines).rstrip("\n") + "\n"


def _trace(model: nn.Module, input_shape: Sequence[int]) -> list[_Row]:
    """Runs the copy on zeros and returns one row for each call of a module without children."""
    names = {module: name or "(model)" for name, module in model.named_modules()}
    rows: list[_Row] = []
    seen: set[int] = set()

    def add_row(module: nn.Module, inputs: Any, output: Any) -> None:
        parameters, cost = _count(module.parameters(), seen), _multiply_adds(module, output)
        rows.append(_Row(names[module], type(module).__name__, _shapes(output), parameters, cost))

    for module in names:
        module._forward_hooks.clear()  # copied from the user's model; they must not see this run
        if not list(module.children()):
            module.register_forward_hook(add_row)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        model(torch.zeros(BATCH, *input_shape, dtype=torch.float32, device="cpu"))
    return rows


def _list_leaves(model: nn.Module) -> list[_Row]:
    """Returns one row for each module without children, in the order of definition."""
    seen: set[int] = set()
    leaves = [(name, module) for name, module in model.named_modules() if not list(module.children())]
    counts = [_count(leaf.parameters(), seen) for _, leaf in leaves]
    return [
        _Row(name or "(model)", type(leaf).__name__, "-", n, None)
        for (name, leaf), n in zip(leaves, counts, strict=True)
    ]


def _count(parameters: Iterable[nn.Parameter], seen: set[int] | None = None) -> int:
    """Returns the number of values in the parameters that are not in `seen`, and adds these parameters to `seen`.

    So a parameter that several layers share counts once, for the first of them.
    """
    seen = set() if seen is None else seen
    fresh = [parameter for parameter in parameters if id(parameter) not in seen and not is_lazy(parameter)]
    seen.update(map(id, fresh))
    return sum(parameter.numel() for parameter in fresh)


def _multiply_adds(module: nn.Module, output: Any) -> int:
    # Each output value is the product of one row of the weight (shorter with groups) with a part of the input.
    return output.numel() // BATCH * module.weight[0].numel() if isinstance(module, COUNTED) else 0


def _shapes(output: Any) -> str:
    if isinstance(output, Tensor):
        return _shape_text(output.shape)
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else ()
    return ", ".join(shape for shape in map(_shapes, parts) if shape != "-") or "-"


def _shape_text(shape: Sequence[int]) -> str:
    if not shape:
        return "()"
    images, rest = divmod(shape[0], BATCH)
    first = str(shape[0]) if rest else "N" if images == 1 else f"{images}N"
    return f"({', '.join([first, *map(str, shape[1:])])})"


def _table(rows: list[_Row]) -> list[str]:
    cells = [("Layer", "Type", "Output shape", "Parameters", "Multiply-adds")]
    for row in rows:
        cost = "-" if row.multiply_adds is None else f"{row.multiply_adds:,}"
        cells.append((row.name, row.kind, row.shape, f"{row.parameters:,}", cost))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    layout = "  ".join(f"{{:{side}{width}}}" for side, width in zip("<<<>>", widths, strict=True))
    lines = [layout.format(*line) for line in cells]
    rule = "-" * len(lines[0])
    return [lines[0], rule, *lines[1:], rule]


def _totals(model: nn.Module, rows: list[_Row]) -> list[str]:
    total = _count(model.parameters())
    trainable = _count(parameter for parameter in model.parameters() if parameter.requires_grad)
    cost = sum(row.multiply_adds or 0 for row in rows)
    measured = any(row.multiply_adds is not None for row in rows)
    scaled = f"{cost / 1e9:.2f} G" if cost >= 1e9 else f"{cost / 1e6:.2f} M"
    return [
        f"Parameters            {total:,}",
        f"Trainable parameters  {trainable:,}",
        f"Multiply-adds         {f'{cost:,} ({scaled}) per image' if measured else 'not measured'}",
        f"Weights               {4 * total / 1e6:.2f} MB as float32",
        "",
        "Multiply-adds count convolutions and linear layers only, no norms, activations or other layers.",
    ]
