"""Trackers for Accelerate: console, JSON lines, Weights & Biases and others. `accelerator.log(...)` calls all."""

from typing import TypeVar

from accelerate import Accelerator

from mnist_dist.tracking.console import ConsoleTracker
from mnist_dist.tracking.jsonl import JSONLReader, JSONLTracker
from mnist_dist.tracking.others import OtherTracker, missing_packages
from mnist_dist.tracking.wandb import WandbTracker
from mnist_dist.tracking.wandb_mode import resolve_mode, server_url

__all__ = [
    "ConsoleTracker",
    "JSONLReader",
    "JSONLTracker",
    "OtherTracker",
    "WandbTracker",
    "find_tracker",
    "missing_packages",
    "resolve_mode",
    "server_url",
]

Tracker = TypeVar("Tracker", ConsoleTracker, JSONLTracker, WandbTracker)


def find_tracker(accelerator: Accelerator, kind: type[Tracker]) -> Tracker | None:
    """Returns the tracker of this kind; None if the run has none. Only rank 0 has trackers."""
    return next((each for each in accelerator.trackers if isinstance(each, kind)), None)
