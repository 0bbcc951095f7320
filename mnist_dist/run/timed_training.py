"""Trains a recipe for a given number of steps at a time and measures them, for the commands that measure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from mnist_dist.data import Images
from mnist_dist.errors import MeasurementStopped, RunError
from mnist_dist.recipe.schema import Recipe
from mnist_dist.run.checkpointing import Checkpointer
from mnist_dist.run.components import Progress, TrainingComponents
from mnist_dist.run.folder import RunFolder

ENDLESS = {"epochs": "1000", "eval_every": "1000", "max_steps": "null", "early_stopping.patience": "null"}
"""Overrides that keep every schedule and every loop from ending during a measurement."""


class TimedTraining:
    """A training that continues for as many steps as it is asked for.

    Args:
        fit: the training loop, `mnist_dist.train.fit`.
        recipe: a recipe that was loaded with the overrides `ENDLESS`.
        eval_images: images that are evaluated after the last step of each call of `run`, or after every epoch.
        folder: where checkpoints are written.
    """

    def __init__(
        self,
        fit: Callable[..., bool],
        recipe: Recipe,
        components: TrainingComponents,
        eval_images: Images,
        folder: RunFolder,
    ):
        self._fit, self._recipe, self._components = fit, recipe, components
        self._eval_images = components.place(eval_images)
        self._progress = Progress()
        self._checkpointer = Checkpointer(folder, recipe, components, self._progress)

    def run(self, steps: int) -> float:
        """Makes this number of further steps. Collective: call on every rank.

        Returns:
            Their duration in seconds, with the work of the device and the log lines, without the evaluation.

        Raises:
            RunError: the training failed or was stopped.
        """
        meter, last = self._components.meter, self._progress.step + steps
        before = meter.train_seconds  # evaluation does not count as training
        components = replace(self._components, total_steps=last)
        meter.resume()
        try:
            finished = self._fit(self._recipe, components, self._eval_images, self._checkpointer, self._progress)
        except Exception as error:
            if message := self._checkpointer.describe_failure(error):
                # The last line explains how to resume, but this training is not kept.
                raise RunError(message.rpartition("\n")[0]) from error
            raise
        if not finished:
            raise MeasurementStopped
        assert self._progress.step == last, "a round that ended early would look too fast"
        self._checkpointer.wait()  # the thread that writes must not disturb what is timed next
        return meter.train_seconds - before
