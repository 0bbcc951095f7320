"""Reads a lesson of launch/lessons, runs its commands, and compares what they print with the page.

A page has commands in ```bash blocks. If a command prints something, a ```text block follows with its output. All
blocks of a page run one after another in one shell, in an empty folder with a link to `launch`.

Three rules make outputs comparable:

- Durations, speeds, sizes in memory, dates, process ids, ports, processors, host names and folders are replaced by `…`.
- Whole numbers and words must be equal. Other numbers may differ by 2 %, by one in the last digit, or by 5e-5.
- After the line `<!-- numbers vary -->`, the page shows the numbers of the next block, and they are not compared.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from tests import processes

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "launch" / "lessons"
PAGES = sorted(FOLDER.glob("[0-9][0-9]_*.md"))
TORCHRUN = [sys.executable, "-E", "-S", str(Path(__file__).with_name("torchrun.py"))]
REAL = "<!-- starts the real launchers -->"
VARY = "<!-- numbers vary -->"
VARIABLES = {
    "ACCELERATE_USE_CPU": "true",
    "COLUMNS": "120",
    "NO_COLOR": "1",
    "OMP_NUM_THREADS": "1",
    "WANDB_MODE": "disabled",
}
PORTS = ("29400", "29500")
"""Ports in commands; the tests replace them by free ones."""
SECONDS = 600
"""Longest time of a lesson."""

BLOCK = re.compile(
    rf"(?P<vary>{VARY}\n\n?)?```bash\n(?P<commands>.*?)^```\n(?:\n?```text\n(?P<output>.*?)^```\n)?",
    flags=re.DOTALL | re.MULTILINE,
)
NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?(?!\w)")
MASKS = {
    r"\b\d[\d,.]* (s|ms|min|MB|GB|MB/s|GB/s|images/s)(?!\w)": r"… \1",
    r"\b\d{4}-\d\d-\d\d(?:[ T_]\d\d[:-]\d\d(?:[:-]\d\d)?(?:\.\d+)?)?\b": "…",
    r"\b\d\d:\d\d:\d\d\b": "…",
    r"\b(pid|process) \d{3,}\b": r"\1 …",
    r"(127\.0\.0\.1|localhost):\d+": r"\1:…",
    r"\bcpu \([^)]*\)": "cpu (…)",
}


def run(page: Path, *, real: bool) -> list[str]:
    """Runs all blocks of a page; returns the masked output of each.

    Args:
        real: start `torchrun` and `python` as a reader would. `mnist-dist` and the processes of torchrun are forked by
            the server of the tests; otherwise all programs are, and a stand-in takes the place of torchrun.

    Raises:
        AssertionError: a block ended with an exit code other than 0. Print an expected one: `…; echo "exit code $?"`.
        subprocess.TimeoutExpired: after `SECONDS`; all processes of the lesson have been killed.
    """
    blocks = [block["commands"] for block in BLOCK.finditer(page.read_text(encoding="utf-8"))]
    script = "".join(f'{commands}echo "--- exit code $?"\n' for commands in blocks)
    for port in PORTS:
        script = script.replace(port, str(processes.free_port()))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        (folder / "launch").symlink_to(ROOT / "launch")
        text = _run_shell(script, folder, _environment(folder, real))
        *parts, rest = re.split(r"^--- exit code (\d+)\n", text, flags=re.MULTILINE)
        assert not rest and len(parts) == 2 * len(blocks) and set(parts[1::2]) <= {"0"}, text
        return [masked(output, folder) for output in parts[::2]]


def _environment(folder: Path, real: bool) -> dict[str, str]:
    """Returns the environment of a lesson; writes the forked programs into a folder that comes first in PATH."""
    removed = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "FORCE_COLOR", "ACCELERATE_MIXED_PRECISION")
    programs = folder / ".programs"
    programs.mkdir()
    python = str(processes.forked_python())
    kept = {name: value for name, value in os.environ.items() if name not in removed}
    words = {"mnist-dist": [python, "-m", "mnist_dist"]} | ({} if real else {"python": [python], "torchrun": TORCHRUN})
    for name, command in words.items():
        (programs / name).write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n', encoding="utf-8")
        (programs / name).chmod(0o755)
    path = [str(programs), str(Path(sys.executable).parent), os.environ["PATH"]]
    variables = VARIABLES | {"PYTHONPATH": str(ROOT)}
    variables["PYTHON_EXEC"] = python  # torchrun starts its processes with it
    return kept | variables | {"PATH": os.pathsep.join(path)}


def _run_shell(script: str, folder: Path, environment: dict[str, str]) -> str:
    shell = subprocess.Popen(
        ["bash", "-c", script],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        return shell.communicate(timeout=SECONDS)[0]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)  # also what a lesson left in the background
        shell.wait()


def masked(output: str, folder: Path) -> str:
    """Replaces what differs between machines and runs, and removes spaces at the ends of lines."""
    for name in (f"{folder}/", f"{ROOT}/"):
        output = output.replace(name, "")
    for pattern, replacement in MASKS.items():
        output = re.sub(pattern, replacement, output)
    output = re.sub(rf"\b{re.escape(socket.gethostname())}\b", "…", output)
    return "".join(line.rstrip() + "\n" for line in output.splitlines())


def is_equal(shown: str, printed: str, *, numbers_vary: bool = False) -> bool:
    """Returns whether two outputs are equal: words and whole numbers exactly, other numbers up to rounding."""
    if [each.split() for each in NUMBER.split(shown)] != [each.split() for each in NUMBER.split(printed)]:
        return False
    pairs = zip(NUMBER.findall(shown), NUMBER.findall(printed), strict=True)
    return numbers_vary or all(_is_close(*pair) for pair in pairs)


def _is_close(shown: str, printed: str) -> bool:
    if not re.search(r"[.e]", shown):
        return shown == printed
    digits, _, exponent = shown.replace(",", "").partition("e")
    last_digit = 10.0 ** (int(exponent or 0) - len(digits.partition(".")[2]))
    values = (float(each.replace(",", "")) for each in (shown, printed))
    return math.isclose(*values, rel_tol=0.02, abs_tol=max(1.01 * last_digit, 5e-5))


def differences(text: str, outputs: list[str]) -> list[tuple[str, str]]:
    """Returns (shown, printed) of each block of a page whose output has changed."""
    found = []
    for block, printed in zip(BLOCK.finditer(text), outputs, strict=True):
        shown = block["output"] or ""
        if not is_equal(shown, printed, numbers_vary=bool(block["vary"])):
            found.append((shown, printed))
    return found


def rewrite(text: str, outputs: list[str], *, keep: bool = True) -> str:
    """Returns a page with new outputs.

    Args:
        keep: keep an output that is equal by the rules above, so that a diff is short.
    """
    remaining = iter(outputs)

    def block(match: re.Match[str]) -> str:
        printed, shown = next(remaining), match["output"] or ""
        if keep and is_equal(shown, printed, numbers_vary=bool(match["vary"])):
            return match[0]
        head = f"{match['vary'] or ''}```bash\n{match['commands']}```\n"
        return f"{head}\n```text\n{printed}```\n" if printed else head

    return BLOCK.sub(block, text)
