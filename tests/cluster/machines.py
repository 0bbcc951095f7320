"""Makes three machines inside this one: network namespaces with host names of their own, joined by a bridge.

A machine can be killed, frozen, or cut from the network. All of them see the same files, as on a shared file system.
"""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

from tests.cluster import namespaces

MACHINES = {"a0": "10.78.0.10", "a1": "10.78.0.11", "a2": "10.78.0.12"}
"""Host name -> address. torchrun gives rank 0 to the machine with the first name."""

BRIDGE = "mdelastic"


def missing() -> str:
    """Returns why the machines cannot be made here, or an empty string."""
    return namespaces.missing((), "iproute2 util-linux")


class Machines:
    """A context manager: all processes are killed and everything is removed at the end.

    Args:
        root: a folder for the table of hosts and the output of the processes.
    """

    def __init__(self, root: Path):
        self.root = root
        self._started: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Machines:
        self._clear()
        namespaces.write_hosts(self.root, MACHINES)
        namespaces.connect(BRIDGE, MACHINES)
        return self

    def __exit__(self, *error: object) -> None:
        self._clear()

    def _clear(self) -> None:
        namespaces.remove(BRIDGE, MACHINES)
        for process in self._started:
            process.wait()

    def start(self, name: str, command: list[str | Path], log: Path, **variables: str) -> subprocess.Popen[bytes]:
        """Starts a command on a machine; appends its output to a file."""
        with log.open("ab") as output:
            process = subprocess.Popen(
                namespaces.command_on(self.root, name, namespaces.entering(name), *command),
                env=os.environ | variables,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def signal(self, name: str, number: signal.Signals) -> None:
        """Sends a signal to every process of a machine."""
        namespaces.send(name, number)

    def kill(self, name: str) -> None:
        """Kills every process of a machine, as a power failure would."""
        namespaces.kill(name)

    def trainers(self, name: str) -> list[int]:
        """Returns the training processes of a machine, without the launcher."""
        lines = namespaces.processes_of(name).items()
        return [pid for pid, line in lines if "-m mnist_dist.train" in line and "launch.py" not in line]

    def connect(self, name: str) -> None:
        """Connects a machine to the network."""
        namespaces.run("ip", "link", "set", f"md-{name}", "master", BRIDGE)

    def cut(self, name: str) -> None:
        """Takes a machine off the network. No process notices it at once: packets are lost, connections stay open."""
        namespaces.run("ip", "link", "set", f"md-{name}", "nomaster")
