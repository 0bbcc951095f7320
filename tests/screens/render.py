"""Runs the command of a screen in this process and returns what it prints."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from unittest import mock
from urllib.error import URLError

from mnist_dist.__main__ import main
from mnist_dist.cli import run_command
from tests.screens.screens import FILES, SCREENS

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
VARIABLES = {"COLUMNS": "120", "NO_COLOR": "1", "WANDB_MODE": "disabled", "ACCELERATE_USE_CPU": "true"}
REMOVED = ("ACCELERATE_MIXED_PRECISION", "MNIST_DIST_DATA", "RANK", "WORLD_SIZE", "LOCAL_RANK", "FORCE_COLOR")


def render(name: str) -> str:
    """Returns a screen: the command, what it prints on stdout and stderr, and its exit code unless it is 0."""
    words = shlex.split(SCREENS[name])
    with _folder() as folder, io.StringIO() as output:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            try:
                code = run_command(lambda: main(words))
            except SystemExit as end:  # argparse's --help
                code = int(end.code or 0)
        text = output.getvalue()
    lines = [f"$ mnist-dist {SCREENS[name]}".rstrip(), *_normalize(text, folder).rstrip("\n").split("\n")]
    return "\n".join([*lines, *([f"exit code: {code}"] if code else [])]) + "\n"


def path_of(name: str) -> Path:
    """Returns the file of a screen."""
    return FOLDER / f"{name}.txt"


def _normalize(text: str, folder: Path) -> str:
    """Replaces what differs between machines: folders, mirrors of a download, and spaces at the end of a line."""
    text = text.replace(str(folder), "/folder").replace(f"{ROOT}/", "")
    text = re.sub(r"(?: *Tried \S+ got:\n *<[^>]*>\n)+", "      Tried …\n", text)
    return "\n".join(line.rstrip() for line in text.split("\n"))


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """Enters a new folder with `FILES`, without a network and without variables of the environment that matter."""
    from accelerate.state import AcceleratorState

    def unreachable(*args: object, **keywords: object) -> None:
        raise URLError("Name or service not known")

    before = Path.cwd()
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name).resolve()
        for path, content in FILES.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(content, encoding="utf-8")
        stack.enter_context(mock.patch.dict(os.environ, VARIABLES))
        for variable in REMOVED:
            os.environ.pop(variable, None)
        stack.enter_context(mock.patch.object(urllib.request, "urlopen", unreachable))
        stack.enter_context(mock.patch.object(sys, "path", [*sys.path]))  # a user's own model adds the folder
        stack.enter_context(mock.patch.object(sys, "dont_write_bytecode", True))
        stack.callback(os.chdir, before)
        stack.callback(sys.modules.pop, "my_nets", None)
        AcceleratorState._reset_state(reset_partial_state=True)
        stack.callback(AcceleratorState._reset_state, reset_partial_state=True)
        os.chdir(folder)
        yield folder
