"""Several machines, SLURM and Kubernetes: the same run as in one process, and which stopped jobs are requeued."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mnist_dist import load_run
from tests.launch.launching import (
    INSTALLED,
    LAUNCH,
    TRAINJOB,
    WORDS,
    environment,
    executable,
    finish,
    launch,
    losses,
    started,
)
from tests.processes import forked_python, free_port

# --- two machines -------------------------------------------------------------------------------------------------


@pytest.fixture
def machines() -> Iterator[dict[str, str]]:
    """Two machines, host name -> network namespace, that are connected to each other and to nothing else."""
    if not shutil.which("ip"):
        pytest.skip("two machines need network namespaces: the program `ip` (iproute2) is not installed")
    names = {name: f"{name}-{os.getpid()}" for name in ("alice", "bob")}

    def ip(*words: str, check: bool = True) -> subprocess.CompletedProcess:
        return subprocess.run(["ip", *words], check=check, capture_output=True, text=True)

    try:
        for namespace in names.values():
            added = ip("netns", "add", namespace, check=False)
            if added.returncode:
                pytest.skip(f"two machines need network namespaces (root): `ip netns add`: {added.stderr.strip()}")
            hosts = Path("/etc/netns") / namespace / "hosts"  # `ip netns exec` mounts it over /etc/hosts
            hosts.parent.mkdir(parents=True)
            hosts.write_text("127.0.0.1 localhost\n10.77.0.1 alice\n10.77.0.2 bob\n")
        ends = [("eth0", "netns", namespace) for namespace in names.values()]
        ip("link", "add", *ends[0], "type", "veth", "peer", "name", *ends[1])
        for number, namespace in enumerate(names.values(), start=1):
            ip("-n", namespace, "addr", "add", f"10.77.0.{number}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", namespace, "link", "set", device, "up")
        yield names
    finally:
        for namespace in names.values():
            for pid in ip("netns", "pids", namespace, check=False).stdout.split():
                os.kill(int(pid), signal.SIGKILL)
            ip("netns", "del", namespace, check=False)
            shutil.rmtree(Path("/etc/netns") / namespace, ignore_errors=True)


SET_HOST_NAME = "import os, socket, sys; socket.sethostname(sys.argv[1]); os.execvp(sys.argv[2], sys.argv[2:])"


def test_two_machines_run_the_same_command_and_form_one_world(tmp_path, machines, losses_of_one_process):
    command = [LAUNCH / "multi_node.sh", "alice:29500", "2", "2", *WORDS, "--run-dir", tmp_path / "run"]

    def on(machine: str):
        enter = ["ip", "netns", "exec", machines[machine], "unshare", "--uts"]
        return started(
            *enter, sys.executable, "-c", SET_HOST_NAME, machine, *command, GLOO_SOCKET_IFNAME="eth0", PATH=INSTALLED
        )

    with on("bob") as second, on("alice") as first:
        finish(first)
        finish(second)
    assert load_run(tmp_path / "run").summary["world_size"] == 4
    assert losses(tmp_path / "run") == pytest.approx(losses_of_one_process, rel=1e-6)


# --- SLURM and Kubernetes -----------------------------------------------------------------------------------------

SCONTROL = """#!/usr/bin/env bash
case $1 in show) echo localhost ;; *) echo "$@" >>"$CALLS" ;; esac
"""


def test_the_trainjob_is_one_world_of_its_processes(tmp_path, losses_of_one_process):
    """Runs the command of the TrainJob in one pod with two processes, as Kubeflow's torch plugin starts it."""
    address = {"PET_MASTER_ADDR": "localhost", "PET_MASTER_PORT": str(free_port())}
    plugin = {"PET_NNODES": "1", "PET_NPROC_PER_NODE": "2", "PET_NODE_RANK": "0", **address}
    trainer = TRAINJOB["spec"]["trainer"]
    variables = {each["name"]: each["value"] for each in trainer["env"] if "value" in each}
    arguments = [re.sub(r"\$\((\w+)\)", lambda name: address[name[1]], word) for word in trainer["args"]]
    variables["PYTHON_EXEC"] = str(forked_python())  # torchrun starts its processes with it
    # The last value of a repeated option or key counts.
    words = ["data.root=null", *WORDS, "--run-dir", tmp_path / "run"]
    launch(*trainer["command"], *arguments, *words, **plugin, **variables)
    assert load_run(tmp_path / "run").summary["world_size"] == 2
    assert losses(tmp_path / "run") == pytest.approx(losses_of_one_process, rel=1e-6)


# A real cluster preempts jobs in tests/cluster. The stubs below make moments that cannot be met there on purpose.


@pytest.mark.parametrize(
    ("script", "more"), [("slurm.sbatch", {"--ntasks-per-node=1"}), ("elastic.sbatch", {"--no-kill"})]
)
def test_sbatch_requests_a_warning_and_a_requeue(script, more):
    head, _, _ = (LAUNCH / script).read_text().partition("\nset ")  # SLURM reads no option after a command
    options = set(re.findall(r"(?m)^#SBATCH (\S+)$", head))
    assert {"--requeue", "--open-mode=append", "--signal=B:USR1@120"} | more <= options
    assert ("--no-kill" in options) == ("--ntasks-per-node=1" not in options)


def test_sbatch_does_not_requeue_a_run_that_failed(tmp_path):
    executable(tmp_path / "srun", "#!/bin/sh\nexit 3\n")
    executable(tmp_path / "scontrol", SCONTROL)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "STATUS").write_text("preempted\n")  # from an earlier start of the job
    slurm = {"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "a", "SLURM_JOB_NUM_NODES": "1", "CALLS": str(tmp_path / "c")}
    job = ["bash", LAUNCH / "slurm.sbatch", tmp_path / "run", *WORDS]
    with started(*job, PATH=environment(tmp_path)["PATH"], **slurm) as process:
        finish(process, expected=3)
    assert not (tmp_path / "c").exists()


# Ends when the script forwards the signal.
STOPPED_SRUN = """#!/bin/sh
trap 'exit {code}' USR1
{before}
while :; do sleep 0.1; done
"""


@pytest.mark.parametrize(("status", "code", "expected"), [("failed", 75, 75), ("failed", 1, 1), ("done", 75, 0)])
def test_sbatch_decides_by_status_and_exit_code_whether_a_stopped_job_is_requeued(status, code, expected, tmp_path):
    """STATUS may be that of an earlier start of the job; a run may be done when its launcher is stopped."""
    # srun is stopped by the signal that the script forwards.
    executable(
        tmp_path / "srun", f"#!/bin/sh\ntrap 'exit {code}' USR1\nkill -USR1 $PPID\nwhile :; do sleep 0.1; done\n"
    )
    executable(tmp_path / "scontrol", SCONTROL)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "STATUS").write_text(f"{status}\n")
    slurm = {"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "a", "SLURM_JOB_NUM_NODES": "1", "CALLS": str(tmp_path / "c")}
    job = ["bash", LAUNCH / "slurm.sbatch", tmp_path / "run", *WORDS]
    with started(*job, PATH=environment(tmp_path)["PATH"], **slurm) as process:
        finish(process, expected=expected)
    assert (tmp_path / "c").exists() == (expected == 75)


def test_a_signal_before_srun_runs_stops_the_job_and_requeues_it(tmp_path):
    # The signal comes while the script asks scontrol for the nodes.
    executable(tmp_path / "srun", STOPPED_SRUN.format(code=75, before=":"))
    asks = """#!/bin/sh
case $1 in show) kill -USR1 "$(cat "$CALLS.pid")"; echo a ;; *) echo "$@" >>"$CALLS" ;; esac
"""
    executable(tmp_path / "scontrol", asks)
    slurm = {"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "a", "SLURM_JOB_NUM_NODES": "1", "CALLS": str(tmp_path / "c")}
    script = 'echo $$ >"$CALLS.pid"; exec bash "$@"'
    job = ["bash", "-c", script, "-", LAUNCH / "slurm.sbatch", tmp_path / "run", *WORDS]
    with started(*job, PATH=environment(tmp_path)["PATH"], **slurm) as process:
        finish(process, expected=75)
    assert (tmp_path / "c").read_text() == "requeue 1\n"


def test_the_elastic_job_starts_one_elastic_launcher_per_node(tmp_path):
    executable(tmp_path / "srun", '#!/bin/sh\nprintf "%s\\n" "$@"\n')
    executable(tmp_path / "scontrol", SCONTROL)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "a", "SLURM_JOB_NUM_NODES": "3", "SLURM_GPUS_ON_NODE": "2"}
    job = ["bash", LAUNCH / "elastic.sbatch", tmp_path / "run", "--recipe", "lenet5"]
    first, *words = launch(*job, PATH=environment(tmp_path)["PATH"], **slurm).splitlines()
    arguments = ["localhost:10007", "1:3", "2", "--recipe", "lenet5", "--run-dir", str(tmp_path / "run")]
    assert words == ["--kill-on-bad-exit=0", "--no-kill", "launch/elastic_node.sh", *arguments]
    assert shlex.split(first.partition(": ")[2]) == ["launch/elastic.sh", *arguments]


# In the place of the launcher: ends with a code; with a signal to this process and its parent first, as SLURM sends it.
ENDS_WITH = '#!/bin/sh\ntrap : USR1\n[ -z "$SIGNAL" ] || kill -"$SIGNAL" $PPID $$\nexit "$CODE"\n'


@pytest.mark.parametrize(
    ("code", "signal_name", "left", "expected", "requeued"),
    [
        (0, "", "", 0, False),
        (2, "", "", 2, False),
        (75, "", "", 0, True),
        (75, "", "7", 75, False),
        (75, "USR1", "", 75, False),
        (0, "USR1", "", 0, False),
    ],
    ids=["done", "refused", "first node dead", "first node alive", "stopped", "done when stopped"],
)
def test_a_node_requeues_its_job_only_if_the_first_node_is_dead(code, signal_name, left, expected, requeued, tmp_path):
    """`left` is what squeue prints: the job, if it still runs on the first node."""
    shutil.copy(LAUNCH / "elastic_node.sh", tmp_path)
    executable(tmp_path / "elastic.sh", ENDS_WITH)
    executable(tmp_path / "squeue", f"#!/bin/sh\necho {left}\n".replace("echo \n", ":\n"))
    executable(tmp_path / "scontrol", SCONTROL)
    executable(tmp_path / "sleep", "#!/bin/sh\n")
    slurm = {"SLURM_JOB_ID": "7", "CALLS": str(tmp_path / "c"), "CODE": str(code), "SIGNAL": signal_name}
    with started(tmp_path / "elastic_node.sh", "a:1", "1:2", PATH=environment(tmp_path)["PATH"], **slurm) as process:
        finish(process, expected=expected)
    found = (tmp_path / "c").read_text() if (tmp_path / "c").exists() else ""
    assert found == ("requeue 7\n" if requeued else "")


# In the place of srun: starts the two tasks of a step with the variables that srun gives them.
TWO_TASKS = """#!/usr/bin/env bash
[ "$1" = --kill-on-bad-exit=0 ] && shift
export SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_TASKS_PER_NODE=2 SLURM_NODEID=0
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" &
SLURM_PROCID=0 SLURM_LOCALID=0 "$@" && code=0 || code=$?
wait "$!" || exit "$?"
exit "$code"
"""


# What the `python` of the test runs: the command without its training, which takes long.
WITHOUT_TRAINING = """
import sys
assert sys.argv[1:3] == ["-m", "mnist_dist.doctor"]
from mnist_dist.cli import run_command
from mnist_dist.doctor import training
from mnist_dist.doctor.__main__ import main
from tests.doctor.test_doctor import alone, distributed
training.train_alone, training.train_distributed = alone, distributed
sys.exit(run_command(lambda: main(sys.argv[3:])))
"""


def test_doctor_under_sbatch_checks_all_tasks_and_ends_with_its_exit_code(tmp_path):
    executable(tmp_path / "bin" / "srun", TWO_TASKS)
    (tmp_path / "without_training.py").write_text(WITHOUT_TRAINING)
    program = f'#!/bin/sh\nexec "{forked_python()}" "{tmp_path}/without_training.py" "$@"\n'
    executable(tmp_path / "bin" / "python", program)
    job = ["bash", LAUNCH / "doctor.sbatch", tmp_path / "runs"]
    slurm = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_NTASKS": "2", "WANDB_BASE_URL": "http://127.0.0.1:9"}
    slurm |= {"PATH": environment(tmp_path / "bin")["PATH"], "PYTHONPATH": str(LAUNCH.parent)}
    with started(*job, **slurm) as process:
        output = finish(process)
    assert "2 processes, started by srun" in output and "\nfit to train" in output
    with started(*job, "--world-size", "3", **slurm) as process:  # the last value counts
        assert "\nnot fit to train: world" in finish(process, expected=1)
