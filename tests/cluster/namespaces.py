"""Makes machines inside this one: network namespaces with host names, joined by a bridge. Needs root."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

PROGRAMS = ("ip", "nsenter", "unshare", "mount", "hostname")


def missing(programs: Iterable[str], packages: str, more: Mapping[str, str] | None = None) -> str:
    """Returns why no such machines can be made here, or an empty string.

    Args:
        programs: needed besides `PROGRAMS`.
        packages: names of the Debian packages with all programs.
        more: further things that must be possible -> the command that tries each; `{folder}` is a temporary folder.
    """
    if os.name != "posix" or os.geteuid() != 0:
        return "machines in network namespaces need root"
    absent = [name for name in (*programs, *PROGRAMS) if shutil.which(name) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (apt-get install {packages})"
    probe = f"md{os.getpid()}"  # two test files may try at the same time
    steps = {
        "network namespaces": f"ip netns add {probe}",
        "bridges": f"ip link add {probe} type bridge",
        "pairs of network devices": f"ip link add {probe}p type veth peer name eth0 netns {probe}",
        "host names of processes": f"nsenter --net=/run/netns/{probe} unshare --uts hostname probe",
        "mounts of processes": "unshare --mount mount --bind {folder} {folder}",
        **(more or {}),
    }
    with tempfile.TemporaryDirectory() as folder:
        try:
            for what, step in steps.items():
                command = step.format(folder=folder)
                done = subprocess.run(command.split(), capture_output=True, text=True)
                if done.returncode:
                    return f"this machine refuses {what}: {command}: {done.stderr.strip()}"
        finally:
            for kind in ("netns", "link"):
                subprocess.run(["ip", kind, "del", probe], capture_output=True)
    return ""


def run(*command: str | Path, env: Mapping[str, str] | None = None) -> str:
    """Runs a command and returns its output.

    Raises:
        CalledProcessError: it failed.
    """
    done = subprocess.run([str(word) for word in command], env=env, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, done.args, done.stdout, done.stderr)
    return done.stdout


def write_hosts(root: Path, machines: Mapping[str, str]) -> None:
    """Writes the table of hosts that `command_on` shows to a command."""
    names = {"localhost": "127.0.0.1", **machines}
    (root / "hosts").write_text("".join(f"{address} {name}\n" for name, address in names.items()))


def command_on(root: Path, name: str, enter: Iterable[str], *command: str | Path) -> list[str]:
    """Returns a command that runs another one under the host name of a machine, with the hosts of `write_hosts`.

    Args:
        enter: the words that enter the namespaces of the machine.
    """
    script = f'mount --bind {root}/hosts /etc/hosts && hostname {name} && exec "$@"'
    return [*enter, "sh", "-c", script, "-", *map(str, command)]


def entering(name: str) -> list[str]:
    """Returns the words that enter a machine. `ip netns exec` would remount /sys and hide the control groups."""
    return ["nsenter", f"--net=/run/netns/{name}", "unshare", "--uts", "--mount"]


def connect(bridge: str, machines: Mapping[str, str]) -> None:
    """Creates a bridge and the machines at it: host name -> address."""
    run("ip", "link", "add", bridge, "type", "bridge")
    run("ip", "link", "set", bridge, "up")
    for name, address in machines.items():
        run("ip", "netns", "add", name)
        run("ip", "link", "add", f"md-{name}", "type", "veth", "peer", "name", "eth0", "netns", name)
        run("ip", "link", "set", f"md-{name}", "master", bridge, "up")
        run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            run("ip", "-n", name, "link", "set", device, "up")


def remove(bridge: str, machines: Collection[str]) -> None:
    """Kills all processes of the machines and removes these and their bridge."""
    for name in machines:
        if Path(f"/run/netns/{name}").exists():
            kill(name)
            run("ip", "netns", "del", name)
    for device in (
        bridge,
        *(f"md-{name}" for name in machines),
    ):  # the kernel frees them late
        subprocess.run(["ip", "link", "del", device], capture_output=True)


def processes_of(name: str) -> dict[int, str]:
    """Returns the processes of a machine: process id -> command line; empty if the process has just ended."""
    found = {}
    for pid in map(int, run("ip", "netns", "pids", name).split()):
        found[pid] = ""
        with suppress(OSError):
            line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
            found[pid] = line.decode(errors="replace").strip()
    return found


def send(name: str, number: signal.Signals) -> None:
    """Sends a signal to every process of a machine."""
    for _ in range(3):  # a process may start another while the list is read
        for pid in processes_of(name):
            with suppress(ProcessLookupError):
                os.kill(pid, number)


def kill(name: str) -> None:
    """Kills every process of a machine with SIGKILL, as a power failure would."""
    send(name, signal.SIGKILL)
