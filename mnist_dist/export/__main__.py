"""A run folder -> one file that answers without this package: `python -m mnist_dist.export runs/mine --format onnx`.

Every file takes grey levels as they are, uint8 (N, 1, 28, 28), and gives probabilities, float32 (N, classes). It is
held against the network in PyTorch on the whole test set before it gets its name: a file that fails is never left.
"""

from __future__ import annotations

from mnist_dist.cli import EXPORT_ENDINGS, answer_early, parse, run_command

if __name__ == "__main__":
    answer_early("export")  # before the imports below load torch

import itertools
import json
import logging
import statistics
import sys
import timeit
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor, nn

from mnist_dist.data import Images, normalize
from mnist_dist.distributed.launcher import choose_threads, device_name, launched_world
from mnist_dist.errors import Problem, RecipeError, RunError
from mnist_dist.export.page import VERSION, build_page, load_runtime
from mnist_dist.recipe.schema import load_recipe
from mnist_dist.run.build import load_data
from mnist_dist.run.folder import Run, open_run
from mnist_dist.run.tables import table_console

LARGEST_LOSS = 0.1
"""Points of accuracy by which an int8 file may differ from the network, to either side."""
LARGEST_SHARE = 0.35
"""Of the fp32 ONNX file's size, that an int8 file may have."""
BATCH = 256
CALIBRATION_IMAGES = 512

Answer = Callable[[Tensor], Tensor]
"""uint8 (N, 1, 28, 28) -> probabilities, float32 (N, classes)."""


class Deployed(nn.Module):
    """A trained network with its normalisation before it and softmax behind it."""

    def __init__(self, network: nn.Module, mean: float, std: float) -> None:
        super().__init__()
        self.network, self.mean, self.std = network, mean, std

    def forward(self, images: Tensor) -> Tensor:
        return self.network(normalize(images, self.mean, self.std)).softmax(dim=1)


@dataclass(frozen=True)
class Form:
    """The network in one form, as it was measured; `size` in bytes, `accuracy` in percent, times in seconds."""

    name: str
    size: int
    accuracy: float
    predictions: Tensor
    probabilities: Tensor
    answer: Answer

    def seconds(self, images: Tensor) -> float:
        """Median time of answering uint8 (N, 1, 28, 28), of fifteen after one that does not count."""
        return statistics.median(timeit.repeat(lambda: self.answer(images), number=1, repeat=16)[1:])


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
    _refuse_what_depends_on_the_batch(deployed, data.test.images[:8], about["model"])

    def measure(name: str, path: Path, answer: Answer) -> Form:
        return _measure(name, path.stat().st_size, answer, data.test, recipe.eval_batch_size)

    weights = run.folder.path / f"{run.weights}.safetensors"
    forms = [measure("PyTorch", weights, deployed)]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder, _quiet():
            beside = Path(folder)
            made, fp32 = beside / output.name, beside / "fp32.onnx"
            program = _trace(deployed, data.test.images, about["model"])
            if kind == "torch":
                torch.export.save(program, made, extra_files={"classes.json": json.dumps(about["classes"])})
                forms.append(measure("torch", made, torch.export.load(made).module()))
            else:
                _write_onnx(program, fp32, about)
                forms.append(measure("onnx", fp32, _session(fp32)))
            if kind == "onnx":
                fp32.replace(made)
            _check_answers(forms[0], forms[1], about["classes"])
            if kind == "onnx-int8":
                forms.append(_quantise(fp32, made, data.train.images, forms[0], measure))
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


# --- checks -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _refuse_what_depends_on_the_batch(deployed: Deployed, images: Tensor, name: str) -> None:
    inputs = normalize(images, deployed.mean, deployed.std)
    together = deployed.network(inputs)
    alone = torch.cat([deployed.network(each[None]) for each in inputs])
    if (together - alone).abs().max() <= 1e-3 * together.abs().max():
        return
    norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)
    parts = deployed.network.named_modules()
    guilty = [part for part, module in parts if isinstance(module, norms) and module.running_mean is None]
    why = f" ({guilty[0]} and others normalise by the batch, also in evaluation)" if guilty else ""
    what = f"{name}'s answer to an image depends on the other images of its batch, or on chance{why}"
    raise RecipeError([Problem("the network", "", f"{what}:\nno file could repeat its answers")])


@torch.no_grad()
def _measure(name: str, size: int, answer: Answer, data: Images, batch_size: int) -> Form:
    probabilities = torch.cat([answer(images) for images in data.images.split(batch_size)])
    predictions = probabilities.argmax(dim=1)
    accuracy = 100 * int((predictions == data.labels).sum()) / len(data)
    return Form(name, size, accuracy, predictions, probabilities, answer)


def _check_answers(network: Form, made: Form, classes: list[str]) -> None:
    """Raises RunError unless both give every image the same class; names those that differ."""
    differing = (network.predictions != made.predictions).nonzero().flatten().tolist()
    if not differing:
        return

    def says(form: Form, image: int) -> str:
        best = form.predictions[image]
        return f"{classes[best]} ({form.probabilities[image, best]:.6f})"

    lines = [f"  image {each}: {says(made, each)}, not {says(network, each)}" for each in differing[:8]]
    lines += [f"  and {len(differing) - 8} more"] if len(differing) > 8 else []
    count = f"{len(differing)} of {len(network.predictions):,} test images"
    raise RunError("\n".join([f"{made.name} answers {count} otherwise than PyTorch; nothing was written:", *lines]))


# --- programs -----------------------------------------------------------------------------------------------------


def _refuse(name: str, error: Exception) -> RecipeError:
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    what = f"{name} cannot be exported: PyTorch cannot follow it for any batch size\n{reason.strip()[:300]}"
    return RecipeError([Problem("the network", "", what)])


def _trace(deployed: Deployed, images: Tensor, name: str) -> Any:
    """A `torch.export.ExportedProgram` whose first dimension may be any."""
    batch = ({0: torch.export.Dim("batch")},)
    try:
        # A clone: the program keeps its example with all the memory behind it, which would be the test set.
        program = torch.export.export(deployed, (images[:2].clone(),), dynamic_shapes=batch, strict=False)
    except Exception as error:  # a user's own network may fail in any way
        raise _refuse(name, error) from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine, of no use on another
    return program


def _write_onnx(program: Any, path: Path, about: dict[str, Any]) -> None:
    import onnx

    try:
        names: dict[str, Any] = {"input_names": ["images"], "output_names": ["probabilities"]}
        exported: Any = torch.onnx.export(program, dynamo=True, verbose=False, **names)
    except Exception as error:
        raise _refuse(about["model"], error) from error
    model = exported.model_proto
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    _slim(model)
    onnx.helper.set_model_props(model, {"classes": json.dumps(about["classes"])})
    onnx.save(model, path)


def _session(path: Path) -> Answer:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own kinds, of no common base
        raise RunError(f"onnxruntime cannot run the file; nothing was written: {error}") from error
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _slim(model: Any) -> None:
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


# --- int8 ---------------------------------------------------------------------------------------------------------


def _quantise(fp32: Path, made: Path, images: Tensor, network: Form, measure: Callable[..., Form]) -> Form:
    """Writes the first int8 file that is exact and small enough, those with most arithmetic in int8 first.

    The choice looks at the test set, as the promise about accuracy does. Calibration looks at `images` of the training
    set, uint8 (N, 1, 28, 28), only.
    """
    import onnx
    import onnxruntime
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    onnxruntime.set_default_logger_severity(3)  # errors: calibration opens sessions of its own
    size, tried = fp32.stat().st_size, []
    approaches: dict[str, dict[str, Any] | int] = {
        "static, QDQ": {},
        "static, QDQ, percentiles": {"calibrate_method": CalibrationMethod.Percentile},
        "static, QDQ, 7-bit weights": {"reduce_range": True},
        # One node where QDQ has three; its kernels want unsigned activations.
        "static, QOperator": {"quant_format": QuantFormat.QOperator, "activation_type": QuantType.QUInt8},
        "weights only": 0,
        "weights only, small layers fp32": 128,
    }
    for name, settings in approaches.items():
        model = onnx.load(fp32)
        try:
            if isinstance(settings, int):
                _quantise_weights(model, smallest=settings)
            else:
                quantize_static(model, made, _Calibration(images), per_channel=True, **settings)
                model = onnx.load(made)
            _slim(model)
            onnx.save(model, made)
            form = measure(f"onnx-int8 ({name})", made, _session(made))
        except Exception as error:  # a user's own network may fail in any way; another approach may do
            tried.append(f"{name}: {type(error).__name__}: {error}".splitlines()[0])
            continue
        if abs(form.accuracy - network.accuracy) <= LARGEST_LOSS + 1e-9 and form.size <= LARGEST_SHARE * size:
            return form
        tried.append(f"{name}: {form.accuracy:.2f} %, {form.size:,} bytes ({form.size / size:.1%} of fp32)")
    asked = f"{network.accuracy:.2f} ± {LARGEST_LOSS} % in {LARGEST_SHARE:.0%} of fp32's {size:,} bytes"
    raise RunError("\n  ".join([f"no int8 file reaches {asked}; nothing was written. Tried:", *tried]))


class _Calibration:
    """Evenly spaced images, one at a time, as onnxruntime's calibration asks for them."""

    def __init__(self, images: Tensor) -> None:
        spaced = images[:: max(1, len(images) // CALIBRATION_IMAGES)][:CALIBRATION_IMAGES]
        self.rest = iter(spaced.numpy()[:, None])

    def get_next(self) -> dict[str, np.ndarray] | None:
        image = next(self.rest, None)
        return None if image is None else {"images": image}


def _quantise_weights(model: Any, *, smallest: int) -> None:
    """Keeps float tensors of two dimensions or more as int8 with a scale per row; the arithmetic stays fp32.

    Tensors of fewer than `smallest` elements stay as they are.
    """
    import onnx

    tensors, nodes = [], []
    for tensor in model.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if values.dtype != np.float32 or values.ndim < 2 or values.size < smallest:
            tensors.append(tensor)
            continue
        integers, scales = _as_int8(values.reshape(len(values), -1))
        names = [f"{tensor.name}/integers", f"{tensor.name}/scales"]
        tensors += map(onnx.numpy_helper.from_array, (integers.reshape(values.shape), scales), names)
        nodes.append(onnx.helper.make_node("DequantizeLinear", names, [tensor.name], axis=0))
    nodes += model.graph.node
    del model.graph.initializer[:], model.graph.node[:]
    model.graph.initializer.extend(tensors)
    model.graph.node.extend(nodes)


def _as_int8(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 (R, C) -> int8 (R, C) and float32 (R,), whose product has each row's least squared error.

    Of the ranges tried: 0.6 to 1 of the row's largest value. Cutting that one off may be the smaller error.
    """
    largest = np.maximum(np.abs(rows).max(axis=1), np.finfo(np.float32).tiny * 127)
    best = np.full(len(rows), np.inf)
    integers, scales = np.zeros(rows.shape, np.int8), np.zeros(len(rows), np.float32)
    for share in np.linspace(1, 0.6, 41, dtype=np.float32):
        steps = share * largest / 127
        tried = np.rint(rows / steps[:, None]).clip(-127, 127)
        errors = np.square(tried * steps[:, None] - rows).sum(axis=1)
        better = errors < best
        best[better], integers[better], scales[better] = errors[better], tried[better], steps[better]
    return integers, scales


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
