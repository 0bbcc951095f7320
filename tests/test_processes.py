"""The server that is forked for the processes of the tests."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import psutil

from tests import processes


def wait_until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_server_survives_clients_that_die_while_they_ask():
    for part in (b"", b'{"argv": ['):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(processes._address())
            client.sendall(part)
    assert processes.run([sys.executable, "-c", "print(7)"]).stdout == "7\n"


def test_exit_codes_and_signals_of_several_processes_reach_their_clients():
    codes = {code: processes.popen([sys.executable, "-c", f"raise SystemExit({code})"]) for code in range(8)}
    sleeping = processes.popen([sys.executable, "-c", "import time; time.sleep(600)"])
    assert {code: process.wait(timeout=60) for code, process in codes.items()} == {code: code for code in range(8)}
    assert sleeping.poll() is None
    sleeping.kill()
    assert sleeping.wait(timeout=60) == -signal.SIGKILL


def test_a_child_dies_with_the_program_that_stands_for_it(tmp_path):
    program = "import os, pathlib, time; pathlib.Path('pid').write_text(str(os.getpid())); time.sleep(600)"
    pid = tmp_path / "pid"
    with subprocess.Popen([processes.forked_python(), "-c", program], cwd=tmp_path) as stand_in:
        wait_until(lambda: pid.exists() and pid.read_text())
        stand_in.kill()
    wait_until(lambda: not psutil.pid_exists(int(pid.read_text())))
