"""Prints the training losses of runs side by side: `python launch/lessons/losses.py RUN OTHER …`."""

import json
import sys
from pathlib import Path


def losses(run: str) -> dict[int, float]:
    """Returns the loss of each logged step of a run folder."""
    lines = map(json.loads, (Path(run) / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


runs = [losses(run) for run in sys.argv[1:]]
print("step", *(f"{Path(run).name:>12}" for run in sys.argv[1:]))
for step in sorted(set().union(*runs)):
    print(f"{step:4}", *(f"{run[step]:12.7f}" if step in run else " " * 12 for run in runs))
for name, run in zip(sys.argv[2:], runs[1:], strict=True):
    difference = max(abs(run[step] - runs[0][step]) for step in run.keys() & runs[0].keys())
    print(f"largest difference between {Path(sys.argv[1]).name} and {Path(name).name}: {difference:.1e}")
