"""Pictures -> digits: `python -m mnist_dist.predict runs/mine photo.jpg folder/`.

A picture of any size, colour or transparency, dark on light or light on dark, is brought into the shape in which MNIST
was made (LeCun et al., "Gradient-based learning applied to document recognition", 1998): the ink scaled into 20×20
pixels, its centre of mass in the middle of 28×28.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rich.console import Console

from mnist_dist.cli import FAILED, answer_early, parse, run_command
from mnist_dist.data.pictures import read_picture
from mnist_dist.run.prediction import predict
from mnist_dist.run.reader import find_runs, load_run, open_run
from mnist_dist.run.tables import printable

if __name__ == "__main__":
    answer_early("predict")  # before the imports below load torch


def predict_digit(path: str | Path, run: str | Path | None = None) -> tuple[str, float]:
    """The digit (or letter, or garment) in a picture file, and how sure the network is (0 to 1).

    Args:
        run: a run folder; None for the newest finished one in ./runs.

    Raises:
        FileNotFoundError: no run folder there. ValueError: no picture that can be read.
    """
    [found] = predict(load_run(_newest_run() if run is None else run, "last"), read_picture(path)[None])
    return found["digit"], found["confidence"]


def _newest_run() -> Path:
    runs = [run for run in find_runs(Path("runs")) if (run / "summary.json").is_file()]
    if not runs:
        raise FileNotFoundError("there is no finished run in ./runs; name a run folder")
    return max(runs, key=lambda run: (run / "summary.json").stat().st_mtime)


def main(argv: list[str] | None = None) -> int:
    """The door: exit code 0, 1 if any picture could not be read, 2 without a network or a picture."""
    arguments = parse("predict", argv)
    run = open_run(arguments.run, arguments.weights)
    paths = [path for given in arguments.pictures for path in _files(given)]
    found, failed = [], len(paths) == 0
    for path in paths:
        try:
            [each] = predict(run, read_picture(path)[None])
            found.append({"path": printable(path), **each})
        except ValueError as error:
            failed = True
            print(f"mnist_dist: {printable(path)}: {error}", file=sys.stderr)
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        console = Console(soft_wrap=True, highlight=False, markup=False)
        for each in found:
            others = ", ".join(f"{other['digit']} {100 * other['confidence']:.1f} %" for other in each["top3"][1:])
            console.print(f"{each['path']}: {each['digit']}  {100 * each['confidence']:.1f} %  (then {others})")
    return FAILED if failed else 0


def _files(path: Path) -> list[Path]:
    """The file itself, or a folder's files but for hidden ones, in order."""
    if not path.is_dir():
        return [path]
    files = sorted(each for each in path.rglob("*") if each.is_file() and not each.name.startswith("."))
    if not files:
        print(f"mnist_dist: {path}: no file in it", file=sys.stderr)
    return files


if __name__ == "__main__":
    sys.exit(run_command(main))
