"""Weights & Biases through Accelerate's tracker, so guarded that it can neither prompt, nor stall, nor end a run."""

from __future__ import annotations

import netrc
import os
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from accelerate.tracking import WandBTracker

INIT_SECONDS = 30
"""How long an online run may take to reach the server before the run goes offline."""


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


def _has_credentials() -> bool:
    """Looks where wandb looks, without importing it or asking anybody."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    candidates: list[Any] = [os.environ.get("NETRC"), Path.home() / ".netrc", Path.home() / "_netrc"]
    for path in filter(None, candidates):
        try:
            if netrc.netrc(path).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


class WandbTracker(WandBTracker):
    """One W&B run. Whatever it raises is said once and the training goes on; metrics.jsonl holds everything anyway."""

    def __init__(self, project: str, *, mode: str, directory: Path, say: Any, **init: Any):
        from wandb import Settings

        settings = Settings(init_timeout=INIT_SECONDS, finish_timeout=60, silent=True, console="off")
        super().__init__(project, mode=mode, dir=str(directory), settings=settings, **init)
        self._say, self._alive = say, False
        self.log_seconds = 0.0
        """What all calls of `log` took of the training's time."""

    def start(self) -> None:
        try:
            super().start()
        except Exception as error:
            self._say(f"wandb could not start online ({_first_line(error)}); this run is logged offline")
            self.init_kwargs["mode"] = "offline"
            self._guard("start offline", super().start)
        self._alive = getattr(self, "run", None) is not None
        if self._alive:
            # The step is a metric of its own: wandb refuses to go back in its built-in step after a resume.
            self._guard("define metrics", self.run.define_metric, "*", step_metric="step")
            for metric, goal in (("eval/accuracy", "max"), ("eval/loss", "min")):
                self._guard("define metrics", self.run.define_metric, metric, step_metric="step", summary=goal)

    @property
    def run_id(self) -> str | None:
        """With which a resumed run continues this one."""
        return self.run.id if self._alive else None

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        if self._alive:
            self._guard("store the recipe", super().store_init_configuration, values)

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        if self._alive:
            started = time.perf_counter()
            self._guard("log", self.run.log, values)
            self.log_seconds += time.perf_counter() - started

    def summarize(self, values: dict[str, Any]) -> None:
        """Best and last values, shown in W&B's table of runs."""
        if self._alive:
            self._guard("write the summary", self.run.summary.update, values)

    def finish(self) -> None:
        if self._alive:
            self._guard("finish", super().finish)

    def _guard(self, what: str, call: Any, *arguments: Any, **keywords: Any) -> None:
        try:
            call(*arguments, **keywords)
        except Exception as error:  # wandb raises anything from its own errors to broken pipes
            self._alive = False
            self._say(f"wandb could not {what} ({_first_line(error)}); training goes on without it")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
