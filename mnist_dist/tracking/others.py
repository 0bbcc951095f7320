"""Trackers of Accelerate in addition to W&B, each in a thread. None of them can delay or end a run."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from queue import SimpleQueue
from typing import Any

from accelerate.tracking import GeneralTracker

FINISH_SECONDS = 120.0
"""The end of a run waits no longer than this for a tracker that still writes."""


def missing_packages(name: str) -> list[str]:
    """Returns the packages that a tracker needs and that are not installed."""
    needed = [name]
    if name == "mlflow" and not os.environ.get("MLFLOW_TRACKING_URI"):
        needed += ["sqlalchemy", "alembic"]  # for the SQLite file; mlflow-skinny does not bring them
    return [each for each in needed if find_spec(each) is None]


class OtherTracker(GeneralTracker):
    """Calls TensorBoard, MLflow or Trackio in a thread, so that no training step waits for a store or a server.

    After the first error, training continues without the tracker; metrics.jsonl remains complete.

    Args:
        name: a name in `stores.STORES`.
        run: the fields of `stores.TrackedRun`.
        lines: what metrics.jsonl keeps of the run so far.
        notify: called with one line for the user when the tracker fails.
    """

    requires_logging_directory = False

    def __init__(self, name: str, run: dict[str, Any], lines: Sequence[dict[str, Any]], notify: Callable[[str], None]):
        self.name = name
        super().__init__()
        self._run, self._lines, self._notify, self._working = run, lines, notify, True
        self._step, self._keys, self._ended = -1, {"step"}, False
        self._store: Any = None
        self._calls: SimpleQueue[tuple[str, Callable[[], None]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)

    @property
    def tracker(self) -> Any:
        return self._store

    def start(self) -> None:
        self._thread.start()
        self._calls.put(("start", self._open))
        for line in self._lines:
            self.log(line)

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Passes a line of metrics.jsonl to the thread, with its step as the step of the tracker."""
        if values["step"] != self._step:
            self._step, self._keys = values["step"], {"step"}
        # An evaluation has the step and the epoch of the line before it; each value is logged once a step.
        rest = {key: value for key, value in values.items() if key not in self._keys}
        self._keys |= rest.keys()
        self._calls.put(("log", lambda: self._store.log(rest, step=values["step"])))

    def finish(self) -> None:
        self.end("FINISHED")

    def end(self, status: str) -> None:
        """Waits for the thread and ends the run in the store. The first call counts.

        Args:
            status: one of MLflow's words FINISHED, FAILED and KILLED.
        """
        if self._ended:
            return
        self._ended = True
        self._calls.put(("finish", lambda: self._store and self._store.end(status)))
        self._calls.put(None)
        self._thread.join(FINISH_SECONDS)
        if self._thread.is_alive():
            self._fail(f"it still writes after {FINISH_SECONDS:.0f} s")

    def _open(self) -> None:
        # In the thread: the packages take seconds to import. An old version of Accelerate has no tracker for Trackio.
        from mnist_dist.tracking.stores import STORES, TrackedRun

        config = {key: _plain(value) for key, value in self._run["config"].items()}
        self._store = STORES[self.name](TrackedRun(**self._run | {"config": config}), self._fail)
        self._store.start()

    def _work(self) -> None:
        while call := self._calls.get():
            action, function = call
            # A tracker that has failed is closed all the same: it has changed variables of the environment.
            if not self._working and action != "finish":
                continue
            try:
                function()
            except Exception as error:  # each package raises errors of its own
                self._fail(f"it could not {action}: {_first_line(error)}")

    def _fail(self, message: str) -> None:
        """Notifies the user of the first error and makes no further calls."""
        if self._working:
            self._working = False
            with suppress(ValueError):  # the console is closed: the run has ended without this tracker
                self._notify(f"{self.name} failed ({message}); training continues without it")


def _plain(value: Any) -> bool | int | float | str:
    """Returns a value of a recipe in a type that all trackers accept."""
    return value if isinstance(value, (bool, int, float, str)) else "null" if value is None else str(value)


def _first_line(error: Exception) -> str:
    """Returns the first line of an error's message, or the name of its type."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
