"""Exports a run folder as one file that works without this package: `mnist-dist export runs/mine --format onnx`.

Every file takes levels, uint8 (N, C, H, W), and returns probabilities, float32 (N, classes). Its metadata are two JSON
texts, in an ONNX file as properties, in a torch archive as extra files. `classes`: the names of the classes. `image`:
channels, height, width, colours (grey or RGB), and how a picture gets this form (`resize`; for figures on a common
`ground` also their size and centre, see `mnist_dist.data.geometry`).

A file is compared with the network in PyTorch on the whole test set before it gets its name; a file that fails is
deleted.
"""

from __future__ import annotations

from mnist_dist.cli import EXPORT_ENDINGS, answer_early, parse, run_command

if __name__ == "__main__":
    answer_early("export")  # before the imports below load torch

import sys

import torch
from rich.table import Table
from torch import Tensor

from mnist_dist.distributed.devices import device_name
from mnist_dist.errors import Problem, RecipeError
from mnist_dist.export.exporter import export
from mnist_dist.export.verify import NEAR_TIE, Form, disagreements
from mnist_dist.run.reader import open_run
from mnist_dist.run.text_output import table_console

BATCH = 256
"""Number of images of the second timing."""


def show(forms: list[Form], images: Tensor) -> None:
    """Prints size, accuracy and speed of each form. The times are those of `images`, uint8 (N, C, H, W)."""
    table = Table("format", "KB", "accuracy", "agrees with PyTorch", "1 image", f"{len(images)} images", box=None)
    table.title, table.title_justify = f"times: median, {device_name(torch.device('cpu'))}", "left"
    for column in table.columns[1:]:
        column.justify = "right"
    for form in forms:
        same = int((form.predictions == forms[0].predictions).sum())
        ties = disagreements(forms[0], form)[1]
        times = [f"{1e3 * form.seconds(part):,.3f} ms" for part in (images[:1], images)]
        agreement = f"{same:,} of {len(form.predictions):,}"
        agreement += f" + {ties:,} near-tie{'s' * (ties > 1)}" if ties else ""
        table.add_row(form.name, f"{form.size / 1000:,.1f}", f"{form.accuracy:.2f} %", agreement, *times)
    if any(disagreements(forms[0], form)[1] for form in forms):
        table.caption = f"near-tie: the two classes differ by less than {NEAR_TIE:g} in probability"
        table.caption_justify = "left"
    table_console(highlight=False).print(table)


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns exit code 0.

    Raises:
        RecipeError: the run cannot be exported.
        RunError: the file fails its verification.
    """
    arguments = parse("export", argv)
    run = open_run(arguments.run, arguments.weights, arguments.allow_code)
    name = arguments.weights + EXPORT_ENDINGS[arguments.format]
    output = arguments.output or run.folder.refuse_output(run.folder.path / "export" / name)
    if output.is_dir():
        message = f"{output} is a folder; name a file"
        raise RecipeError([Problem("command line", "--output", message, "unwritable")])
    forms = export(run, arguments.format, output, *arguments.overrides, onnxruntime_web=arguments.onnxruntime_web)
    images = torch.randint(0, 256, (BATCH, *run.shape), dtype=torch.uint8)
    with torch.no_grad():
        show(forms, images)
    print(f"written: {output}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
