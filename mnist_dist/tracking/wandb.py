"""Logs to Weights & Biases through Accelerate's tracker, guarded so that it cannot prompt, stall or end a run."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from accelerate.tracking import WandBTracker
from accelerate.utils import patch_environment
from torch import Tensor

SETTINGS: dict[str, Any] = {
    "init_timeout": 30,  # a run that does not reach the server within this time is logged offline
    "finish_timeout": 60,
    "finish_timeout_raises": True,
    "silent": True,
    "console": "off",
    "save_code": True,
}
"""Settings of wandb, each unless its environment variable is set or this version of wandb does not know it."""

MOST_CELLS = 10_000
"""W&B shows this many rows of a table."""

PACKAGE = Path(__file__).parent.parent


class WandbTracker(WandBTracker):
    """One W&B run. After the first error of wandb, training continues without it; metrics.jsonl remains complete.

    Args:
        directory: the run folder.
        recipe: the file of the resolved recipe in the run folder.
        notify: called with one line for the user when wandb fails.
        gauges: returns further values for each line of training metrics. They describe the machine, not the result.
        init: keywords for `wandb.init`.
    """

    def __init__(
        self,
        project: str,
        *,
        directory: Path,
        recipe: Path,
        notify: Callable[[str], None],
        gauges: Callable[[], dict[str, float]] = dict,
        **init: Any,
    ):
        from wandb import Settings

        settings: dict[str, Any] = {key: value for key, value in SETTINGS.items() if key in Settings.model_fields}
        if (PACKAGE.parent / ".git").exists():  # otherwise wandb searches for a repository around the run folder
            settings["git_root"] = str(PACKAGE.parent)
        # wandb prefers a given setting to its environment variable.
        settings = {key: value for key, value in settings.items() if not os.environ.get(f"WANDB_{key.upper()}")}
        folder = os.environ.get("WANDB_DIR") or str(directory)
        super().__init__(project, dir=folder, settings=Settings(**settings), **init)
        self._directory, self._recipe, self._notify, self._gauges = directory, recipe, notify, gauges
        self._alive = False
        self.log_seconds = 0.0
        """Training time spent in logging."""

    def start(self) -> None:
        import wandb

        if wandb.run is not None:  # the user's own run: `init` would return it, and `finish` would end it
            self.init_kwargs["reinit"] = "create_new"
        while not self._alive:
            try:
                self._init()
                self._alive = True
            except Exception as error:
                if not self._changed_plan(_first_line(error)):
                    break
        self._guard("define metrics", self._define_metrics)
        self._guard("save the code", self._save_code)

    def _init(self) -> None:
        import wandb

        # wandb refuses a WANDB_MODE in capitals, even where `init` gets a mode.
        with self._writable_folders(), patch_environment(WANDB_MODE=self.init_kwargs.get("mode", "online")):
            wandb.setup()
            wandb.termsetup(self.init_kwargs["settings"], None)  # the setting `silent` alone does not silence a retry
            super().start()

    def _changed_plan(self, message: str) -> bool:
        """Notifies the user that the W&B run could not start, and chooses another way to start it, if there is one.

        Args:
            message: of wandb's error.
        """
        import wandb

        named = self.init_kwargs.get("id") or os.environ.get("WANDB_RUN_ID")
        if named and "409" in message:
            self._notify(f"the W&B run {named} has been deleted; this run continues as a new W&B run")
            self.init_kwargs |= {"id": uuid4().hex[:8], "resume": "allow"}
            return True
        if self.init_kwargs.get("mode") == "offline":
            self._notify(f"wandb could not start offline ({message}); training continues without it")
            return False
        self._notify(f"wandb could not start ({message}); this run is logged offline")
        self.init_kwargs["mode"] = "offline"
        if named and wandb.run is None:  # the service keeps the id of the run that failed, and refuses it to another
            with suppress(Exception):
                wandb.teardown()
        elif named:  # the service has a run of the user
            self.init_kwargs["id"] = uuid4().hex[:8]
        return True

    def _define_metrics(self) -> None:
        # The step is a metric: wandb's own step cannot decrease, but a resume repeats steps.
        self.run.define_metric("*", step_metric="step")
        for metric, goal in (("eval/accuracy", "max"), ("eval/loss", "min")):
            self.run.define_metric(metric, step_metric="step", summary=goal)
        # Logs nothing. The first call of `log` imports modules; made here, it does not slow the first training steps.
        self.run.log({}, commit=False)

    def _save_code(self) -> None:
        if self.run.settings.save_code and not self.run.settings.disable_code:
            self.run.log_code(str(PACKAGE))
        # A copy, because wandb would only link the file, which may change later.
        copy = shutil.copy(self._recipe, self.run.dir)
        self.run.save(copy, base_path=self.run.dir, policy="now")

    @property
    def run_id(self) -> str | None:
        """The id with which a resumed run continues this W&B run; None if the W&B run has failed."""
        return self.run.id if self._alive else None

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._guard("store the recipe", lambda: self.run.config.update(values, allow_val_change=True))

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self._timed("log", lambda: self.run.log(values | (self._gauges() if "train/loss" in values else {})))

    def log_evaluation(
        self, confusion: Tensor, classes: tuple[str, ...], tensors: dict[str, Tensor], *, step: int
    ) -> None:
        """Logs a confusion matrix, the accuracy of each class, and a histogram of each tensor.

        Args:
            confusion: int64 (classes, classes), number of images by truth and prediction.
            tensors: name of the histogram -> tensor of any shape.
        """

        def content() -> dict[str, Any]:
            from wandb import Histogram

            values: dict[str, Any] = {"step": step, "eval/confusion": _confusion_chart(confusion, classes)}
            for name, hits, count in zip(
                classes, confusion.diagonal().tolist(), confusion.sum(1).tolist(), strict=True
            ):
                if count:
                    values[f"eval/class/{name.replace('/', '-')}"] = 100 * hits / count
            for name, tensor in tensors.items():
                finite = tensor[tensor.isfinite()].float().cpu().numpy()
                if len(finite):
                    values[name] = Histogram(np_histogram=np.histogram(finite, bins=64))
            return values

        self._timed("log an evaluation", lambda: self.run.log(content()))

    def log_most_wrong(
        self, images: Tensor, labels: Tensor, probabilities: Tensor, classes: tuple[str, ...], *, step: int
    ) -> None:
        """Logs a table of the 32 images whose true class has the lowest probability.

        Args:
            images: uint8 (N, C, height, width).
            labels: int64 (N,).
            probabilities: float32 (N, classes).
        """

        def content() -> dict[str, Any]:
            from wandb import Image, Table

            table = Table(["index", "picture", "truth", "prediction", "confidence", "probability of the truth"])
            confidence, prediction = probabilities.max(dim=1)
            of_truth = probabilities.gather(1, labels[:, None])[:, 0]
            for index in of_truth.argsort()[:32].tolist():
                names = classes[int(labels[index])], classes[int(prediction[index])]
                picture = Image(images[index].movedim(0, -1).squeeze(-1).cpu().numpy())
                table.add_data(index, picture, *names, float(confidence[index]), float(of_truth[index]))
            return {"step": step, "test/most_wrong": table}

        self._guard("log the most wrong images", lambda: self.run.log(content()))

    def log_weights(self, files: list[Path], alias: str, about: dict[str, Any]) -> None:
        """Logs a version of the artifact `model-<run id>`.

        Args:
            files: what `load_run` needs.
            alias: the alias of the version, e.g. best.
            about: its metadata.
        """

        self._guard("log the weights", lambda: self._send(f"model-{self.run.id}", "model", files, [alias], about))

    def log_profile(self, files: list[Path]) -> None:
        """Logs the files of a profile as the artifact `profile-<run id>`."""
        self._guard("log the profile", lambda: self._send(f"profile-{self.run.id}", "profile", files, [], {}))

    def _send(self, name: str, kind: str, files: list[Path], aliases: list[str], about: dict[str, Any]) -> None:
        """Logs a version of an artifact."""
        from wandb import Artifact

        artifact = Artifact(name, type=kind, metadata=about)
        for file in files:
            # Uploaded from its folder, without a copy: the files of a finished run do not change.
            artifact.add_file(str(file.resolve()), policy="immutable", skip_cache=True)
        self.run.log_artifact(artifact, aliases=aliases)

    def summarize(self, values: dict[str, Any]) -> None:
        """Writes best and last values, which W&B's table of runs shows."""
        self._guard("write the summary", lambda: self.run.summary.update(values))

    def fail(self, title: str, message: str) -> None:
        """Sends an alert to users who have W&B's alerts enabled, and ends the W&B run as failed."""
        self._guard("send an alert", lambda: self.run.alert(title=title, text=message, level="ERROR"))
        self._end(exit_code=1)

    def preempt(self, exit_code: int) -> None:
        """Ends the W&B run as preempted. W&B then expects it to resume, and W&B's sweeps start it again."""
        self._guard("mark the run as preempted", lambda: self.run.mark_preempting())
        self._end(exit_code)

    def finish(self) -> None:
        self._end()

    def _end(self, exit_code: int | None = None) -> None:
        import wandb

        if getattr(self, "run", None) is None:
            return
        folder, reason = Path(self.run.dir).parent, ""
        try:
            with self._writable_folders():
                self.run.finish(exit_code=exit_code)
        except Exception as error:
            reason = _first_line(error)
        reason = reason or _upload_error(folder)
        # A failure before has been reported. The run is finished all the same: it would receive the next training.
        if self._alive and reason:
            command = f"wandb sync --include-online {folder}"
            self._notify(f"wandb could not upload the complete run ({reason}); upload it with: {command}")
        self._alive = False
        with suppress(Exception):
            wandb.termsetup(wandb.setup().settings, None)

    def _writable_folders(self) -> AbstractContextManager[None]:
        """Gives wandb folders for its data and its cache. The home folder may be full, read-only or unknown.

        Data for the upload are in the run folder. So is the cache if the home folder takes none: without a cache folder
        wandb's service writes its log to stderr.
        """
        from wandb.env import get_cache_dir

        folder = self._directory / "wandb"
        data, cache = os.environ.get("WANDB_DATA_DIR", folder), get_cache_dir()
        return patch_environment(
            WANDB_DATA_DIR=data, WANDB_CACHE_DIR=cache if _is_writable(cache) else folder / "cache"
        )

    def _timed(self, action: str, call: Callable[[], Any]) -> None:
        started = time.perf_counter()
        self._guard(action, call)
        self.log_seconds += time.perf_counter() - started

    def _guard(self, action: str, call: Callable[[], Any]) -> None:
        """Calls wandb. If that raises, notifies the user and makes no further calls.

        Args:
            action: completes the message "wandb could not …".
        """
        if not self._alive:
            return
        try:
            with self._writable_folders():
                call()
        except Exception as error:  # wandb raises errors of many kinds, e.g. its own and broken pipes
            self._alive = False
            self._notify(f"wandb could not {action} ({_first_line(error)}); training continues without it")


def _upload_error(folder: Path) -> str:
    """Returns why wandb stopped to upload the lines of a run; empty if it did not. wandb raises no error.

    Args:
        folder: wandb's folder of the run, with its logs.
    """
    with suppress(OSError, ValueError):
        for line in (folder / "logs" / "debug-internal.log").read_text(errors="replace").splitlines():
            if "filestream: fatal error" in line:
                return str(json.loads(line)["msg"]).splitlines()[0]
    return ""


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def _confusion_chart(confusion: Tensor, classes: tuple[str, ...]) -> Any:
    """Returns W&B's confusion chart from counts. `wandb.plot.confusion_matrix` would loop over all images in Python."""
    from wandb import Table, plot_table

    cells = confusion.flatten()
    # W&B drops the rows that a table has too many, so the empty cells are left out first.
    chosen = cells.argsort(descending=True)[: min(MOST_CELLS, int((cells > 0).sum()))].sort().values
    indices = range(len(cells)) if len(cells) <= MOST_CELLS else chosen.tolist()
    size = len(classes)
    rows = [[classes[index // size], classes[index % size], int(cells[index])] for index in indices]
    fields: dict[str, Any] = {name: name for name in ("Actual", "Predicted", "nPredictions")}
    return plot_table("wandb/confusion_matrix/v1", Table(list(fields), rows), fields, {"title": "confusions"})


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    # The first line of a wrong setting gives the number of errors only; its name and what is wrong are the next two.
    return ": ".join(line.strip() for line in lines[1:3]) if "validation error" in lines[0] and lines[1:] else lines[0]
