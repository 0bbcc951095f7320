"""launch/elastic.sh on one machine: its command line, a process that dies, and a mistake of the user."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
from torch.distributed.run import get_args_parser

from mnist_dist import load_run
from tests.distributed.training import weights_and_metrics
from tests.launch.launching import (
    LAUNCH,
    TRAINJOB,
    WORDS,
    environment,
    executable,
    finish,
    launch,
    started,
    wait_for_lines,
)
from tests.processes import free_port

# In the place of `python`: prints the arguments of launch.py, and two as the number of GPUs.
PRINTS_ITS_ARGUMENTS_OR_TWO = """#!/bin/sh
case "$1" in
*/launch.py) shift; printf "%s\\n" "$@" ;;
*) echo 2 ;;
esac
"""


def words_of(tmp_path: Path, *words: str) -> list[str]:
    executable(tmp_path / "python", PRINTS_ITS_ARGUMENTS_OR_TWO)
    return launch(LAUNCH / "elastic.sh", *words, PATH=environment(tmp_path)["PATH"]).splitlines()


def test_torchrun_gets_the_number_of_machines_and_the_trainer_that_of_processes(tmp_path):
    for each, first in ((2, ["head:29400", "1:4"]), (3, ["head:29400", "1:4", "3"])):
        words = words_of(tmp_path, *first, "--recipe", "lenet5", "model.name=a b")
        assert words[0] == "torchrun"
        found = get_args_parser().parse_args(words[1:])
        assert (found.nnodes, found.nproc_per_node, found.rdzv_endpoint) == ("1:4", str(each), "head:29400")
        assert found.max_restarts > 0 and found.rdzv_backend == "c10d"
        trainer = [
            "--world-size",
            f"{each}:{4 * each}",
            "engine.hang_seconds=20",
            "--recipe",
            "lenet5",
            "model.name=a b",
        ]
        assert found.training_script_args == trainer


def test_the_trainjob_starts_the_elastic_command(tmp_path):
    """The options of torchrun, the first words of the trainer and the variables are those of launch/elastic.sh."""
    trainer, [_, *words] = TRAINJOB["spec"]["trainer"], words_of(tmp_path, "head:29400", "1:2", "1", "--recipe", "a")
    parse = get_args_parser().parse_args
    found, expected = parse(trainer["args"]), parse(words)
    for name in ("nnodes", "max_restarts", "rdzv_backend", "rdzv_conf", "module", "training_script"):
        assert getattr(found, name) == getattr(expected, name), name
    assert found.nnodes == f"1:{trainer['numNodes']}" and found.rdzv_endpoint.startswith("$(PET_MASTER_ADDR):")
    both = [["--world-size=1:2", "engine.hang_seconds=20"], ["--world-size", "1:2", "engine.hang_seconds=20"]]
    assert [found.training_script_args[:2], expected.training_script_args[:3]] == both
    [shared] = [each for each in trainer["env"] if each["name"] == "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"]
    assert f"{shared['name']}={shared['value']}" in (LAUNCH / "elastic.sh").read_text()


def command(tmp_path: Path, *words: str) -> list[str | Path]:
    """Two processes of one machine: a world that can only lose and regain them together."""
    address = f"localhost:{free_port()}"
    return [LAUNCH / "elastic.sh", address, "1:1", "2", *WORDS, *words, "--run-dir", tmp_path / "run"]


def trainers(run_dir: Path) -> list[psutil.Process]:
    """Returns the training processes of a run: all whose command line names its folder, without the launcher."""
    lines = [(each, each.info["cmdline"] or []) for each in psutil.process_iter(["cmdline"])]
    return [each for each, line in lines if str(run_dir) in line and str(LAUNCH / "accelerate/launch.py") not in line]


def test_a_process_that_dies_is_started_again_and_the_bytes_stay_the_same(tmp_path):
    words = ["logical_shards=2", "max_steps=200", "epochs=200"]
    with started(*command(tmp_path, *words)) as process:
        wait_for_lines(tmp_path / "run", 30, process)
        os.kill(trainers(tmp_path / "run")[0].pid, signal.SIGKILL)
        finish(process)
    found = load_run(tmp_path / "run").summary["world_history"]
    assert [(each["processes"], each["cause"]) for each in found] == [(2, "start"), (2, "resumed after a failure")]
    launch(LAUNCH / "cpu.sh", "1", *WORDS, *words, "--run-dir", tmp_path / "undisturbed")
    assert weights_and_metrics(tmp_path / "run") == weights_and_metrics(tmp_path / "undisturbed")


def test_a_mistake_of_the_user_is_reported_and_nothing_is_started_again(tmp_path):
    with started(*command(tmp_path, "batch_size=0")) as process:
        output = finish(process, expected=2)
    # On a busy machine the second process may print before torchrun ends it. Ten starts would print ten times.
    assert output.count("nothing was done") <= 2 and "Traceback" not in output


def test_a_machine_that_cannot_reach_the_head_says_what_to_do(tmp_path):
    """No machine has the name of the head. The launcher does not wait for it as long as torchrun, one minute."""
    words = ["unknown.invalid:29400", "1:2", "1", *WORDS, "--run-dir", tmp_path / "run"]
    with started(LAUNCH / "elastic.sh", *words) as process:
        output = finish(process, expected=75)
    assert "unknown.invalid:29400" in output and "Traceback" not in output
    assert not (tmp_path / "run").exists()


def test_a_launcher_that_waits_for_the_head_stops_on_a_signal_and_prints_no_stack(tmp_path):
    """torchrun's own wait would end after a minute, with the C++ stack of its store."""
    address = "192.0.2.1:29400"  # of a network for documentation: no machine has it
    with started(LAUNCH / "elastic.sh", address, "1:2", "1", *WORDS, "--run-dir", tmp_path / "run") as process:
        assert address in process.stdout.readline()
        sent = time.monotonic()
        process.send_signal(signal.SIGUSR1)
        assert finish(process, expected=75) == ""
    assert time.monotonic() - sent < 30
    assert not (tmp_path / "run").exists()
