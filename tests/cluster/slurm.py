"""A real SLURM cluster of two nodes inside one machine, for tests.

Each node is a network namespace with its own host name and its own slurmd. A bridge joins the namespaces. slurmctld
runs in the machine's own network namespace under the host name `head`. Every node has one "GPU": a device file that
SLURM counts. Needs root, `ip`, and Debian's packages slurmctld, slurmd, slurm-client and munge.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests.cluster import namespaces
from tests.cluster.namespaces import run

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "munged", "mknod")
NODES = {"n0": "10.77.0.10", "n1": "10.77.0.11"}
HEAD = "10.77.0.1"
BRIDGE = "mdtest"
PID = Path("/run/mdtest-slurmctld.pid")
"""Not below the root: the next cluster ends the slurmctld of one that was killed."""

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
    packages = "slurmctld slurmd slurm-client munge iproute2"
    return namespaces.missing(PROGRAMS, packages, {"device files": "mknod {folder}/gpu c 1 3"})


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
        namespaces.write_hosts(self.root, {"head": HEAD, **NODES})
        gpu = self.root / "gpu"
        run("mknod", gpu, "c", "1", "3")  # SLURM accepts device files only
        (self.root / "gres.conf").write_text(f"Name=gpu File={gpu}\n")
        nodes = [f"NodeName={name} NodeAddr={address} CPUs=2 Gres=gpu:1" for name, address in NODES.items()]
        text = CONFIGURATION.format(head=HEAD, root=self.root, pid=PID, nodes="\n".join(nodes))
        (self.root / "slurm.conf").write_text(text)
        namespaces.connect(BRIDGE, NODES)
        run("ip", "addr", "add", f"{HEAD}/24", "dev", BRIDGE)
        if subprocess.run(["pgrep", "munged"], capture_output=True).returncode:
            Path("/run/munge").mkdir(exist_ok=True)
            run("chown", "munge", "/run/munge")
            run("runuser", "-u", "munge", "--", "munged")
        self._start("head", ["unshare", "--uts", "--mount"], "slurmctld")
        for node in NODES:
            self.start_node(node)
        self.wait_for(lambda: self.run("sinfo", "-h", "-o", "%t %D").strip() == "idle 2", "two idle nodes")
        return self

    def __exit__(self, *error: object) -> None:
        self._clear()

    # --- nodes ----------------------------------------------------------------------------------------------------

    def _start(self, name: str, enter: list[str], *daemon: str) -> None:
        """Starts a daemon with its own host name, which only this daemon and its children see."""
        run(*namespaces.command_on(self.root, name, enter, *daemon), env=self.environment())

    def start_node(self, node: str) -> None:
        """Starts a node's slurmd."""
        self._start(node, namespaces.entering(node), "slurmd", "-N", node)

    def kill_node(self, node: str) -> None:
        """Kills every process of a node, slurmd included, as a power failure would."""
        namespaces.kill(node)

    def processes(self) -> list[str]:
        """Returns the command lines of all processes on the nodes, without slurmd and its step managers."""
        lines = [(node, line) for node in NODES for line in namespaces.processes_of(node).values()]
        return [f"{node}: {line}" for node, line in lines if line and not line.startswith(("slurmd", "slurmstepd"))]

    def _clear(self) -> None:
        with suppress(OSError, ValueError):
            pid = int(PID.read_text())
            if Path(f"/proc/{pid}/comm").read_text() == "slurmctld\n":
                os.kill(pid, signal.SIGKILL)
            PID.unlink()
        namespaces.remove(BRIDGE, NODES)

    # --- jobs -----------------------------------------------------------------------------------------------------

    def environment(self, **variables: str) -> dict[str, str]:
        """Returns the environment of SLURM's commands and of the jobs."""
        return os.environ | {"SLURM_CONF": str(self.root / "slurm.conf")} | variables

    def run(self, *command: str | Path, **variables: str) -> str:
        """Runs a SLURM command on the head; returns what it prints."""
        return run(*command, env=self.environment(**variables))

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
