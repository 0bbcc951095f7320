"""A run folder -> one file that answers without this package: `python -m mnist_dist.export runs/mine --format onnx`.

Every file takes grey levels as they are, uint8 (N, 1, 28, 28), and gives probabilities, float32 (N, classes). It is
held against the network in PyTorch on the whole test set before it gets its name: a file that fails is never left.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.table import Table
from torch import Tensor

from mnist_dist.cli import EXPORT_ENDINGS, answer_early, parse, run_command
from mnist_dist.distributed.devices import choose_threads, device_name
from mnist_dist.distributed.launcher import launched_world
from mnist_dist.errors import Problem, RecipeError
from mnist_dist.export.onnx import onnx_session, trace_program, write_onnx
from mnist_dist.export.page import VERSION, build_page, load_runtime
from mnist_dist.export.quantize import quantize
from mnist_dist.export.verify import (
    Answer,
    Deployed,
    Form,
    check_answers,
    measure_form,
    refuse_what_depends_on_the_batch,
)
from mnist_dist.recipe.loading import load_recipe
from mnist_dist.run.build import load_data
from mnist_dist.run.reader import Run, open_run
from mnist_dist.run.tables import table_console

if __name__ == "__main__":
    answer_early("export")  # before the imports below load torch


BATCH = 256


def export(run: Run, kind: str, output: Path, *overrides: str, onnxruntime_web: Path | None = None) -> list[Form]:
    """Writes one checked file.

    Args:
        kind: a key of EXPORT_ENDINGS. "torch" is a program for `torch.export.load`.
        output: the file; its folder is made if need be.
        overrides: recipe keys, e.g. `data.root=/data`.
        onnxruntime_web: npm's archive of that package, for a page on a machine without network.

    Returns:
        The network in PyTorch, then what was made of it on the way, and the file last.

    Raises:
        RecipeError: no data, a missing package, or a network that cannot be exported.
        OSError, ValueError: no whole weights there.
        RunError: the file's answers, or an int8 file's accuracy or size, are not as promised; nothing was written.
    """
    state = launched_world()
    if state.num_processes > 1:
        raise RecipeError([Problem("the launcher", "", "export works in one process: python -m mnist_dist.export …")])
    choose_threads(state)
    if kind != "torch":
        _require_onnx()
    runtime = _web_runtime(onnxruntime_web) if kind == "page" else {}
    deployed, about = Deployed(run.model, run.about["mean"], run.about["std"]).eval(), run.about
    # Nobody's override or limit makes the check smaller.
    recipe = load_recipe(run.folder.recipe, *overrides, "data.limit_test=null")
    data = load_data(recipe, state)
    if len(data.test.classes) != len(about["classes"]):
        what = f"{recipe.data.dataset} has {len(data.test.classes)} classes, the network {len(about['classes'])}"
        raise RecipeError([Problem("command line", "data.dataset", what)])
    refuse_what_depends_on_the_batch(deployed, data.test.images[:8], about["model"])

    def measure(name: str, path: Path, answer: Answer) -> Form:
        return measure_form(name, path.stat().st_size, answer, data.test, recipe.eval_batch_size)

    weights = run.folder.path / f"{run.weights}.safetensors"
    forms = [measure("PyTorch", weights, deployed)]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder, _quiet():
            beside = Path(folder)
            made, fp32 = beside / output.name, beside / "fp32.onnx"
            program = trace_program(deployed, data.test.images, about["model"])
            if kind == "torch":
                torch.export.save(program, made, extra_files={"classes.json": json.dumps(about["classes"])})
                forms.append(measure("torch", made, torch.export.load(made).module()))
            else:
                write_onnx(program, fp32, about)
                forms.append(measure("onnx", fp32, onnx_session(fp32)))
            if kind == "onnx":
                fp32.replace(made)
            check_answers(forms[0], forms[1], about["classes"])
            if kind == "onnx-int8":
                forms.append(quantize(fp32, made, data.train.images, forms[0], measure))
            if kind == "page":
                caption = f"{recipe.name}: {forms[1].accuracy:.2f} % of {len(data.test):,} test images"
                made.write_text(build_page(fp32.read_bytes(), about["classes"], caption, runtime), encoding="utf-8")
                forms[1] = replace(forms[1], name="onnx inside the page", size=made.stat().st_size)
            made.replace(output)
    except OSError as error:
        what = f"{error.filename or output} cannot be written: {error.strerror or error}; give another --output"
        raise RecipeError([Problem("command line", "--output", what)]) from error
    return forms


def _require_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        what = f'{error.name} is missing: pip install -e ".[export]"'
        raise RecipeError([Problem("command line", "--format", what)]) from error


def _web_runtime(archive: Path | None) -> dict[str, bytes]:
    try:
        return load_runtime(archive)
    except (OSError, ValueError) as error:
        what = f"onnxruntime-web {VERSION} cannot be had: {error}"
        raise RecipeError([Problem("command line", "--onnxruntime-web", what)]) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporters tell their developers much; what the user should know is in the table or in an exception."""
    with warnings.catch_warnings(), redirect_stdout(StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


# --- the door -----------------------------------------------------------------------------------------------------


def show(forms: list[Form], images: Tensor) -> None:
    """Size, accuracy and speed of each form as a table; times on uint8 `images` (N, 1, 28, 28)."""
    timed = device_name(torch.device("cpu"))
    table = Table("format", "KB", "accuracy", "answers as PyTorch", "1 image", f"{BATCH} images", box=None)
    table.title, table.title_justify = f"times: median, {timed}", "left"
    for column in table.columns[1:]:
        column.justify = "right"
    for form in forms:
        same = int((form.predictions == forms[0].predictions).sum())
        times = [f"{1e3 * form.seconds(part):,.3f} ms" for part in (images[:1], images)]
        agreeing = f"{same:,} of {len(form.predictions):,}"
        table.add_row(form.name, f"{form.size / 1000:,.1f}", f"{form.accuracy:.2f} %", agreeing, *times)
    table_console(highlight=False).print(table)


def main(argv: list[str] | None = None) -> int:
    """The door: exit code 0; 1 where a file fails its check, 2 for a run that cannot be exported."""
    arguments = parse("export", argv)
    run = open_run(arguments.run, arguments.weights)
    name = arguments.weights + EXPORT_ENDINGS[arguments.format]
    output = arguments.output or run.folder.path / "export" / name
    if output.is_dir():
        raise RecipeError([Problem("command line", "--output", f"{output} is a folder; name a file")])
    forms = export(run, arguments.format, output, *arguments.overrides, onnxruntime_web=arguments.onnxruntime_web)
    images = torch.randint(0, 256, (BATCH, 1, 28, 28), dtype=torch.uint8)
    with torch.no_grad():
        show(forms, images)
    print(f"written: {output}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
