"""Logs to Weights & Biases through Accelerate's tracker, guarded so that it cannot prompt, stall or end a run."""

from __future__ import annotations

import configparser
import io
import netrc
import os
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, redirect_stderr, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
from accelerate.tracking import WandBTracker
from accelerate.utils import patch_environment
from torch import Tensor

INIT_SECONDS = 30
"""A run that does not reach the W&B server within this time is logged offline."""

MOST_CELLS = 10_000
"""W&B shows this many rows of a table."""

PACKAGE = Path(__file__).parent.parent


def resolve_mode(mode: str) -> tuple[str, str]:
    """Resolves `auto` to online or offline by the credentials on this machine; the environment has priority.

    Returns:
        The mode, and its reason for the console.
    """
    if mode != "auto":
        return mode, f"{mode} (recipe)"
    requested = os.environ.get("WANDB_MODE", "").strip().lower()
    if requested in ("online", "offline", "disabled", "dryrun"):
        mode = "offline" if requested == "dryrun" else requested
        return mode, f"{mode} (WANDB_MODE)"
    if os.environ.get("WANDB_DISABLED", "").strip().lower() in ("true", "1", "yes", "on"):  # known from transformers
        return "disabled", "disabled (WANDB_DISABLED)"
    if _has_credentials():
        return "online", "online (credentials found)"
    return "offline", "offline (no credentials: run `wandb login`); `wandb sync` uploads the run later"


def server_url() -> str:
    """Returns W&B's server: WANDB_BASE_URL, else the server that `wandb login --host` stored, else the public one."""
    folder = Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser()
    settings = configparser.ConfigParser(interpolation=None)
    with suppress(configparser.Error, UnicodeDecodeError):
        settings.read(folder / "settings")
    stored = settings.get("default", "base_url", fallback="")
    return os.environ.get("WANDB_BASE_URL") or stored or _public_server()


def _public_server() -> str:
    """Returns the default server of the installed wandb. `wandb login` stores the key under the server's host."""
    try:
        from wandb.sdk.lib.urls import DEFAULT_BASE_URL
    except ImportError:  # an older version of wandb, which knows only this server
        return "https://api.wandb.ai"
    return DEFAULT_BASE_URL


def _has_credentials() -> bool:
    """Returns whether wandb's own reader finds credentials for its server. The reader neither prompts nor connects."""
    try:
        from wandb.sdk.lib.wbauth import authenticate_session
    except ImportError:  # another version of wandb: look in the documented places
        return _has_stored_key(urlparse(server_url()).netloc)
    try:
        # Without this, its warnings about a broken netrc file would appear above the header.
        with redirect_stderr(io.StringIO()):
            found = authenticate_session(host=server_url(), source="mnist_dist", prompt=False, update_session=False)
        return found is not None
    except Exception:  # a key of an invalid form, or a reader with other arguments
        return _has_stored_key(urlparse(server_url()).netloc)


def _has_stored_key(host: str) -> bool:
    """Returns whether the environment or a netrc file holds a key for `host`, given as HOST or HOST:PORT."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    for path in filter(None, (os.environ.get("NETRC"), "~/.netrc", "~/_netrc")):
        try:
            if netrc.netrc(Path(path).expanduser()).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


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

        settings = Settings(init_timeout=INIT_SECONDS, finish_timeout=60, silent=True, console="off", save_code=True)
        if (PACKAGE.parent / ".git").exists():  # otherwise wandb searches for a repository around the run folder
            settings.git_root = str(PACKAGE.parent)
        super().__init__(project, dir=str(directory), settings=settings, **init)
        self._directory, self._recipe, self._notify, self._gauges = directory, recipe, notify, gauges
        self._alive = False
        self.log_seconds = 0.0
        """Training time spent in logging."""

    def start(self) -> None:
        import wandb

        if wandb.run is not None:  # the user's own run: `init` would return it, and `finish` would end it
            self.init_kwargs["reinit"] = "create_new"
        try:
            # wandb refuses a WANDB_MODE in capitals, even where `init` gets a mode.
            with self._writable_folders(), patch_environment(WANDB_MODE=self.init_kwargs.get("mode", "online")):
                super().start()
        except Exception as error:
            self._notify(f"wandb could not start ({_first_line(error)}); this run is logged offline")
            self.init_kwargs["mode"] = "offline"
            self._alive = True
            self._guard("start offline", super().start)
        self._alive = getattr(self, "run", None) is not None
        self._guard("define metrics", self._define_metrics)
        self._guard("save the code", self._save_code)

    def _define_metrics(self) -> None:
        # The step is a metric: wandb's own step cannot decrease, but a resume repeats steps.
        self.run.define_metric("*", step_metric="step")
        for metric, goal in (("eval/accuracy", "max"), ("eval/loss", "min")):
            self.run.define_metric(metric, step_metric="step", summary=goal)
        # Logs nothing. The first call of `log` imports modules; made here, it does not slow the first training steps.
        self.run.log({}, commit=False)

    def _save_code(self) -> None:
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
        if self._alive:
            self._guard("finish", lambda: self.run.finish(exit_code=exit_code))
        elif getattr(self, "run", None):
            # The failure has been reported. An open W&B run would receive the next training of this process.
            with suppress(Exception), self._writable_folders():
                self.run.finish(exit_code=exit_code)

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
