"""metrics.jsonl: one object a line, always written, whatever becomes of the other trackers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker


class JSONLTracker(GeneralTracker):
    name = "jsonl"
    requires_logging_directory = False

    def __init__(self, path: Path):
        super().__init__()
        self.path = path
        self._file = path.open("a", encoding="utf-8")

    @property
    def tracker(self) -> Path:
        return self.path

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Appends one line; it is in the file when the call returns."""
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def finish(self) -> None:
        self._file.close()
