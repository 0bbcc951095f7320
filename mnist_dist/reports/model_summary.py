"""The layers of a model as a plain-text table, found by running a copy of it once."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

BATCH = 2  # two images, not one: an output of (98, C) is then seen to be 49 rows per image

COUNTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


@dataclass(frozen=True)
class _Row:
    name: str
    kind: str
    shape: str
    parameters: int
    multiply_adds: int | None


def summarize_model(model: nn.Module, *, input_shape: Sequence[int] = (1, 28, 28)) -> str:
    """A table of the layers in the order they are called: output shape, parameters, multiply-adds per image.

    Runs a float32 copy of the model in eval mode on the CPU; the model, its mode and the random numbers stay as they
    are. A model that cannot be run so is listed by its parameters, with a line that says why.

    Args:
        model: any module that takes one float32 batch (N, *input_shape).
        input_shape: of one image: channels, height, width.
    """
    try:
        rows, note = _trace(model, input_shape), ""
    except Exception as error:  # whatever the user's forward raises: a report must not end a run
        rows = _list_leaves(model)
        reason = (str(error).strip().splitlines() or [""])[0]
        note = f"Layers in the order of definition: the model could not be run ({type(error).__name__}: {reason})"
    total = _count_parameters(model)
    elsewhere = total - sum(row.parameters for row in rows)
    if elsewhere:
        rows.append(_Row("(elsewhere)", "not in the layers above", "-", elsewhere, None))
    lines = [
        f"{type(model).__name__} on {_shape_text((BATCH, *input_shape))}",
        "",
        *_table(rows),
        "",
        *_totals(model, rows),
    ]
    return "\n".join([*lines, note] if note else lines) + "\n"


def _trace(model: nn.Module, input_shape: Sequence[int]) -> list[_Row]:
    replica = copy.deepcopy(model).to("cpu", torch.float32).eval()
    names = {module: name for name, module in replica.named_modules()}
    rows: list[_Row] = []
    seen: set[int] = set()

    def record(module: nn.Module, inputs: Any, output: Any) -> None:
        parameters = _count_parameters(module, seen)
        rows.append(
            _Row(names[module] or "(model)", type(module).__name__, _shapes(output), parameters, _cost(module, output))
        )

    for module in names:
        module._forward_hooks.clear()  # the copy shares the user's hooks, which must not see this run
        if not list(module.children()):
            module.register_forward_hook(record)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        replica(torch.zeros(BATCH, *input_shape))
    return rows


def _list_leaves(model: nn.Module) -> list[_Row]:
    seen: set[int] = set()
    leaves = [(name, module) for name, module in model.named_modules() if not list(module.children())]
    return [
        _Row(name or "(model)", type(leaf).__name__, "-", _count_parameters(leaf, seen), None) for name, leaf in leaves
    ]


def _count_parameters(module: nn.Module, seen: set[int] | None = None) -> int:
    """Values in the parameters that are not in `seen`, which they join: a shared one counts where it is met first."""
    seen = set() if seen is None else seen
    fresh = [parameter for parameter in module.parameters() if id(parameter) not in seen]
    seen.update(map(id, fresh))
    return sum(parameter.numel() for parameter in fresh)


def _cost(module: nn.Module, output: Any) -> int:
    # Each output value is the product of one row of the weight, whose shape knows of groups, with a part of the input.
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
    lines = []
    for line in cells:
        left = [cell.ljust(width) for cell, width in zip(line[:3], widths[:3], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(line[3:], widths[3:], strict=True)]
        lines.append("  ".join(left + right))
    rule = "-" * len(lines[0])
    return [lines[0], rule, *lines[1:], rule]


def _totals(model: nn.Module, rows: list[_Row]) -> list[str]:
    total = _count_parameters(model)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    cost = sum(row.multiply_adds or 0 for row in rows)
    measured = any(row.multiply_adds is not None for row in rows)
    scaled = f"{cost / 1e9:.2f} G" if cost >= 1e9 else f"{cost / 1e6:.2f} M"
    return [
        f"Parameters            {total:,}",
        f"Trainable parameters  {trainable:,}",
        f"Multiply-adds         {f'{cost:,} ({scaled}) per image' if measured else 'not measured'}",
        f"Weights               {4 * total / 1e6:.2f} MB as float32",
        "",
        "Multiply-adds are of convolutions and linear layers; norms, activations and all else count as 0.",
    ]
