"""Exports a run: writes its network as one file, verifies the file on the test set, then gives it its final name."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from mnist_dist.data import Dataset
from mnist_dist.data.geometry import describe_geometry, read_geometry
from mnist_dist.distributed.devices import share_cores
from mnist_dist.distributed.launcher import launched_world
from mnist_dist.engine.files import fsync_path, rename_flushed
from mnist_dist.errors import Kind, Problem, RecipeError
from mnist_dist.export.onnx import onnx_session, write_onnx
from mnist_dist.export.page import VERSION, build_page, load_runtime
from mnist_dist.export.quantize import quantize
from mnist_dist.export.verify import Deployed, Form, Predictor, check_agreement, measure_form, refuse_batch_dependence
from mnist_dist.recipe.loading import load_recipe
from mnist_dist.recipe.schema import Recipe
from mnist_dist.run.data import load_data
from mnist_dist.run.evaluation import fit_to_network
from mnist_dist.run.onnx_model import trace_program
from mnist_dist.run.reader import Run


@dataclass(frozen=True)
class Source:
    """What every format needs: the run's network and the data on which files are verified."""

    recipe: Recipe
    about: dict[str, Any]
    """The metadata of the weights file: model, classes, mean and std of the data, …"""
    data: Dataset
    """The test set is complete: the recipe's limits do not apply to the verification."""
    network: Form
    """The network in PyTorch, as measured on the test set."""

    @property
    def metadata(self) -> dict[str, str]:
        """What a file says of itself, as JSON by name: the names of the classes, and the form of the images."""
        geometry = read_geometry(self.about)
        channels, height, width = geometry.shape
        image = {"channels": channels, "height": height, "width": width, "colours": "RGB" if channels == 3 else "grey"}
        return {
            "classes": json.dumps(self.about["classes"]),
            "image": json.dumps(image | describe_geometry(geometry) | {"resize": geometry.resize or "crop"}),
        }

    def measure(self, name: str, path: Path, predict: Predictor) -> Form:
        return measure_form(name, path.stat().st_size, predict, self.data.test, self.recipe.eval_batch_size)


def export(run: Run, kind: str, output: Path, *overrides: str, onnxruntime_web: Path | None = None) -> list[Form]:
    """Writes one verified file.

    Args:
        kind: a key of `cli.EXPORT_ENDINGS`. "torch" is a program for `torch.export.load`.
        output: the file. Its folder is created.
        overrides: recipe keys, e.g. `data.root=/data`.
        onnxruntime_web: npm's archive of that package, to build a page on a machine without network.

    Returns:
        The network in PyTorch, then the intermediate files if any, and the written file last.

    Raises:
        RecipeError: no data, a missing package, a network that cannot be exported, or an output that cannot be written.
        OSError, ValueError: the weights are missing or damaged.
        RunError: the file disagrees with the network, or an int8 file is not accurate or small enough; nothing was
            written.
    """
    if launched_world().num_processes > 1:
        message = "export runs in one process; start it without a launcher: mnist-dist export …"
        raise RecipeError([Problem("the launcher", "", message, "world")])
    share_cores(launched_world())
    runtime = _check_requirements(kind, onnxruntime_web)
    deployed = Deployed(run.model, run.about["mean"], run.about["std"]).eval()
    source = _load_source(run, deployed, overrides)
    try:
        with _staged(output) as made, _quiet():
            program = trace_program(deployed, source.data.test.images, source.about["model"])
            if kind == "torch":
                forms = _write_torch(source, program, made)
            elif kind == "onnx":
                forms = _write_onnx(source, program, made)
            elif kind == "onnx-int8":
                forms = _write_int8(source, program, made)
            else:
                forms = _write_page(source, program, made, runtime)
    except OSError as error:
        message = f"{error.filename or output} cannot be written: {error.strerror or error}; give another --output"
        raise RecipeError([Problem("command line", "--output", message, "unwritable")]) from error
    return [source.network, *forms]


# --- before anything is written -----------------------------------------------------------------------------------


def _check_requirements(form: str, archive: Path | None) -> dict[str, bytes]:
    """Imports the packages that a format needs; returns the files of onnxruntime-web for a page."""
    if form == "torch":
        return {}
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        message = f'{error.name} is missing: pip install -e ".[export]"'
        raise RecipeError([Problem("command line", "--format", message, "missing")]) from error
    if form != "page":
        return {}
    try:
        return load_runtime(archive)
    except (OSError, ValueError) as error:
        message = f"onnxruntime-web {VERSION} is not available: {error}"
        kind: Kind = "missing" if isinstance(error, OSError) else "damaged"
        raise RecipeError([Problem("command line", "--onnxruntime-web", message, kind)]) from error


def _load_source(run: Run, deployed: Deployed, overrides: tuple[str, ...]) -> Source:
    """Loads the data, checks that the network fits it and can be exported, and measures the network."""
    recipe = load_recipe(run.folder.recipe, *overrides, "data.limit_test=null", import_code=False)
    data, about = load_data(recipe, launched_world(), run.allow_code), run.about
    test, _ = fit_to_network(recipe, data.test, run)
    data = replace(data, test=test)
    refuse_batch_dependence(deployed, data.test.images[:8], about["model"])
    size = (run.folder.path / f"{run.weights}.safetensors").stat().st_size
    network = measure_form("PyTorch", size, deployed, data.test, recipe.eval_batch_size)
    return Source(recipe, about, data, network)


# --- the formats --------------------------------------------------------------------------------------------------


def _write_torch(source: Source, program: Any, made: Path) -> list[Form]:
    files = {f"{name}.json": text for name, text in source.metadata.items()}
    torch.export.save(program, made, extra_files=files)
    form = source.measure("torch", made, torch.export.load(made).module())
    check_agreement(source.network, form, source.about["classes"])
    return [form]


def _write_onnx(source: Source, program: Any, made: Path) -> list[Form]:
    write_onnx(program, made, source.about["model"], source.metadata)
    form = source.measure("onnx", made, onnx_session(made))
    check_agreement(source.network, form, source.about["classes"])
    return [form]


def _write_int8(source: Source, program: Any, made: Path) -> list[Form]:
    fp32 = made.with_name(f"{made.name}.fp32")
    forms = _write_onnx(source, program, fp32)
    return [*forms, quantize(fp32, made, source.data.train.images, source.network, source.measure)]


def _write_page(source: Source, program: Any, made: Path, runtime: dict[str, bytes]) -> list[Form]:
    fp32 = made.with_name(f"{made.name}.fp32")
    [form] = _write_onnx(source, program, fp32)
    caption = f"{source.recipe.name}: {form.accuracy:.2f} % of {len(source.data.test):,} test images correct"
    geometry = read_geometry(source.about)
    page = build_page(fp32.read_bytes(), source.about["classes"], caption, runtime, geometry)
    made.write_text(page, encoding="utf-8")
    return [replace(form, name="onnx inside the page", size=made.stat().st_size)]


@contextmanager
def _staged(output: Path) -> Iterator[Path]:
    """Yields a path in a temporary folder next to `output`; renames the file to `output` if no error occurs."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder:
        made = Path(folder) / output.name
        yield made
        fsync_path(made)
        rename_flushed(made, output)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides the exporters' messages for developers. The user reads the table and the exceptions."""
    with warnings.catch_warnings(), redirect_stdout(StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
