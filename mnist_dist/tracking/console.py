"""Prints to the console of rank 0: a header, a progress bar, one line per epoch. Without a terminal, plain lines."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mnist_dist.errors import SafeStream
from mnist_dist.tracking.activity import FiguresColumn

PLAIN_SECONDS = 30.0
"""Shortest time between two lines of progress if the output is not a terminal."""


class ConsoleTracker(GeneralTracker):
    """Prints what is logged and writes every line, but not the bar, to `log_path`."""

    name = "console"
    requires_logging_directory = False

    def __init__(self, total_steps: int, epochs: int, split: str, log_path: Path, *, quiet: bool = False):
        super().__init__()
        # The run folder is complete without a console, so an error of the terminal or pipe must not end the run.
        stream: Any = sys.stdout and SafeStream(sys.stdout)
        # To a notebook rich would send objects, which the processes of `notebook_launcher` cannot: they print lines.
        lines: dict[str, Any] = {"force_jupyter": False, "force_terminal": False} if Console().is_jupyter else {}
        self._console = Console(quiet=quiet, file=stream, **lines)
        self._log = log_path.open("a", encoding="utf-8", errors="backslashreplace")  # a file name need not be text
        self._total_steps, self._epochs, self._split = total_steps, epochs, split
        self._progress = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            FiguresColumn(),
            TimeRemainingColumn(),
            console=self._console,
            refresh_per_second=4,
            speed_estimate_period=3600,  # rich's default of 30 s is less than one log interval of a large network
            transient=True,
        )
        self._bar = self._progress.add_task("", total=total_steps, epoch=f"1/{epochs}", figures="")
        self._last_plain = self._progress.get_time()

    @property
    def tracker(self) -> Console:
        return self._console

    def start(self) -> None:
        if self._console.is_terminal:
            self._progress.start()

    def message(self, text: str, style: str | None = None) -> None:
        """Prints one line above the bar and writes it to the log."""
        self._console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
        self._log.write(text + "\n")
        self._log.flush()

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
        now = self._progress.get_time()
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
        if self._console.is_terminal:
            self._progress.stop()
        self._log.close()
