"""Errors that a user can act on, hints for unknown words, output streams that never fail, exit codes. No torch."""

from __future__ import annotations

import difflib
import errno
import functools
import os
import re
import sys
import textwrap
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal[
    "unknown",  # a key or a name that does not exist
    "missing",  # a required key, file, folder or package is absent
    "type",  # a value of the wrong type
    "range",  # a value outside its range
    "syntax",  # text that cannot be parsed
    "conflict",  # two settings, or a setting and the data, exclude each other
    "unsupported",  # this device, launcher or number of processes cannot do it
    "damaged",  # a file whose content is broken or of another format
    "unwritable",  # a path that cannot be written
    "exists",  # a run that would be overwritten
    "world",  # another number of processes than expected
    "model",  # a network that cannot be built, run or trained
    "usage",  # command-line arguments that do not fit together
    "code",  # a file names Python code that the user has not allowed
]


CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that control a terminal or the direction of text, or that no encoding can write."""


@dataclass(frozen=True)
class Problem:
    """One problem that the user can solve: where it is, which key or option it concerns, and what to do."""

    where: str
    """File and line, "command line", "the launcher", or a path."""
    key: str
    """Dotted recipe key, command-line option or path concerned; empty if there is none."""
    message: str
    """What is wrong, what was expected, what to do; may have several lines."""
    kind: Kind
    """Kind of problem, for programs and tests, which do not parse the message."""

    def __str__(self) -> str:
        head = f"{self.where}: {self.key}" if self.key else self.where
        return f"  {head}\n{textwrap.indent(self.message, ' ' * 6)}"


class RecipeError(ValueError):
    """Raised before anything is trained or written, with all problems. The user sees its text; exit code 2."""

    def __init__(self, problems: list[Problem]):
        self.problems = problems
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n".join([f"{count}; nothing was done:", *map(str, problems)]))


class RunError(Exception):
    """Raised when a run that has started cannot continue. The message is for the user; exit code 1."""


class MeasurementStopped(RunError):
    """Raised on every rank when a signal stopped a command that measures."""

    def __init__(self) -> None:
        super().__init__("stopped by a signal during the measurement; there is no result")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns "; did you mean 'x'?" with up to two similar known words, or an empty string."""
    spelled = {each.lower(): each for each in known}
    similar = difflib.get_close_matches(word.lower(), spelled, n=2)
    return f"; did you mean {' or '.join(repr(spelled[each]) for each in similar)}?" if similar else ""


def unknown_key(key: str, known: Iterable[str]) -> str:
    """Returns the message for a key that is not among the known ones."""
    return "unknown key" + (did_you_mean(key, known) or "; known: " + ", ".join(known))


OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|_STATUS_ALLOC_FAILED", re.IGNORECASE)
"""How the allocators of PyTorch's devices, and NVIDIA's libraries, say that their memory is full. Accelerate's list
also holds an error of cuDNN with other causes, and lacks the error of the CUDA driver."""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Returns whether an error says that the memory of the host or of a device is full."""
    if isinstance(error, RuntimeError):
        return OUT_OF_MEMORY.search(str(error)) is not None
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's text, or the error's class if it has no text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# --- output -------------------------------------------------------------------------------------------------------


class SafeStream:
    """A text stream that raises no error if `head` has closed the pipe, the disk is full or a character is unknown.

    After the first error of the file, the rest of the output is dropped. A character that the encoding lacks becomes a
    question mark.
    """

    def __init__(self, stream: Any):
        self.stream: Any = stream.stream if isinstance(stream, SafeStream) else stream
        self.full: OSError | None = None
        """The error of a full disk, after which output is missing in the file."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            try:
                self.stream.write(text)
            except UnicodeEncodeError:
                encoding = self.stream.encoding or "ascii"
                self.stream.write(text.encode(encoding, "replace").decode(encoding))
        except (OSError, ValueError) as error:  # ValueError: the file is closed
            self._drop(error)
        return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except (OSError, ValueError) as error:
            self._drop(error)

    def _drop(self, error: Exception) -> None:
        """Redirects the file to the null device. Buffered text goes there too, so Python's flush at exit succeeds."""
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            self.full = error
        with suppress(OSError, ValueError):
            nothing = os.open(os.devnull, os.O_WRONLY)
            try:
                os.dup2(nothing, self.stream.fileno())
                self.stream.flush()
            finally:
                os.close(nothing)


def safe_output(command: Callable[..., int]) -> Callable[..., int]:
    """Decorates a command: its stdout and stderr are safe streams.

    A full disk that took no output of the command makes exit code 0 a 1, with the reason on stderr. The console of a
    training does not count: the run folder is complete without it.
    """

    @functools.wraps(command)
    def run(*arguments: Any) -> int:
        before = sys.stdout, sys.stderr
        streams = [stream and SafeStream(stream) for stream in before]
        sys.stdout, sys.stderr = streams
        try:
            code = command(*arguments)
        finally:
            for stream in filter(None, streams):
                stream.flush()
            sys.stdout, sys.stderr = before
        if code == 0 and streams[0] and streams[0].full:
            message = f"mnist_dist: the output could not be written: {streams[0].full.strerror}"
            print(message, file=streams[1])
            return 1
        return code

    return run


# --- how a command ends -------------------------------------------------------------------------------------------

FAILED, BAD_INPUT = 1, 2
RANK_0_SECONDS = 30.0
"""The other ranks wait this long before they print an error: rank 0 prints first, and the launcher ends the others."""


LESS_MEMORY = "try a smaller batch_size, micro_batch_size, eval_batch_size, data.image_size or data.limit_train"
"""What helps every command whose memory is full."""


@safe_output
def run_command(main: Callable[[], int]) -> int:
    """Runs a command's `main`. Prints an error that the user can act on as one screen on stderr.

    Rank 0 prints first. The other ranks wait `RANK_0_SECONDS`, so that the launcher ends them before they print.

    Returns:
        What `main` returns; 2 for a `RecipeError`, 1 for a `RunError` and where the memory is full, 130 after Ctrl-C.
    """
    try:
        return main()
    except RecipeError as error:
        return _print_error(error, BAD_INPUT)
    except RunError as error:
        return _print_error(error, FAILED)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return _print_error(RunError(f"the memory is full: {first_line(error)}\n  {LESS_MEMORY}"), FAILED)
    except KeyboardInterrupt:
        if is_main_process():
            print("mnist_dist: interrupted", file=sys.stderr)
        return 130


def _print_error(error: Exception, code: int) -> int:
    if not is_main_process():
        if isinstance(error, MeasurementStopped):
            return code  # after a signal the launcher waits until every process has ended
        # With --max-restarts torchrun waits for this process before it starts all processes again.
        time.sleep(1 if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0" else RANK_0_SECONDS)
    print(f"mnist_dist: {error}", file=sys.stderr)
    return code


def is_main_process() -> bool:
    """Returns whether this is rank 0 according to the launcher's environment, before a process group exists."""
    names = ("RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
    return next((os.environ[name] for name in names if name in os.environ), "0") == "0"
