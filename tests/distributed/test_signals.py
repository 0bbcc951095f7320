"""The first signal requests a stop; a second signal ends the process."""

from __future__ import annotations

import signal

from mnist_dist.distributed.signals import Interrupts


def test_a_second_signal_ends_at_once_but_an_echo_of_the_first_does_not(accelerator, monkeypatch):
    ended, now = [], [100.0]
    monkeypatch.setattr("os._exit", ended.append)
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with Interrupts(accelerator) as interrupts:
        assert not interrupts.stop_requested()
        for seconds, number in ((0, signal.SIGINT), (0.5, signal.SIGTERM), (9, signal.SIGUSR1)):
            now[0] += seconds  # Ctrl-C, the launcher forwards it, the launcher dies of it
            signal.raise_signal(number)
        assert interrupts.stop_requested() and not ended
        signal.raise_signal(signal.SIGTERM)
    assert ended == [128 + signal.SIGTERM]
