"""Weights & Biases through Accelerate's tracker, so guarded that it can neither prompt, nor stall, nor end a run."""

from __future__ import annotations

import configparser
import netrc
import os
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
from accelerate.tracking import WandBTracker
from accelerate.utils import patch_environment
from torch import Tensor

INIT_SECONDS = 30
"""How long an online run may take to reach the server before the run goes offline."""

PACKAGE = Path(__file__).parent.parent


def resolve_mode(mode: str) -> tuple[str, str]:
    """Turns `auto` into online or offline: credentials decide, WANDB_MODE overrules.

    Returns:
        the mode, and the sentence that says why.
    """
    if mode != "auto":
        return mode, f"{mode}, as the recipe says"
    asked = os.environ.get("WANDB_MODE")
    if asked in ("online", "offline", "disabled", "dryrun"):
        mode = "offline" if asked == "dryrun" else asked
        return mode, f"{mode}, as WANDB_MODE says"
    if _has_credentials():
        return "online", "online, credentials found"
    return "offline", "offline, no credentials (wandb login); wandb sync uploads it later"


def server_url() -> str:
    """W&B's server: the environment's, else the one that `wandb login --host` took down, else the public one."""
    folder = Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser()
    settings = configparser.ConfigParser(interpolation=None)
    with suppress(configparser.Error, UnicodeDecodeError):
        settings.read(folder / "settings")
    noted = settings.get("default", "base_url", fallback="")
    return os.environ.get("WANDB_BASE_URL") or noted or "https://api.wandb.ai"


def _has_credentials() -> bool:
    """Looks where wandb looks, without importing it or asking anybody."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(server_url()).netloc  # with its port, as wandb writes it there
    for path in filter(None, (os.environ.get("NETRC"), "~/.netrc", "~/_netrc")):
        try:
            if netrc.netrc(Path(path).expanduser()).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


class WandbTracker(WandBTracker):
    """One W&B run. Whatever it raises is said once and the training goes on; metrics.jsonl holds everything anyway.

    Args:
        directory: the run folder. recipe: the resolved one, a file in it.
        gauges: asked for further figures with each line of training; they are of the machine, not of the result.
    """

    def __init__(
        self,
        project: str,
        *,
        directory: Path,
        recipe: Path,
        say: Callable[[str], None],
        gauges: Callable[[], dict[str, float]] = dict,
        **init: Any,
    ):
        from wandb import Settings

        settings = Settings(init_timeout=INIT_SECONDS, finish_timeout=60, silent=True, console="off", save_code=True)
        if (PACKAGE.parent / ".git").exists():  # else wandb looks for a repository around the run folder
            settings.git_root = str(PACKAGE.parent)
        super().__init__(project, dir=str(directory), settings=settings, **init)
        self._directory, self._recipe, self._say, self._gauges = directory, recipe, say, gauges
        self._alive = False
        self.log_seconds = 0.0
        """What logging took of the training's time."""

    def start(self) -> None:
        try:
            super().start()
        except Exception as error:
            self._say(f"wandb could not start online ({_first_line(error)}); this run is logged offline")
            self.init_kwargs["mode"] = "offline"
            self._alive = True
            self._guard("start offline", super().start)
        self._alive = getattr(self, "run", None) is not None
        self._guard("define metrics", self._define_metrics)
        self._guard("save the code", self._save_code)

    def _define_metrics(self) -> None:
        # The step is a metric of its own: wandb refuses to go back in its built-in step after a resume.
        self.run.define_metric("*", step_metric="step")
        for metric, goal in (("eval/accuracy", "max"), ("eval/loss", "min")):
            self.run.define_metric(metric, step_metric="step", summary=goal)
        # Leaves no line; what wandb imports at the first call it imports here, not beside the first steps.
        self.run.log({}, commit=False)

    def _save_code(self) -> None:
        self.run.log_code(str(PACKAGE))
        # A copy, which stays as it is; wandb by itself would link to the file.
        copy = shutil.copy(self._recipe, self.run.dir)
        self.run.save(copy, base_path=self.run.dir, policy="now")

    @property
    def run_id(self) -> str | None:
        """With which a resumed run continues this one."""
        return self.run.id if self._alive else None

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._guard("store the recipe", lambda: self.run.config.update(values, allow_val_change=True))

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self._timed("log", lambda: self.run.log(values | (self._gauges() if "train/loss" in values else {})))

    def log_evaluation(
        self, confusion: Tensor, classes: tuple[str, ...], tensors: dict[str, Tensor], *, step: int
    ) -> None:
        """Confusion matrix, accuracy of each class, and a histogram of each tensor.

        Args:
            confusion: int64 (classes, classes), images by truth and prediction.
            tensors: of any shape, by the name of their histogram.
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
        """A table of the 32 images that the network gives the least probability to be what they are.

        Args:
            images: uint8 (N, 1, height, width). labels: int64 (N,). probabilities: float32 (N, classes).
        """

        def content() -> dict[str, Any]:
            from wandb import Image, Table

            table = Table(["index", "picture", "truth", "prediction", "confidence", "probability of the truth"])
            confidence, prediction = probabilities.max(dim=1)
            of_truth = probabilities.gather(1, labels[:, None])[:, 0]
            for index in of_truth.argsort()[:32].tolist():
                names = classes[int(labels[index])], classes[int(prediction[index])]
                picture = Image(images[index, 0].numpy())
                table.add_data(index, picture, *names, float(confidence[index]), float(of_truth[index]))
            return {"step": step, "test/most_wrong": table}

        self._guard("log the most wrong images", lambda: self.run.log(content()))

    def log_weights(self, files: list[Path], alias: str, about: dict[str, Any]) -> None:
        """A version of the artifact `model-<run id>`: what `load_run` needs, with `about` as its metadata."""

        def send() -> None:
            from wandb import Artifact

            artifact = Artifact(f"model-{self.run.id}", type="model", metadata=about)
            for file in files:
                # Uploaded from where they lie: a finished run's weights do not change.
                artifact.add_file(str(file.resolve()), policy="immutable", skip_cache=True)
            self.run.log_artifact(artifact, aliases=[alias])

        self._guard("log the weights", send)

    def summarize(self, values: dict[str, Any]) -> None:
        """Best and last values, shown in W&B's table of runs."""
        self._guard("write the summary", lambda: self.run.summary.update(values))

    def fail(self, title: str, what: str) -> None:
        """Alerts whoever asked W&B for alerts, and ends the W&B run as failed."""
        self._guard("send an alert", lambda: self.run.alert(title=title, text=what, level="ERROR"))
        self._end(exit_code=1)

    def preempt(self, exit_code: int) -> None:
        """Ends the W&B run as preempted: W&B knows then that it will go on, and its sweeps start it again."""
        self._guard("say that it was preempted", lambda: self.run.mark_preempting())
        self._end(exit_code)

    def finish(self) -> None:
        self._end()

    def _end(self, exit_code: int | None = None) -> None:
        if self._alive:
            self._guard("finish", lambda: self.run.finish(exit_code=exit_code))
        elif getattr(self, "run", None):
            # It broke, and that was said. Left open, it would take in the next training of this process.
            with suppress(Exception), self._data_here():
                self.run.finish(exit_code=exit_code)

    def _data_here(self) -> AbstractContextManager[None]:
        """What waits to be uploaded stays in the run folder: a home may be full, or read-only."""
        return patch_environment(WANDB_DATA_DIR=os.environ.get("WANDB_DATA_DIR", self._directory / "wandb"))

    def _timed(self, what: str, call: Callable[[], Any]) -> None:
        started = time.perf_counter()
        self._guard(what, call)
        self.log_seconds += time.perf_counter() - started

    def _guard(self, what: str, call: Callable[[], Any]) -> None:
        if not self._alive:
            return
        try:
            with self._data_here():
                call()
        except Exception as error:  # wandb raises anything from its own errors to broken pipes
            self._alive = False
            self._say(f"wandb could not {what} ({_first_line(error)}); training goes on without it")


def _confusion_chart(confusion: Tensor, classes: tuple[str, ...]) -> Any:
    """W&B's own chart, from counts; its function for it would go through every image in Python."""
    from wandb import Table, plot_table

    rows = [
        [truth, prediction, count]
        for truth, counts in zip(classes, confusion.tolist(), strict=True)
        for prediction, count in zip(classes, counts, strict=True)
    ]
    fields: dict[str, Any] = {name: name for name in ("Actual", "Predicted", "nPredictions")}
    return plot_table("wandb/confusion_matrix/v1", Table(list(fields), rows), fields, {"title": "confusions"})


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
