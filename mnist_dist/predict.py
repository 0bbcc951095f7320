"""Classifies picture files: `python -m mnist_dist.predict runs/mine photo.jpg folder/`.

A picture may have any size, colour, bit depth or transparency, and may be dark on light or light on dark. It is
prepared as the training images were; see `mnist_dist.data.pictures`. The network is computed on the CPU in fp32, even
if it was trained in another precision.
"""

from __future__ import annotations

from mnist_dist.cli import answer_early, parse, run_command

if __name__ == "__main__":
    answer_early("predict")  # before the imports below load torch

import json
import sys
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console

from mnist_dist.errors import FAILED
from mnist_dist.run.prediction import predict_picture
from mnist_dist.run.reader import find_runs, load_run, open_run
from mnist_dist.run.text_output import printable


def predict_digit(
    path: str | Path, run: str | Path | None = None, allow_code: str | Iterable[str] = ()
) -> tuple[str, float]:
    """Classifies a picture file: a digit, or whatever the run was trained on.

    Args:
        path: a picture file.
        run: a run folder; None for the newest finished run below ./runs.
        allow_code: see `load_run`.

    Returns:
        The name of the likeliest class and its probability (0 to 1).

    Raises:
        FileNotFoundError: there is no such run.
        ValueError: the picture cannot be read.
    """
    opened = load_run(_newest_run() if run is None else run, "last", allow_code)
    found = predict_picture(opened, Path(path))
    return found["class"], found["confidence"]


def _newest_run() -> Path:
    runs = [run for run in find_runs(Path("runs")) if (run / "summary.json").is_file()]
    if not runs:
        raise FileNotFoundError("./runs contains no finished run; name a run folder")
    return max(runs, key=lambda run: (run / "summary.json").stat().st_mtime)


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns the exit code: 0, or 1 if a picture could not be read.

    Exit code 2 means: no such run or weights.
    """
    arguments = parse("predict", argv)
    run = open_run(arguments.run, arguments.weights, arguments.allow_code)
    paths = [path for given in arguments.pictures for path in _files(given)]
    found, failed = [], len(paths) == 0
    for path in paths:
        try:
            found.append({"path": printable(path), **predict_picture(run, path)})
        except ValueError as error:
            failed = True
            print(f"mnist_dist: {printable(path)}: {error}", file=sys.stderr)
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        console = Console(soft_wrap=True, highlight=False, markup=False)
        for each in found:
            others = ", ".join(f"{other['class']} {100 * other['confidence']:.1f} %" for other in each["top3"][1:])
            unsure = f"  unsure: {each['unsure']}" if each["unsure"] else ""
            console.print(
                f"{each['path']}: {each['class']}  {100 * each['confidence']:.1f} %  (next: {others}){unsure}"
            )
    return FAILED if failed else 0


def _files(path: Path) -> list[Path]:
    """Returns the file itself, or all files below a folder except hidden ones, sorted."""
    if not path.is_dir():
        return [path]
    files = sorted(each for each in path.rglob("*") if each.is_file() and not each.name.startswith("."))
    if not files:
        print(f"mnist_dist: {printable(path)}: the folder contains no files", file=sys.stderr)
    return files


if __name__ == "__main__":
    sys.exit(run_command(main))
