"""The first signal requests a stop; a second signal ends the process."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from mnist_dist.distributed.signals import PREEMPTED, Interrupts
from tests.processes import ROOT


def test_a_second_signal_ends_at_once_but_an_echo_of_the_first_does_not(accelerator, monkeypatch):
    ended, now = [], [100.0]
    monkeypatch.setattr("os._exit", ended.append)
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with Interrupts(accelerator) as interrupts:
        assert not interrupts.stop_requested()
        for seconds, number in ((0, signal.SIGINT), (0.5, signal.SIGTERM), (0.5, signal.SIGHUP), (9, signal.SIGUSR1)):
            now[0] += seconds  # Ctrl-C, the launcher forwards it, the terminal closes, the launcher dies of it
            signal.raise_signal(number)
        assert interrupts.stop_requested() and not ended
        signal.raise_signal(signal.SIGTERM)
    assert ended == [128 + signal.SIGTERM]


SLEEPER = """
import os, sys
from mnist_dist.distributed.signals import exit_on_signals
exit_on_signals()
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(("nohup", "code"), [(False, PREEMPTED), (True, 0)])
def test_a_closed_terminal_requests_a_stop_unless_nohup_ignores_it(nohup, code):
    # Set in both cases: the tests themselves may run under `nohup`.
    begin = f"import signal; signal.signal(signal.SIGHUP, signal.{'SIG_IGN' if nohup else 'SIG_DFL'})"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", begin + SLEEPER], cwd=ROOT, text=True, **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGHUP)
        process.communicate("", timeout=60)
    assert process.returncode == code


@pytest.mark.parametrize("nohup", [False, True])
def test_a_hangup_stops_a_training_unless_nohup_ignores_it(accelerator, nohup):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
    try:
        with Interrupts(accelerator) as interrupts:
            signal.raise_signal(signal.SIGHUP)
            assert interrupts.stop_requested() is not nohup
    finally:
        signal.signal(signal.SIGHUP, before)
