"""Writes benchmark results as tables, and compares them with floors: the smallest figures that a GPU should reach.

A `result` is what `training.measure` or `inference.measure_inference` returns and `--json` writes. Only a result of
inference has the key `ms_per_call`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

from mnist_dist.engine.precision import PRECISION_NAMES
from mnist_dist.errors import Problem, RecipeError
from mnist_dist.run.text_output import markdown_table, table_console

OURS = "mnist_dist"
"""The trainer's name among the timed loops."""
Rows = list[tuple[str, ...]]

# --- tables -------------------------------------------------------------------------------------------------------


def table_of(result: dict[str, Any]) -> Rows:
    """Returns the figures of a result as rows of text; the first row holds the column headings."""
    return _inference_rows(result) if "ms_per_call" in result else _training_rows(result)


def _inference_rows(result: dict[str, Any]) -> Rows:
    rows: Rows = [("batch", "backend", "ms/call", "lowest", "highest", "µs/image")]
    for size, backends in result["ms_per_call"].items():
        for name, ms in backends.items():
            figures = [f"{ms[which]:,.3f}" for which in ("median", "min", "max")]
            rows.append((size, name, *figures, f"{1000 * ms['median'] / int(size):,.1f}"))
    return rows


def _training_rows(result: dict[str, Any]) -> Rows:
    rows: Rows = [("loop", "images/s", "lowest", "highest", "ms/step", "share of bare step", f"{OURS} ÷ this loop")]
    for name, speed in result["images_per_second"].items():
        figures = [f"{speed[which]:,.0f}" for which in ("median", "min", "max")]
        ratios = [result[kind].get(name) for kind in ("share_of_bare_step", "ratio_of_mnist_dist_to")]
        milliseconds = f"{result['ms_per_step'][name]['median']:,.2f}"
        rows.append((name, *figures, milliseconds, *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios)))
    return rows


def title_of(result: dict[str, Any]) -> str:
    """Returns the title of a result's table: recipe, kind of measurement, precision and device."""
    kind = ", inference" if "ms_per_call" in result else f" {result['sweep']}" if "sweep" in result else ""
    kind += f", {result['kind']}" if "kind" in result else ""
    return f"{result['recipe']}{kind}, {PRECISION_NAMES[result['mixed_precision']]}, {result['device']}"


def circumstances(result: dict[str, Any]) -> str:
    """Returns a sentence with the number of rounds, batch size, processes, workers, memory and one-time costs."""
    if "ms_per_call" in result:
        calls = f"up to {result['calls_per_round']} calls"
        return f"Medians of {result['rounds']} interleaved rounds of {calls}. Each call is synchronized."
    parts = [f"peak memory {result['peak_memory_mb']:,} MB"]
    times = {
        "seconds_from_process_start_to_first_step": "from process start to first step",
        "capture_seconds": "capture",
        "compile_seconds": "compilation",
    }
    parts += [f"{name} {result[key]:.1f} s" for key, name in times.items() if result[key] is not None]
    return (
        f"Medians of {result['rounds']} interleaved rounds of {min(result['steps_per_round'].values())} steps or more; "
        f"batch size {result['batch_size']}, {result['world_size']} process(es), "
        f"{result['dataloader_workers']} DataLoader worker(s), {', '.join(parts)}."
    )


def to_markdown(result: dict[str, Any], command: str) -> str:
    """Returns a section of a Markdown file: the table, the command that repeats it, versions, and the JSON."""
    origin = f"{result['date']}, torch {result['versions']['torch']}, commit {str(result['git_commit'])[:12]}"
    lines = [f"\n### {title_of(result)}\n", f"`{command}`, {origin}.", circumstances(result) + "\n"]
    details = f"\n<details><summary>JSON</summary>\n\n```json\n{json.dumps(result)}\n```\n\n</details>"
    return "\n".join([*lines, markdown_table(table_of(result)), details]) + "\n"


def print_table(result: dict[str, Any]) -> None:
    """Prints the table of a result and its circumstances."""
    headings, *rows = table_of(result)
    table = Table(*headings, box=None, title=title_of(result))
    for row in rows:
        table.add_row(*row)
    console = table_console()
    console.print(table)
    console.print(circumstances(result), highlight=False)


# --- floors -------------------------------------------------------------------------------------------------------

SMALL = ("model_v1", "model_v2", "model_v3", "simple_cnn", "mnistnet")
LARGE = ("ms_ran", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


def floors(result: dict[str, Any]) -> Iterator[tuple[str, float, float]]:
    """Yields (name, floor, measured) for each figure that a GPU should reach with the result's model."""
    model = result["model"]
    if "ms_per_call" in result:
        if model == "ms_ran" and "1" in result["ms_per_call"]:
            backends = result["ms_per_call"]["1"].items()
            fastest = min(ms["median"] for name, ms in backends if not name.startswith("ONNX Runtime (CPU)"))
            yield "single images/s, synchronized", 1000, round(1000 / fastest)
    elif "kind" in result:
        pass  # whole epochs: there are no floors for a GPU yet
    elif model in SMALL or model in LARGE:
        yield "share of the bare step", 0.90 if model in SMALL else 0.95, result["share_of_bare_step"][OURS]
        if model in SMALL:
            yield "÷ Accelerate + DataLoader", 20, result["ratio_of_mnist_dist_to"]["Accelerate + DataLoader"]
        if model == "model_v1":
            yield "÷ plain loop, device tensors", 5, result["ratio_of_mnist_dist_to"]["plain loop, device tensors"]
            yield "images/s", 500_000, result["images_per_second"][OURS]["median"]


def print_floors(paths: list[Path]) -> None:
    """Prints the floors and the figures of files that `--json` wrote.

    Raises:
        RecipeError: a file is missing or holds no benchmark result.
    """
    table = Table("recipe", "figure", "floor", "measured", "", box=None)
    for path in paths:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            for result in content.get("results", [content]):
                for name, floor, measured in floors(result):
                    verdict = "met" if measured >= floor else "not met"
                    table.add_row(result["recipe"], name, f"{floor:,}", f"{measured:,}", verdict)
        except OSError as error:
            problem = Problem(str(path), "--floors", f"cannot be read: {error.strerror}", "missing")
            raise RecipeError([problem]) from error
        except (ValueError, AttributeError, KeyError) as error:
            message = f"is not a file written by benchmark --json ({error!r})"
            raise RecipeError([Problem(str(path), "--floors", message, "damaged")]) from error
    table_console().print(table)
