"""Console, JSON lines and Weights & Biases, each an Accelerate tracker: `accelerator.log(...)` tells all of them."""

from mnist_dist.tracking.console import ConsoleTracker
from mnist_dist.tracking.jsonl import JSONLReader, JSONLTracker
from mnist_dist.tracking.weights_and_biases import WandbTracker, resolve_mode

__all__ = ["ConsoleTracker", "JSONLReader", "JSONLTracker", "WandbTracker", "resolve_mode"]
