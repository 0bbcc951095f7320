"""Describes why a run failed, and what the user can do."""

from __future__ import annotations

import errno

from mnist_dist.engine.train_step import NotFinite
from mnist_dist.run.components import TrainingComponents

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)
"""Error numbers of a disk that is full, read-only or broken: the user needs a message, not a traceback."""


def describe_cause(error: BaseException, components: TrainingComponents, folder: object) -> list[str] | None:
    """Returns the cause of a failure and a remedy, a line each; None if only a traceback helps.

    Args:
        folder: the run folder's path, for a disk error that names no file.
    """
    if isinstance(error, NotFinite):
        return _describe_nonfinite(error.step, components)
    if isinstance(error, OSError) and error.errno in UNWRITABLE:
        return [f"{error.filename or folder} cannot be written: {error.strerror}"]
    return None


def _describe_nonfinite(step: int, components: TrainingComponents) -> list[str]:
    """Returns which ranks and samples gave a gradient that is not finite, and a remedy."""
    epoch, index = divmod(step, components.batches.steps_per_epoch)
    lines = [f"the gradient of step {step} (epoch {epoch}, batch {index}) is not finite; the update was skipped"]
    offending_samples = components.update.offending_samples(step)
    for rank, samples in offending_samples:
        listed = ", ".join(map(str, samples[:10])) + (f" and {len(samples) - 10} more" if samples[10:] else "")
        lines.append(f"rank {rank}: the loss of training samples {listed} is not finite")
    if not offending_samples:
        lines.append("each sample alone has a finite loss; the loss or the gradient of the batch is not finite")
    return [*lines, "try a lower optimizer.lr, clip_grad_norm=1 or on_nonfinite=skip"]
