"""Describes why a run failed, and what the user can do."""

from __future__ import annotations

import errno
from pathlib import Path

from mnist_dist.distributed.devices import device_name
from mnist_dist.engine.shares import largest_share
from mnist_dist.engine.train_step import NotFinite
from mnist_dist.errors import first_line, is_out_of_memory
from mnist_dist.recipe.schema import Recipe
from mnist_dist.run.components import TrainingComponents
from mnist_dist.run.text_output import listed

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)
"""Error numbers of a disk that is full, read-only or broken: the user needs a message, not a traceback."""


def describe_cause(
    error: BaseException, recipe: Recipe, components: TrainingComponents, step: int, folder: Path
) -> list[str] | None:
    """Returns the cause of a failure and a remedy, a line each; None if only a traceback helps.

    Args:
        step: the number of steps that the run has made.
        folder: the run folder, for a disk error that names no file.
    """
    if isinstance(error, NotFinite):
        return _describe_nonfinite(error.step, components)
    if isinstance(error, OSError) and error.errno in UNWRITABLE:
        return [f"{error.filename or folder} cannot be written: {error.strerror}"]
    if is_out_of_memory(error):
        return _describe_memory(error, recipe, components, step)
    return None


def _describe_nonfinite(step: int, components: TrainingComponents) -> list[str]:
    """Returns which ranks and samples gave a gradient that is not finite, and a remedy."""
    epoch, index = divmod(step, components.batches.steps_per_epoch)
    lines = [f"the gradient of step {step} (epoch {epoch}, batch {index}) is not finite; the update was skipped"]
    offending_samples = components.update.offending_samples(step)
    for rank, samples in offending_samples:
        named = listed(list(map(str, samples)), 10)
        lines.append(f"rank {rank}: the loss of training samples {named} is not finite")
    if not offending_samples:
        lines.append("each sample alone has a finite loss; the loss or the gradient of the batch is not finite")
    return [*lines, "try a lower optimizer.lr, clip_grad_norm=1 or on_nonfinite=skip"]


def _describe_memory(error: BaseException, recipe: Recipe, components: TrainingComponents, step: int) -> list[str]:
    """Returns which rank has not enough memory, for how many images, and a remedy."""
    state = components.accelerator.state
    size = largest_share(recipe.batch_size, recipe.logical_shards or state.num_processes)
    if isinstance(recipe.micro_batch_size, int):
        size = min(size, recipe.micro_batch_size)
    smaller = f"micro_batch_size={size // 2}, " if size > 1 else ""
    narrower = "mixed_precision=bf16, " if state.device.type != "cpu" else ""  # some CPUs emulate it
    where = f"the memory of rank {state.process_index} ({device_name(state.device)}) is full after step {step}"
    return [
        f"{where}: {first_line(error)}",
        f"the rank computes up to {size} images at once in training, and up to {recipe.eval_batch_size} in evaluation",
        f"try {smaller}a smaller batch_size or eval_batch_size, {narrower}or more processes",
    ]
