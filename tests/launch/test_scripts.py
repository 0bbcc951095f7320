"""The launch scripts for one machine: their command lines, and a run by the real launcher."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

from mnist_dist import load_run
from tests.launch.launching import (
    INSTALLED,
    LAUNCH,
    ROOT,
    WORDS,
    environment,
    executable,
    finish,
    launch,
    losses,
    started,
    wait_for_lines,
)
from tests.processes import free_port, run

# In the place of `python`: prints the arguments of launch.py, and four as the number of GPUs.
PRINTS_ITS_ARGUMENTS_OR_FOUR = """#!/bin/sh
case "$1" in
*/launch.py) shift; printf "%s\\n" "$@" ;;
*) echo 4 ;;
esac
"""


def test_every_line_of_python_in_a_script_runs():
    """The tests below replace `python`, so they would not see a wrong import."""
    scripts = [*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")]
    command = re.compile(r"python -c (['\"])(.+?)\1")
    lines = [found[2] for path in scripts for found in command.finditer(path.read_text(encoding="utf-8"))]
    assert len(lines) >= 4
    for line in lines:
        done = run([sys.executable, "-c", line])
        assert done.returncode == 0 and done.stdout.strip(), (line, done.stderr)


def test_shellcheck_finds_nothing():
    scripts = [*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch"), ROOT / ".ci" / "run"]
    assert len(scripts) >= 6
    done = subprocess.run(["shellcheck", *scripts], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


SBATCH = ("doctor.sbatch", "elastic.sbatch", "slurm.sbatch")


@pytest.mark.parametrize(
    ("script", "words"),
    [
        *((script, []) for script in (*SBATCH, "cpu.sh", "elastic.sh", "multi_node.sh")),
        *((script, ["--recipe", "lenet5"]) for script in (*SBATCH, "elastic.sh", "multi_node.sh")),
    ],
)
def test_a_script_without_its_own_arguments_prints_its_usage(script, words):
    done = subprocess.run(["bash", LAUNCH / script, *words], env=environment(), capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    command = f"{'sbatch ' if script in SBATCH else ''}launch/{script}"
    assert done.stderr.startswith(f"usage: {command} ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("cpu.sh", "0 --recipe lenet5"),
        ("cpu.sh", "2 0 --recipe lenet5"),
        ("elastic.sh", "head:29400 4:1 --recipe lenet5"),
        ("elastic.sh", "head:29400 0:2 --recipe lenet5"),
        ("elastic.sh", "head:29400 1:2:3 --recipe lenet5"),
        ("elastic.sh", "head 1:2 --recipe lenet5"),
        ("elastic.sh", "head:29400 1:2 0 --recipe lenet5"),
        ("elastic.sh", "--recipe lenet5 head:29400 1:2"),
        ("multi_node.sh", "head:29500 2 --recipe lenet5"),
        ("multi_node.sh", "head 2 8 --recipe lenet5"),
        ("multi_node.sh", "head:29500 two 8 --recipe lenet5"),
        ("multi_node.sh", "head:29500 0 8 --recipe lenet5"),
    ],
)
def test_wrong_numbers_of_machines_or_processes_print_the_usage(script, words):
    done = subprocess.run(["bash", LAUNCH / script, *words.split()], env=environment(), capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith(f"usage: launch/{script} ") and done.stderr.count("\n") == 1


def test_cpu_sh_gives_the_run_of_one_process(tmp_path, losses_of_one_process):
    launch(LAUNCH / "cpu.sh", "2", "1", *WORDS, "--run-dir", tmp_path / "run")
    summary = load_run(tmp_path / "run").summary
    assert summary["world_size"] == 2 and summary["launch"]["launcher"] == "accelerate launch"
    assert losses(tmp_path / "run") == pytest.approx(losses_of_one_process, rel=1e-6)


STARTS_FOUR = {
    "local.sh": ([], "multi_gpu"),
    "cpu.sh": (["4"], "cpu"),
    "multi_node.sh": (["a:1", "2", "2"], "multi_node"),
}


@pytest.mark.parametrize("script", STARTS_FOUR)
def test_the_launcher_gets_a_configuration_file_and_the_trainer_the_world_size(script, tmp_path):
    executable(tmp_path / "python", PRINTS_ITS_ARGUMENTS_OR_FOUR)
    (first, config), path = STARTS_FOUR[script], environment(tmp_path)["PATH"]
    words = launch(LAUNCH / script, *first, "--recipe", "lenet5", "model.name=a b", PATH=path).splitlines()
    arguments = launch_command_parser().parse_args(words)
    assert Path(arguments.config_file) == LAUNCH / "accelerate" / f"{config}.yaml"
    assert (arguments.num_processes, arguments.training_script, arguments.quiet) == (4, "mnist_dist.train", True)
    assert arguments.training_script_args == ["--world-size", "4", "--recipe", "lenet5", "model.name=a b"]


@pytest.mark.parametrize(("cores", "processes"), [(3, 3), (64, 8)])
def test_cpu_sh_starts_one_process_per_core_by_default(cores, processes, tmp_path):
    executable(tmp_path / "python", PRINTS_ITS_ARGUMENTS_OR_FOUR.replace("echo 4", f"echo {cores}"))
    words = launch(LAUNCH / "cpu.sh", "--recipe", "lenet5", PATH=environment(tmp_path)["PATH"]).splitlines()
    arguments = launch_command_parser().parse_args(words)
    assert arguments.num_processes == processes
    assert arguments.training_script_args == ["--world-size", str(processes), "--recipe", "lenet5"]


ONE_PROCESS = [["local.sh"], ["cpu.sh", "1"], ["multi_node.sh", "a:1", "1", "1"]]


@pytest.mark.parametrize("script", ONE_PROCESS, ids=lambda words: words[0])
def test_one_process_is_started_without_a_launcher(script, tmp_path):
    # Prints the number of GPUs, 0, or its arguments.
    executable(tmp_path / "python", '#!/bin/sh\n[ "$1" = -c ] && echo 0 || printf "%s\\n" "$@"\n')
    path = environment(tmp_path)["PATH"]
    words = launch(LAUNCH / script[0], *script[1:], "--recipe", "lenet5", "epochs=1", PATH=path).splitlines()
    assert words == ["-m", "mnist_dist.train", "--world-size", "1", "--recipe", "lenet5", "epochs=1"]


# --- the launcher's end -------------------------------------------------------------------------------------------


def test_the_launcher_ends_with_the_exit_code_of_the_training_processes(tmp_path):
    command = [LAUNCH / "cpu.sh", "2", "1", *WORDS, "batch_size=0", "--run-dir", tmp_path / "run"]
    with started(*command) as process:
        output = finish(process, expected=2)
    assert "batch_size" in output and "Traceback" not in output and "ChildFailedError" not in output


def test_a_launcher_that_is_stopped_ends_with_75_and_the_line_of_the_trainer(tmp_path):
    command = [LAUNCH / "cpu.sh", "2", "1", *WORDS, "max_steps=null", "epochs=1000", "--run-dir", tmp_path / "run"]
    with started(*command) as process:
        wait_for_lines(tmp_path / "run", 10, process)
        process.send_signal(signal.SIGUSR1)
        output = finish(process, expected=75)
    assert (tmp_path / "run" / "STATUS").read_text() == "preempted\n"
    assert "checkpoint saved at step" in output.splitlines()[-1]


def torchrun(folder, change, training):
    """Returns the command that executes the source `change`, then runs the source `training` by torchrun."""
    program, script = folder / "program.py", folder / "training.py"
    program.write_text(
        f"import runpy, sys\n{change}\ndel sys.argv[0]\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    script.write_text(training)
    words = ["torchrun", "--nnodes", "1:1", "--nproc_per_node", "1", "--rdzv_backend", "c10d"]
    words += ["--rdzv_endpoint", f"127.0.0.1:{free_port()}", script]
    return [sys.executable, program, LAUNCH / "accelerate/launch.py", *words]


STORE_THAT_NEVER_ANSWERS = """
from torch.distributed.elastic.rendezvous import dynamic_rendezvous

def run(context):
    store = context.args[0]()._store
    while True:
        store.set("heartbeat", "")

dynamic_rendezvous._PeriodicTimer._run = staticmethod(run)
"""


def test_a_launcher_that_is_stopped_does_not_wait_for_a_call_of_the_rendezvous(tmp_path):
    """Here the thread that calls the store never ends: Python's own exit would wait for it, or abort."""
    training = "import time; print('started', flush=True); time.sleep(600)"
    command = torchrun(tmp_path, STORE_THAT_NEVER_ANSWERS, training)
    signals = "SIGTERM,SIGINT,SIGUSR1"
    with started(*command, PET_SIGNALS_TO_HANDLE=signals, PATH=INSTALLED) as process:
        while "started" not in (line := process.stdout.readline()):
            assert line, "the launcher has ended"
        process.send_signal(signal.SIGUSR1)
        assert finish(process, expected=75) == ""


STORE_THAT_IS_GONE = """
from torch.distributed.elastic.agent.server import api
from torch.distributed.elastic.rendezvous import RendezvousConnectionError, dynamic_rendezvous

def fail(*_, **__):
    raise RendezvousConnectionError("the store is gone")

api.store_util.barrier = fail
dynamic_rendezvous.DynamicRendezvousHandler._close = fail
"""


def test_a_launcher_whose_processes_are_done_does_not_complain_that_the_other_machine_has_ended(tmp_path):
    command = torchrun(tmp_path, STORE_THAT_IS_GONE, "print('trained', flush=True)")
    with started(*command, PATH=INSTALLED) as process:
        assert finish(process, expected=0) == "trained\n"


def test_a_launcher_that_is_stopped_before_it_has_started_a_process_ends_with_75(tmp_path):
    command = [LAUNCH / "cpu.sh", "2", "1", *WORDS, "--run-dir", tmp_path / "run"]
    with started(*command, PATH=INSTALLED) as process:
        status, deadline = Path(f"/proc/{process.pid}/status"), time.monotonic() + 60
        while time.monotonic() < deadline:  # until the process handles SIGUSR1
            [caught] = re.findall(r"(?m)^SigCgt:\s*(\w+)", status.read_text())
            if int(caught, 16) >> (signal.SIGUSR1 - 1) & 1:
                break
        process.send_signal(signal.SIGUSR1)
        assert finish(process, expected=75) == ""
    assert not (tmp_path / "run").exists()


# --- macOS --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["cpu.sh", "local.sh", "multi_node.sh", "reproduce.sh"])
def test_scripts_need_neither_linux_programs_nor_a_new_bash(script):
    """macOS has bash 3.2: without mapfile, and an empty array is an unset variable there."""
    text = (LAUNCH / script).read_text()
    assert not re.findall(r"\b(nproc|mapfile|readarray|timeout|declare -A)\b", text)
    arrays = set(re.findall(r"(\w+)=\(\)", text))
    for name in arrays - {"runs", "recipes"}:  # these two are never empty where they are used
        assert f'"${{{name}[@]}}"' not in text.replace(f'${{{name}[@]+"${{{name}[@]}}"}}', "")
