"""What the benchmark found, in words: tables for the console and for Markdown files, and floors held beside it.

A `result` is what `mnist_dist.benchmark --json` writes of one recipe, of its training or (`ms_per_call`) its inference.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from mnist_dist.run.tables import markdown_table

OURS = "mnist_dist"
Rows = list[tuple[str, ...]]


def table_of(result: dict[str, Any]) -> Rows:
    """The figures of `measure` or `measure_inference`, the heads of the columns first."""
    if "ms_per_call" in result:
        rows: Rows = [("batch", "way", "ms a call", "lowest", "highest", "µs an image")]
        for size, ways in result["ms_per_call"].items():
            for name, ms in ways.items():
                figures = [f"{ms[which]:,.3f}" for which in ("median", "min", "max")]
                rows.append((size, name, *figures, f"{1000 * ms['median'] / int(size):,.1f}"))
        return rows
    rows = [("loop", "images/s", "lowest", "highest", "ms/step", "of the bare step", f"{OURS} ÷ it")]
    for name, speed in result["images_per_second"].items():
        figures = [f"{speed[which]:,.0f}" for which in ("median", "min", "max")]
        ratios = [result[kind].get(name) for kind in ("share_of_bare_step", "ratio_of_mnist_dist_to")]
        milliseconds = f"{result['ms_per_step'][name]['median']:,.2f}"
        rows.append((name, *figures, milliseconds, *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios)))
    return rows


def circumstances(result: dict[str, Any]) -> str:
    """A sentence or two on how the figures came about."""
    if "ms_per_call" in result:
        calls = f"up to {result['calls_per_round']} calls"
        return f"{result['rounds']} interleaved rounds of {calls}, medians; each answer is waited for."
    parts = [f"peak memory {result['peak_memory_mb']:,} MB"]
    times = {"seconds_from_process_start_to_first_step": "from the process's start to its first step"}
    for key, what in (times | {"capture_seconds": "capture", "compile_seconds": "compilation"}).items():
        if result[key] is not None:
            parts.append(f"{what} {result[key]:.1f} s")
    return (
        f"{result['rounds']} interleaved rounds of {min(result['steps_per_round'].values())} steps or more, medians; "
        f"batch {result['batch_size']}, {result['world_size']} process(es), "
        f"DataLoader workers: {result['dataloader_workers']}; {', '.join(parts)}."
    )


def title_of(result: dict[str, Any]) -> str:
    what = ", inference" if "ms_per_call" in result else f" {result['sweep']}" if "sweep" in result else ""
    precision = {"no": "fp32"}.get(result["mixed_precision"], result["mixed_precision"])
    return f"{result['recipe']}{what}, {precision}, {result['device']}"


def to_markdown(result: dict[str, Any], command: str) -> str:
    """The table as a section of a Markdown file, with all that is needed to make it again."""
    made = f"{result['date']}, torch {result['versions']['torch']}, commit {str(result['git_commit'])[:12]}"
    lines = [f"\n### {title_of(result)}\n", f"`{command}`, {made}.", circumstances(result) + "\n"]
    whole = f"\n<details><summary>JSON</summary>\n\n```json\n{json.dumps(result)}\n```\n\n</details>"
    return "\n".join([*lines, markdown_table(table_of(result)), whole]) + "\n"


SMALL = ("model_v1", "model_v2", "model_v3", "simple_cnn", "mnistnet")
LARGE = ("ms_ran", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


def floors(result: dict[str, Any]) -> Iterator[tuple[str, float, float]]:
    """What a GPU is expected to reach with a model: (what, the least, measured)."""
    model = result["model"]
    if "ms_per_call" in result:
        if model == "ms_ran" and "1" in result["ms_per_call"]:
            ways = result["ms_per_call"]["1"].items()
            fastest = min(ms["median"] for name, ms in ways if not name.startswith("ONNX Runtime (CPU)"))
            yield "single images/s, each waited for", 1000, round(1000 / fastest)
    elif model in SMALL or model in LARGE:
        yield "share of the bare step", 0.90 if model in SMALL else 0.95, result["share_of_bare_step"][OURS]
        if model in SMALL:
            yield "÷ Accelerate + DataLoader", 20, result["ratio_of_mnist_dist_to"]["Accelerate + DataLoader"]
        if model == "model_v1":
            yield "÷ plain loop, device tensors", 5, result["ratio_of_mnist_dist_to"]["plain loop, device tensors"]
            yield "images/s", 500_000, result["images_per_second"][OURS]["median"]
