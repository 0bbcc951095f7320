"""A real SLURM cluster of two nodes inside one machine, for tests.

Each node is a network namespace with its own host name and its own slurmd. A bridge joins the namespaces. slurmctld
runs in the machine's own network namespace under the host name `head`. Every node has one "GPU": a device file that
SLURM counts. Needs root, `ip`, and Debian's packages slurmctld, slurmd, slurm-client and munge.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "munged", "ip", "nsenter", "unshare", "mknod")
NODES = {"n0": "10.77.0.10", "n1": "10.77.0.11"}
HEAD = "10.77.0.1"
BRIDGE = "mdtest"
PID = Path("/run/mdtest-slurmctld.pid")
"""Not below the root: the next cluster ends the slurmctld of one that was killed."""

# `ip netns exec` would remount /sys and hide the cgroups from slurmd: nodes are entered with nsenter instead.
CONFIGURATION = """\
ClusterName=test
SlurmctldHost=head({head})
SlurmUser=root
AuthType=auth/munge
# A requeued job waits until its credential has expired: 5 s instead of 120.
AuthInfo=cred_expire=5
StateSaveLocation={root}/head
SlurmctldPidFile={pid}
SlurmctldLogFile={root}/head/log
SlurmdSpoolDir={root}/%n/spool
SlurmdPidFile={root}/%n/pid
SlurmdLogFile={root}/%n/log
JobCompType=jobcomp/filetxt
JobCompLoc={root}/completed
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MpiDefault=none
GresTypes=gpu
SlurmdTimeout=10
KillWait=20
# By default a requeued job waits up to half a minute for the next pass of the scheduler.
SchedulerParameters=sched_interval=2,bf_interval=1
SlurmdParameters=config_overrides
{nodes}
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Returns why no cluster can be started here, or an empty string."""
    if os.name != "posix" or os.geteuid() != 0:
        return "a SLURM cluster in network namespaces needs root"
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (apt-get install slurmctld slurmd slurm-client munge iproute2)"
    with tempfile.TemporaryDirectory() as folder:
        steps = {
            "network namespaces": "ip netns add mdprobe",
            "bridges": "ip link add mdprobe type bridge",
            "pairs of network devices": "ip link add mdprobe0 type veth peer name eth0 netns mdprobe",
            "host names of processes": "nsenter --net=/run/netns/mdprobe unshare --uts hostname probe",
            "mounts of processes": f"unshare --mount mount --bind {folder} {folder}",
            "device files": f"mknod {folder}/gpu c 1 3",
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


class Cluster:
    """Two nodes, n0 and n1, with one "GPU" each. A context manager: everything is stopped and removed at the end.

    Args:
        root: a new folder for the configuration, the logs and the state.
    """

    def __init__(self, root: Path):
        self.root = root

    def __enter__(self) -> Cluster:
        self._clear()
        for folder in ("head", *NODES):
            (self.root / folder).mkdir(parents=True)
        names = {"head": HEAD, **NODES}
        hosts = [f"{address} {name}" for name, address in {"localhost": "127.0.0.1", **names}.items()]
        (self.root / "hosts").write_text("\n".join(hosts) + "\n")
        gpu = self.root / "gpu"
        _run("mknod", gpu, "c", "1", "3")  # SLURM accepts device files only
        (self.root / "gres.conf").write_text(f"Name=gpu File={gpu}\n")
        nodes = [f"NodeName={name} NodeAddr={address} CPUs=2 Gres=gpu:1" for name, address in NODES.items()]
        text = CONFIGURATION.format(head=HEAD, root=self.root, pid=PID, nodes="\n".join(nodes))
        (self.root / "slurm.conf").write_text(text)
        self._connect()
        if subprocess.run(["pgrep", "munged"], capture_output=True).returncode:
            Path("/run/munge").mkdir(exist_ok=True)
            _run("chown", "munge", "/run/munge")
            _run("runuser", "-u", "munge", "--", "munged")
        self._start("head", ["unshare", "--uts", "--mount"], "slurmctld")
        for node in NODES:
            self.start_node(node)
        self.wait_for(lambda: self.run("sinfo", "-h", "-o", "%t %D").strip() == "idle 2", "two idle nodes")
        return self

    def __exit__(self, *error: object) -> None:
        self._clear()

    # --- nodes ----------------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        _run("ip", "link", "add", BRIDGE, "type", "bridge")
        _run("ip", "addr", "add", f"{HEAD}/24", "dev", BRIDGE)
        _run("ip", "link", "set", BRIDGE, "up")
        for node, address in NODES.items():
            _run("ip", "netns", "add", node)
            _run("ip", "link", "add", f"md-{node}", "type", "veth", "peer", "name", "eth0", "netns", node)
            _run("ip", "link", "set", f"md-{node}", "master", BRIDGE, "up")
            _run("ip", "-n", node, "addr", "add", f"{address}/24", "dev", "eth0")
            _run("ip", "-n", node, "link", "set", "eth0", "up")
            _run("ip", "-n", node, "link", "set", "lo", "up")

    def _start(self, name: str, enter: list[str], *daemon: str) -> None:
        """Starts a daemon with its own host name, which only this daemon and its children see."""
        script = f"mount --bind {self.root}/hosts /etc/hosts && hostname {name} && exec {' '.join(daemon)}"
        _run(*enter, "sh", "-c", script, env=self.environment())

    def start_node(self, node: str) -> None:
        """Starts a node's slurmd."""
        self._start(node, ["nsenter", f"--net=/run/netns/{node}", "unshare", "--uts", "--mount"], "slurmd", "-N", node)

    def kill_node(self, node: str) -> None:
        """Kills every process of a node with SIGKILL, slurmd included, as a power failure would."""
        for _ in range(3):  # a process may start another while the list is read
            for pid in _run("ip", "netns", "pids", node).split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)

    def processes(self) -> list[str]:
        """Returns the command lines of all processes on the nodes, without slurmd and its step managers."""
        found = []
        for node in NODES:
            for pid in _run("ip", "netns", "pids", node).split():
                with suppress(OSError):
                    line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    if line and not line.startswith(("slurmd", "slurmstepd")):
                        found.append(f"{node}: {line.strip()}")
        return found

    def _clear(self) -> None:
        for node in NODES:
            if Path(f"/run/netns/{node}").exists():
                self.kill_node(node)
                _run("ip", "netns", "del", node)
        with suppress(OSError, ValueError):
            pid = int(PID.read_text())
            if Path(f"/proc/{pid}/comm").read_text() == "slurmctld\n":
                os.kill(pid, signal.SIGKILL)
            PID.unlink()
        for device in (BRIDGE, *(f"md-{node}" for node in NODES)):  # a dead namespace gives its devices up with a delay
            subprocess.run(["ip", "link", "del", device], capture_output=True)

    # --- jobs -----------------------------------------------------------------------------------------------------

    def environment(self, **variables: str) -> dict[str, str]:
        """Returns the environment of SLURM's commands and of the jobs."""
        return os.environ | {"SLURM_CONF": str(self.root / "slurm.conf")} | variables

    def run(self, *command: str | Path, **variables: str) -> str:
        """Runs a SLURM command on the head; returns what it prints."""
        return _run(*command, env=self.environment(**variables))

    def submit(self, *words: str | Path, **variables: str) -> int:
        """Submits a job with sbatch; returns its number."""
        return int(self.run("sbatch", "--parsable", *words, **variables).split(";")[0])

    def state(self, job: int) -> dict[str, str]:
        """Returns the fields that `scontrol show job` prints: JobState, Restarts, ExitCode, Reason, …"""
        words = self.run("scontrol", "-o", "show", "job", str(job)).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, condition: Callable[[], object], what: str, seconds: float = 180) -> None:
        """Waits until a condition holds.

        Raises:
            AssertionError: it does not hold within `seconds`; shows the cluster's queue and the ends of its logs.
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with suppress(subprocess.CalledProcessError):
                if condition():
                    return
            time.sleep(0.2)
        logs = {str(path): path.read_text(errors="replace")[-2000:] for path in self.root.glob("*/log")}
        with suppress(subprocess.CalledProcessError):
            logs["queue"] = self.run("squeue", "--long")
        raise AssertionError(f"not within {seconds:g} s: {what}\n{json.dumps(logs, indent=2)}")

    def wait_for_state(self, job: int, *states: str, seconds: float = 240) -> dict[str, str]:
        """Waits until a job is in one of the states; returns its fields."""
        self.wait_for(lambda: self.state(job)["JobState"] in states, f"job {job} {' or '.join(states)}", seconds)
        return self.state(job)


def _run(*command: str | Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run([str(word) for word in command], env=env, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, done.args, done.stdout, done.stderr)
    return done.stdout
