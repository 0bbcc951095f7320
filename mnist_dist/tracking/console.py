"""Prints to the console of rank 0: a header, a progress bar, one line per epoch. Without a terminal, plain lines."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mnist_dist.errors import SafeStream
from mnist_dist.tracking.activity import FiguresColumn, Standstill

PLAIN_SECONDS = 30.0
"""Shortest time between two lines of progress if the output is not a terminal."""


class ConsoleTracker(GeneralTracker):
    """Prints what is logged and writes every line, but not the bar, to `log_path`.

    If the training stands still for `PLAIN_SECONDS`, a line says what it waits for, and again when that time doubles.
    On a terminal the bar says it, and the line is only in `log_path`.

    Args:
        steps: returns the number of steps that the training has made; called by other threads.
        clock: returns the time in seconds.
    """

    name = "console"
    requires_logging_directory = False

    def __init__(
        self,
        total_steps: int,
        epochs: int,
        split: str,
        log_path: Path,
        *,
        quiet: bool = False,
        steps: Callable[[], int] = lambda: 0,
        clock: Callable[[], float] = time.monotonic,
    ):
        super().__init__()
        # The run folder is complete without a console, so an error of the terminal or pipe must not end the run.
        stream: Any = sys.stdout and SafeStream(sys.stdout)
        # To a notebook rich would send objects, which the processes of `notebook_launcher` cannot: they print lines.
        lines: dict[str, Any] = {"force_jupyter": False, "force_terminal": False} if Console().is_jupyter else {}
        self._console = Console(quiet=quiet, file=stream, **lines)
        self._log = log_path.open("a", encoding="utf-8", errors="backslashreplace")  # a file name need not be text
        self._total_steps, self._epochs, self._split = total_steps, epochs, split
        self._standstill, self._longest = Standstill(steps, clock), PLAIN_SECONDS
        self._ended, self._watcher = threading.Event(), threading.Thread(target=self._watch, daemon=True)
        self._clock, self._last_plain = clock, clock()
        self._progress = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            FiguresColumn(self._standstill),
            TimeRemainingColumn(),
            console=self._console,
            get_time=clock,
            refresh_per_second=4,
            speed_estimate_period=3600,  # rich's default of 30 s is less than one log interval of a large network
            transient=True,
        )
        self._bar = self._progress.add_task("", total=total_steps, epoch=f"1/{epochs}", figures="")

    @property
    def tracker(self) -> Console:
        return self._console

    def start(self) -> None:
        self._watcher.start()
        if self._console.is_terminal:
            self._progress.start()

    def message(self, text: str, style: str | None = None) -> None:
        """Prints one line above the bar and writes it to the log."""
        self._console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
        self.note(text)

    def note(self, text: str) -> None:
        """Writes one line to the log only."""
        self._log.write(text + "\n")
        self._log.flush()

    def _watch(self) -> None:
        while not self._ended.wait(1.0):
            self.report_standstill()

    def report_standstill(self) -> None:
        """Writes a line if the training stands still. Called every second, by a thread."""
        seconds = self._standstill.seconds()
        if seconds < PLAIN_SECONDS:
            self._longest = PLAIN_SECONDS
        elif seconds >= self._longest:
            self._longest *= 2
            write = self.note if self._console.is_terminal else self.message
            write(f"no step for {seconds:.0f} s: waiting for {self._standstill.cause()}")

    def header(self, facts: dict[str, str]) -> None:
        """Prints the facts of the run, one per line."""
        width = max(map(len, facts))
        for name, fact in facts.items():
            self.message(f"{name:<{width}}  {fact}", style="bold" if name == "recipe" else None)

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        if "train/loss" in values:
            self._show_interval(values)
        if "eval/accuracy" in values:
            self._show_epoch(values)

    def _show_interval(self, values: dict[str, Any]) -> None:
        speed = values["train/images_per_second"]
        figures = f"loss {values['train/loss']:.4f}  acc {values['train/accuracy']:.2f} %  {speed:,.0f} images/s"
        epoch = min(int(values["epoch"]) + 1, self._epochs)
        self._progress.update(self._bar, completed=values["step"], epoch=f"{epoch}/{self._epochs}", figures=figures)
        now = self._clock()
        if not self._console.is_terminal and now - self._last_plain >= PLAIN_SECONDS:
            self._last_plain = now
            left = self._progress.tasks[self._bar].time_remaining  # None until two intervals are known
            ending = "" if left is None else f"  {left / 60:.0f} min left"
            self.message(f"step {values['step']:,}/{self._total_steps:,}  {figures}{ending}")

    def _show_epoch(self, values: dict[str, Any]) -> None:
        number = -(-values["epoch"] // 1)
        self.message(
            f"epoch {number:.0f}/{self._epochs}  "
            f"train loss {values['train/epoch_loss']:.4f}  acc {values['train/epoch_accuracy']:.2f} %   "
            f"{self._split} loss {values['eval/loss']:.4f}  acc {values['eval/accuracy']:.2f} %"
        )

    def finish(self) -> None:
        self._ended.set()
        if self._watcher.is_alive():
            self._watcher.join()  # it writes to the log
        if self._console.is_terminal:
            self._progress.stop()
        self._log.close()
