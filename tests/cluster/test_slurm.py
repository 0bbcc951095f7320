"""launch/slurm.sbatch on a real SLURM cluster of two nodes: exactness, preemption, a dead node, arrays, doctor."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import processes
from tests.cluster.slurm import NODES, Cluster, missing

ROOT = Path(__file__).parents[2]

WORDS = [
    *("--recipe", "lenet5", "data.dataset=synthetic", "data.limit_train=1024", "data.limit_test=128", "batch_size=64"),
    *("epochs=4", "logical_shards=4", "log_every=4", "checkpoint.every_steps=8", "tracking.wandb.mode=disabled"),
]
STEPS = 4 * 16

MOMENTS = int(os.environ.get("MNIST_DIST_PREEMPTIONS", "3"))
"""How many random moments the preemption test tries; ten for the table in tests/README.md."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := missing():
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("slurm")) as started:
        yield started


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the same training in one process without SLURM."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    command = [sys.executable, "-m", "mnist_dist.train", *WORDS, "--run-dir", folder]
    processes.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
    return folder


def variables() -> dict[str, str]:
    """What a job on these nodes needs: gloo over the nodes' own network, this Python, this checkout."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {
        "ACCELERATE_USE_CPU": "true",
        "GLOO_SOCKET_IFNAME": "eth0",
        "OMP_NUM_THREADS": "1",
        "PATH": path,
        "PYTHONPATH": str(ROOT),
    }


def submit(cluster: Cluster, log: Path, *words: str | Path, options: tuple[str, ...] = ()) -> int:
    return cluster.submit(
        *("--nodes=2", "--gpus-per-node=1", f"--output={log}", f"--chdir={ROOT}", *options, *words), **variables()
    )


def train(cluster: Cluster, run_dir: Path, *options: str, words: list[str] = WORDS) -> int:
    log = run_dir.with_suffix(".log")
    return submit(cluster, log, ROOT / "launch" / "slurm.sbatch", run_dir, *words, options=options)


def assert_same(run_dir: Path, undisturbed: Path, log: Path) -> None:
    """The run is done and its weights are those of the undisturbed run, byte for byte."""
    assert (run_dir / "STATUS").read_text() == "done\n", log.read_text()[-3000:]
    for name in ("last.safetensors", "best.safetensors"):
        assert (run_dir / name).read_bytes() == (undisturbed / name).read_bytes(), name


def step_of(run_dir: Path) -> int:
    """The last step in metrics.jsonl; 0 if there is none."""
    metrics = run_dir / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True) if metrics.is_file() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


def test_two_nodes_end_with_the_bytes_of_one_process_without_slurm(cluster, undisturbed, tmp_path):
    run_dir = tmp_path / "run"
    job = train(cluster, run_dir)
    assert cluster.wait_for_state(job, "COMPLETED", "FAILED")["JobState"] == "COMPLETED"
    assert_same(run_dir, undisturbed, tmp_path / "run.log")
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["world_size"], summary["nodes"]) == (2, 2)


@pytest.mark.parametrize("moment", range(MOMENTS))
def test_a_preempted_job_is_requeued_and_ends_with_the_same_bytes(cluster, undisturbed, tmp_path, moment):
    """SLURM sends SIGUSR1 to the batch script at a random moment, the first second and the end of the run included."""
    run_dir, log = tmp_path / "run", tmp_path / "run.log"
    step = [0, STEPS, *random.Random(moment).sample(range(1, STEPS), 1)][min(moment, 2)]
    job = train(cluster, run_dir)
    cluster.wait_for_state(job, "RUNNING")
    cluster.wait_for(lambda: step_of(run_dir) >= step - 4, f"step {step}")
    time.sleep(random.Random(moment).random())
    cluster.run("scancel", "--batch", "--signal=USR1", str(job))
    cluster.wait_for_state(job, "COMPLETED", "FAILED", "CANCELLED")
    facts = cluster.state(job)
    assert facts["JobState"] == "COMPLETED", (facts, log.read_text()[-3000:])
    assert_same(run_dir, undisturbed, log)
    assert "Traceback" not in log.read_text()


def test_the_job_of_a_dead_node_is_requeued_and_completed(cluster, undisturbed, tmp_path):
    run_dir, log = tmp_path / "run", tmp_path / "run.log"
    job = train(cluster, run_dir, words=[*WORDS, "engine.hang_seconds=20"])
    cluster.wait_for(lambda: step_of(run_dir) >= 20, "step 20")
    cluster.kill_node("n1")
    cluster.wait_for(lambda: cluster.state(job).get("Restarts", "0") != "0", "the job is requeued")
    cluster.start_node("n1")
    assert cluster.wait_for_state(job, "COMPLETED", "FAILED")["JobState"] == "COMPLETED", log.read_text()[-3000:]
    assert_same(run_dir, undisturbed, log)


def test_an_array_trains_one_seed_per_task(cluster, tmp_path):
    job = train(cluster, tmp_path / "run", "--array=0-1", "--nodes=1", words=[*WORDS, "epochs=1"])
    for task in (0, 1):
        cluster.wait_for(lambda task=task: (tmp_path / f"run-seed{task}" / "summary.json").is_file(), f"seed {task}")
    cluster.wait_for(lambda: not cluster.run("squeue", "-h", "-j", str(job)).strip(), "the array has ended")
    seeds = [json.loads((tmp_path / f"run-seed{task}" / "summary.json").read_text())["seed"] for task in (0, 1)]
    assert seeds == [0, 1]


def test_doctor_runs_as_a_job_on_both_nodes(cluster, tmp_path):
    script, found = tmp_path / "doctor.sh", tmp_path / "health.json"
    script.write_text(
        "#!/usr/bin/env bash\nexport PET_RDZV_ENDPOINT=n0:29611\n"
        f'srun accelerate launch --quiet --config_file "{ROOT}/launch/accelerate/multi_node.yaml" --num_machines 2 '
        "--num_processes 2 --main_process_ip n0 --main_process_port 29611 --rdzv_backend c10d "
        f'-m mnist_dist.doctor --run-dir "{tmp_path}/runs" --world-size 2 --json "{found}"\n'
    )
    job = submit(cluster, tmp_path / "doctor.log", script)
    facts = cluster.wait_for_state(job, "COMPLETED", "FAILED")
    assert facts["JobState"] == "COMPLETED", (tmp_path / "doctor.log").read_text()
    report = json.loads(found.read_text())
    assert report["fit"] and report["world_size"] == 2
    [world] = [row for row in report["checks"] if row["check"] == "world"]
    assert all(node in world["figure"] for node in NODES)


def test_a_cancelled_job_leaves_no_process(cluster, tmp_path):
    run_dir = tmp_path / "run"
    job = train(cluster, run_dir, words=[*WORDS, "epochs=4000"])
    cluster.wait_for(lambda: step_of(run_dir) >= 8, "step 8")
    cluster.run("scancel", str(job))
    cluster.wait_for_state(job, "CANCELLED")
    cluster.wait_for(lambda: not cluster.processes(), "no process on the nodes")
    shutil.rmtree(run_dir)
