"""Accelerate's trackers for TensorBoard, MLflow and Trackio, with a store in the run folder that has each step once.

Each class has `start`, `log` and `end`, which `OtherTracker` calls in a thread.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from accelerate.tracking import MLflowTracker, TensorBoardTracker, TrackioTracker
from accelerate.utils import patch_environment

RUN = "run-"
"""An empty file in `mlflow/` has this prefix and the id of the MLflow run as its name."""


class TrackedRun(NamedTuple):
    """What the trackers need to know about a run."""

    folder: Path
    """The run folder. The store of a tracker is the folder below it that has the tracker's name."""
    project: str
    """MLflow's experiment, Trackio's project."""
    name: str
    group: str
    config: dict[str, Any]
    """The resolved recipe: dotted key -> value."""


class TensorBoard(TensorBoardTracker):
    """Event files in `tensorboard/`. A resumed run writes them again from the lines that metrics.jsonl keeps."""

    def __init__(self, run: TrackedRun, report: Callable[[str], None]):
        # TensorBoard forgets what it has read from earlier files: a server may be running.
        super().__init__(self.name, run.folder, purge_step=0)
        self._folder, self._config = run.folder / self.name, run.config

    def start(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        super().start()
        self.store_init_configuration(self._config)

    def end(self, status: str) -> None:
        self.finish()


class MLflow(MLflowTracker):
    """A SQLite file in `mlflow/`, or the store that MLFLOW_TRACKING_URI names.

    A resumed run continues its MLflow run. MLflow cannot delete the points after the checkpoint, so they stay, and the
    resumed run does not log them again.
    """

    def __init__(self, run: TrackedRun, report: Callable[[str], None]):
        self._folder, self._config = run.folder / self.name, run.config
        super().__init__(run.project, run_name=run.name)
        self.run_id: str | None
        self._undo = ExitStack()

    def start(self) -> None:
        self._folder.mkdir(exist_ok=True)
        settings = {"MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true"}
        # On stderr MLflow reports that it creates its tables.
        for key, value in (("MLFLOW_LOGGING_LEVEL", "WARNING"), ("MLFLOW_DISABLE_TELEMETRY", "true")):
            settings[key] = os.environ.get(key, value)
        self._undo.enter_context(patch_environment(**settings))
        import mlflow

        known = [path.name.removeprefix(RUN) for path in self._folder.glob(f"{RUN}*")]
        self.run_id = self.run_id or (known or [None])[0]  # set already: MLFLOW_RUN_ID
        if not mlflow.is_tracking_uri_set():
            if self.run_id is None:
                # A process that was killed while MLflow created the tables has left a file that MLflow cannot open.
                for path in self._folder.glob("mlflow.db*"):
                    path.unlink()
            self._undo.enter_context(patch_environment(MLFLOW_TRACKING_URI=f"sqlite:///{self._folder}/mlflow.db"))
            self.logging_dir = str(self._folder / "artifacts")  # the default is below the working directory
        super().start()
        run_id = self.active_run.info.run_id
        (self._folder / f"{RUN}{run_id}").touch()
        client = mlflow.MlflowClient()
        data = client.get_run(run_id).data
        self._logged = {(key, point.step) for key in data.metrics for point in client.get_metric_history(run_id, key)}
        # MLflow refuses to change a parameter.
        self.store_init_configuration({key: value for key, value in self._config.items() if key not in data.params})

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Logs the values that the store does not have at this step."""
        if new := {key: value for key, value in values.items() if (key, step) not in self._logged}:
            super().log(new, step, **kwargs)

    def end(self, status: str) -> None:
        """Ends the run as FINISHED, FAILED or KILLED."""
        import mlflow

        with self._undo:
            mlflow.end_run(status)


class Trackio(TrackioTracker):
    """A SQLite file in `trackio/`. A resumed run writes it again from the lines that metrics.jsonl keeps.

    Args:
        report: called with each warning: Trackio raises no errors.
    """

    def __init__(self, run: TrackedRun, report: Callable[[str], None]):
        names = {"name": run.name, "group": run.group, "config": run.config}
        super().__init__(run.project, **names, embed=False, auto_log_cpu=False, auto_log_gpu=False)
        self._folder, self._report, self._undo = run.folder / self.name, report, ExitStack()

    def start(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        self._undo.enter_context(patch_environment(TRACKIO_DIR=str(self._folder)))
        import trackio  # noqa: F401 (it reads the variable at its first import only)

        self._undo.enter_context(_patched_modules("trackio", self._names()))
        super().start()

    def _names(self) -> dict[str, Any]:
        """Returns what replaces names in Trackio's modules: its folder; prints, which would break the bar; warnings."""
        return {
            "TRACKIO_DIR": self._folder,
            "MEDIA_DIR": self._folder / "media",
            "print": lambda *arguments, **keywords: None,
            "_emit_nonfatal_warning": lambda message, *arguments, **keywords: self._report(message),
        }

    def end(self, status: str) -> None:
        with self._undo:
            self.finish()


@contextmanager
def _patched_modules(package: str, names: dict[str, Any]) -> Iterator[None]:
    """Replaces names in all modules of a package that are imported; `print` also where it is the built-in function."""
    modules = [vars(module) for key, module in list(sys.modules.items()) if key.partition(".")[0] == package]
    before = [(module, {key: module[key] for key in names if key in module}) for module in modules]
    for module, found in before:
        module.update({key: value for key, value in names.items() if key in found or key == "print"})
    yield
    for module, found in before:
        module.pop("print", None)
        module.update(found)


STORES: dict[str, type[TensorBoard] | type[MLflow] | type[Trackio]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "trackio": Trackio,
}
