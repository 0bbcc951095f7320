"""Three machines inside one: network namespaces with host names of their own, which a bridge joins.

A machine can be killed, frozen, or cut from the network. All of them see the same files, as on a shared file system.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

PROGRAMS = ("ip", "nsenter", "unshare", "mount", "hostname")
MACHINES = {"a0": "10.78.0.10", "a1": "10.78.0.11", "a2": "10.78.0.12"}
"""Host name -> address. torchrun gives rank 0 to the machine with the first name."""

BRIDGE = "mdelastic"


def missing() -> str:
    """Returns why the machines cannot be made here, or an empty string."""
    if os.name != "posix" or os.geteuid() != 0:
        return "machines in network namespaces need root"
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (apt-get install iproute2 util-linux)"
    with tempfile.TemporaryDirectory() as folder:
        steps = {
            "network namespaces": "ip netns add mdprobe",
            "bridges": "ip link add mdprobe type bridge",
            "pairs of network devices": "ip link add mdprobe0 type veth peer name eth0 netns mdprobe",
            "host names of processes": "nsenter --net=/run/netns/mdprobe unshare --uts hostname probe",
            "mounts of processes": f"unshare --mount mount --bind {folder} {folder}",
        }
        try:
            for what, command in steps.items():
                done = subprocess.run(command.split(), capture_output=True, text=True)
                if done.returncode:
                    return f"this machine refuses {what}: {command}: {done.stderr.strip()}"
        finally:
            for kind in ("netns", "link"):
                subprocess.run(["ip", kind, "del", "mdprobe"], capture_output=True)
    return ""


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
        names = {"localhost": "127.0.0.1", **MACHINES}
        (self.root / "hosts").write_text("".join(f"{address} {name}\n" for name, address in names.items()))
        _ip("link", "add", BRIDGE, "type", "bridge")
        _ip("link", "set", BRIDGE, "up")
        for name, address in MACHINES.items():
            _ip("netns", "add", name)
            _ip("link", "add", f"md-{name}", "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("link", "set", f"md-{name}", "up")
            self.connect(name)
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", name, "link", "set", device, "up")
        return self

    def __exit__(self, *error: object) -> None:
        self._clear()

    def _clear(self) -> None:
        for name in MACHINES:
            if Path(f"/run/netns/{name}").exists():
                self.kill(name)
                _ip("netns", "del", name)
        for process in self._started:
            process.wait()
        for device in (BRIDGE, *(f"md-{name}" for name in MACHINES)):  # a dead namespace gives them up with a delay
            subprocess.run(["ip", "link", "del", device], capture_output=True)

    def start(self, name: str, command: list[str | Path], log: Path, **variables: str) -> subprocess.Popen[bytes]:
        """Starts a command on a machine; appends its output to a file."""
        # `ip netns exec` would remount /sys and hide the control groups.
        script = f'mount --bind {self.root}/hosts /etc/hosts && hostname {name} && exec "$@"'
        enter = ["nsenter", f"--net=/run/netns/{name}", "unshare", "--uts", "--mount", "sh", "-c", script, "-"]
        with log.open("ab") as output:
            process = subprocess.Popen(
                [*enter, *map(str, command)],
                env=os.environ | variables,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def pids(self, name: str) -> list[int]:
        """Returns the processes of a machine."""
        return [int(pid) for pid in _ip("netns", "pids", name).split()]

    def signal(self, name: str, number: signal.Signals) -> None:
        """Sends a signal to every process of a machine."""
        for _ in range(3):  # a process may start another while the list is read
            for pid in self.pids(name):
                with suppress(ProcessLookupError):
                    os.kill(pid, number)

    def kill(self, name: str) -> None:
        """Kills every process of a machine, as a power failure would."""
        self.signal(name, signal.SIGCONT)
        self.signal(name, signal.SIGKILL)

    def trainers(self, name: str) -> list[int]:
        """Returns the training processes of a machine, without the launcher."""
        lines = {pid: _command_line(pid) for pid in self.pids(name)}
        return [pid for pid, line in lines.items() if "-m mnist_dist.train" in line and "launch.py" not in line]

    def connect(self, name: str) -> None:
        """Connects a machine to the network."""
        _ip("link", "set", f"md-{name}", "master", BRIDGE)

    def cut(self, name: str) -> None:
        """Takes a machine off the network. Nobody is told: packets are lost, and connections stay open."""
        _ip("link", "set", f"md-{name}", "nomaster")


def _command_line(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, done.args, done.stdout, done.stderr)
    return done.stdout
