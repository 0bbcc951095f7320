"""Writes the log lines of the training; on a CUDA device, each one a log interval late."""

from __future__ import annotations

from mnist_dist.engine.metrics import Reading
from mnist_dist.engine.train_step import NotFinite
from mnist_dist.run.components import Progress, TrainingComponents


class LogLines:
    """Logs the figures of the training.

    On a CUDA device a line is written when the next one begins, or by `finish`, so that the device computes while the
    line is read. On other devices, and in fp16, a line is written at once.
    """

    def __init__(self, components: TrainingComponents):
        self._components = components
        self._pending: tuple[dict[str, float], dict[str, float], Reading] | None = None
        """First and last values of the line that is not written yet, and the reading of the values between them."""

    def add(self, progress: Progress) -> None:
        """Begins the line of the latest step, and writes the previous line. Collective: call on every rank.

        Raises:
            NotFinite: as `TrainStep.check`; on a CUDA device for a step of the previous line.
        """
        components, meter = self._components, self._components.meter
        line_before = self._read()
        if not meter.reads_behind:
            components.update.check()
        position = {"step": progress.step, "epoch": components.epoch(progress)}
        rates = {"train/lr": components.schedule.lr_at(progress.step - 1)}
        self._pending = position, rates, meter.start_reading(*components.update.health())
        if line_before:
            components.accelerator.log(line_before)
        if not meter.reads_behind:
            self.finish()

    def finish(self) -> None:
        """Writes the line that is not written yet. Call it after an evaluation and before a checkpoint.

        Waits for the device. Collective: call on every rank.

        Raises:
            NotFinite: as `TrainStep.check`.
        """
        if line := self._read():
            self._components.meter.agree()
            self._components.accelerator.log(line)

    def _read(self) -> dict[str, float] | None:
        """Returns the line that is not written yet, and forgets it; None if there is none."""
        if self._pending is None:
            return None
        (position, rates, reading), self._pending = self._pending, None
        reading.end.wait()
        norm, bad = reading.figures[-2:].tolist()
        try:
            if bad:
                self._components.update.check()
        except NotFinite:  # the checkpoint of the state before the bad step needs the figures
            self._components.meter.take_back(reading)
            raise
        meter = self._components.meter
        figures = meter.finish_reading(reading) | rates | {"train/grad_norm": norm}
        return position | figures | meter.process_figures()
