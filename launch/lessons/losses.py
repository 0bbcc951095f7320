"""Prints the training losses of runs side by side: `python launch/lessons/losses.py RUN OTHER …`.

`--key train/lr` prints the learning rates, or another number of metrics.jsonl.
"""

import argparse
import json
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("runs", nargs="+", type=Path)
parser.add_argument("--key", default="train/loss")
arguments = parser.parse_args()


def values(run: Path) -> dict[int, float]:
    """Returns the number of each step that has one in the run folder."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line[arguments.key] for line in lines if arguments.key in line}


columns = [values(run) for run in arguments.runs]
print("step", *(f"{run.name:>12}" for run in arguments.runs))
for step in sorted(set().union(*columns)):
    print(f"{step:4}", *(f"{column[step]:12.7f}" if step in column else f"{'':12}" for column in columns))
for run, column in zip(arguments.runs[1:], columns[1:], strict=True):
    difference = max(abs(column[step] - columns[0][step]) for step in column.keys() & columns[0].keys())
    print(f"largest difference between {arguments.runs[0].name} and {run.name}: {difference:.1e}")
