"""metrics.jsonl: a tracker that writes one JSON object per line, and a reader that follows the file."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker


class JSONLTracker(GeneralTracker):
    """Writes metrics.jsonl, which is complete even if other trackers fail.

    Args:
        path: the file.
        keep_bytes: number of bytes that a resumed run keeps; it writes the later lines again. Of a file that has become
            shorter, all complete lines are kept.
    """

    name = "jsonl"
    requires_logging_directory = False

    def __init__(self, path: Path, keep_bytes: int = 0):
        super().__init__()
        self.path = path
        path.touch()
        # A copy: a process that was frozen and has lost the run may still write a line, into the old file.
        copy = path.with_name(f"{path.name}.tmp")
        shutil.copyfile(path, copy)
        with copy.open("rb+") as file:
            file.truncate(file.read(keep_bytes).rfind(b"\n") + 1)
        copy.replace(path)
        self._file = path.open("a", encoding="utf-8")

    @property
    def tracker(self) -> Path:
        return self.path

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Appends one line. The line is in the file when the call returns."""
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def bytes_written(self) -> int:
        """Returns the length of the file."""
        return self._file.tell()

    def flush_to_disk(self) -> None:
        """Waits until the lines so far are on the disk. Another thread may call this."""
        os.fsync(self._file.fileno())

    def finish(self) -> None:
        self._file.close()


class JSONLReader:
    """Follows a file that a tracker may still be writing. Each `read` parses only the lines that are new."""

    def __init__(self, path: Path):
        self.path = path
        self.lines: list[dict[str, Any]] = []
        self._end, self._last = 0, b""

    def read(self) -> list[dict[str, Any]]:
        """Returns the objects of all complete lines so far; ignores a missing file and lines without an object."""
        if not self.path.is_file():  # reading a pipe would never end
            return self.lines
        with suppress(OSError), self.path.open("rb") as file:
            file.seek(self._end - len(self._last))
            text = file.read()
            if not text.startswith(self._last):  # a resumed run has truncated the file and written new lines
                file.seek(0)
                text, self.lines, self._end, self._last = file.read(), [], 0, b""
            new = text[len(self._last) : text.rfind(b"\n") + 1].splitlines(keepends=True)
            for line in new:
                with suppress(ValueError, RecursionError):
                    values = json.loads(line)
                    self.lines += [values] if isinstance(values, dict) else []
            self._end, self._last = self._end + sum(map(len, new)), new[-1] if new else self._last
        return self.lines
