"""metrics.jsonl: one object a line, always written, whatever becomes of the other trackers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker


class JSONLTracker(GeneralTracker):
    name = "jsonl"
    requires_logging_directory = False

    def __init__(self, path: Path, keep_bytes: int = 0):
        """Continues a file after its first `keep_bytes` bytes; what a killed run wrote beyond them is written again.

        Of a file that has become shorter the whole lines stay.
        """
        super().__init__()
        self.path = path
        path.touch()
        with path.open("rb+") as file:
            file.truncate(file.read(keep_bytes).rfind(b"\n") + 1)
        self._file = path.open("a", encoding="utf-8")

    @property
    def tracker(self) -> Path:
        return self.path

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Appends one line; it is in the file when the call returns."""
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def bytes_written(self) -> int:
        """The file's length, all of it on the disk."""
        os.fsync(self._file.fileno())
        return self._file.tell()

    def finish(self) -> None:
        self._file.close()
