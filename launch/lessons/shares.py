"""Prints profiles side by side, in ms per step, the mean of all ranks: `python launch/lessons/shares.py RUN …`."""

import json
import sys
from pathlib import Path

profiles = [json.loads((Path(run) / "profile" / "profile.json").read_text()) for run in sys.argv[1:]]


def row(name: str, values: list[float]) -> None:
    print(f"{name:28}", *(f"{1000 * value:9.2f}" for value in values))


print(f"{'ms per step':28}", *(f"{Path(run).name:>9}" for run in sys.argv[1:]))
for phase in profiles[0]["phases"]:
    if phase != "idle":  # of a GPU
        times = ([rank["seconds"].get(phase, 0.0) for rank in profile["ranks"]] for profile in profiles)
        row(phase, [sum(each) / len(each) for each in times])
row("the step", [profile["profiled_seconds"] for profile in profiles])
row("the step without profiler", [profile["plain_seconds"] for profile in profiles])
