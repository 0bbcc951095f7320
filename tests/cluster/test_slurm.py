"""launch/slurm.sbatch on a real SLURM cluster of two nodes: exactness, preemption, a dead node, arrays, doctor.

With MNIST_DIST_CLUSTER_TABLE=tests/README.md the results are written as a table between the marks of that file.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from tests.cluster.results import Results, written_as_table
from tests.cluster.slurm import NODES, Cluster, missing
from tests.cluster.undisturbed import train_undisturbed

ROOT = Path(__file__).parents[2]

EPOCHS, STEPS_PER_EPOCH = 40, 16
STEPS = EPOCHS * STEPS_PER_EPOCH
WORDS = [
    *("--recipe", "lenet5", "data.dataset=synthetic", "data.limit_train=1024", "data.limit_test=128", "batch_size=64"),
    *(f"epochs={EPOCHS}", "logical_shards=4", "log_every=4", "checkpoint.every_steps=8"),
    *("tracking.wandb.mode=disabled", "tracking.plots=false"),
]

MARKS = ("<!-- cluster: made by tests/cluster -->", "<!-- end of cluster -->")


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> Iterator[Results]:
    """Collects the trials."""
    with written_as_table(request, "pytest -m cluster tests/cluster/test_slurm.py", 2, MARKS) as found:
        yield found


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := missing():
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("slurm")) as started:
        yield started


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the same training in one process without SLURM."""
    return train_undisturbed(tmp_path_factory.mktemp("undisturbed") / "run", WORDS)


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


def train(
    cluster: Cluster, run_dir: Path, *options: str, words: list[str] = WORDS, script: str = "slurm.sbatch"
) -> int:
    log = run_dir.with_suffix(".log")
    return submit(cluster, log, ROOT / "launch" / script, run_dir, *words, options=options)


def assert_same(run_dir: Path, undisturbed: Path, log: Path) -> None:
    """Checks that the run is done and that its weights are those of the undisturbed run, byte for byte."""
    assert (run_dir / "STATUS").read_text() == "done\n", log.read_text()[-3000:]
    for name in ("last.safetensors", "best.safetensors"):
        assert (run_dir / name).read_bytes() == (undisturbed / name).read_bytes(), name


def step_of(run_dir: Path) -> int:
    """Returns the last step in metrics.jsonl; 0 if there is none."""
    metrics = run_dir / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True) if metrics.is_file() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


def test_two_nodes_end_with_the_bytes_of_one_process_without_slurm(cluster, undisturbed, tmp_path, results):
    run_dir = tmp_path / "run"
    job = train(cluster, run_dir)
    assert cluster.wait_for_state(job, "COMPLETED", "FAILED")["JobState"] == "COMPLETED"
    assert_same(run_dir, undisturbed, tmp_path / "run.log")
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["world_size"], summary["nodes"]) == (2, 2)
    results.add("nothing", "two nodes", "the bytes of one process without SLURM")


# --- preemption ---------------------------------------------------------------------------------------------------

PREEMPTIONS = [
    ["start", "step", "step", "ending"],
    ["step", "start", "ending"],
    ["start", "step", "ending"],
]
"""The moments of three jobs. A job is resumed after each of its moments."""

LENGTHS = {"start": 8.0, "step": 0.5, "ending": 2.0}
"""A signal comes at a random moment within this number of seconds after the phase has begun."""

LAST_LINE = re.compile(r"^job \d+ was preempted; it is requeued and resumes from its last checkpoint\n", re.MULTILINE)
OF_SLURM = re.compile(r"srun: error: n\d: task \d: (Exited with exit code 75|User defined signal 1)")
STOP = re.compile(r"stop requested; checkpoint saved at step ([\d,]+)\.")


def preempt(cluster: Cluster, run_dir: Path, moments: list[str], seed: int) -> list[str]:
    """Preempts one job at random moments and lets it end; returns what each of its attempts has printed."""
    chance, log = random.Random(seed), run_dir.with_suffix(".log")
    # A signal takes a second to arrive, in which a fast machine makes a hundred steps.
    steps = iter(sorted(chance.sample(range(8, STEPS // 2), moments.count("step"))))
    job = train(cluster, run_dir, words=[*WORDS, "tracking.plots=true"])  # pictures make the end of the run longer

    def attempts() -> list[str]:
        return LAST_LINE.split(log.read_text()) if log.is_file() else [""]

    for number, moment in enumerate(moments):
        step = next(steps) if moment == "step" else 0

        def is_over(number: int = number) -> bool:
            facts = cluster.state(job)
            return int(facts["Restarts"]) > number or facts["JobState"] not in ("PENDING", "RUNNING", "COMPLETING")

        def is_reached(moment: str = moment, step: int = step) -> bool:
            text = attempts()[-1]
            begun = {"start": True, "step": "run folder" in text, "ending": f"epoch {EPOCHS}/{EPOCHS}" in text}
            return begun[moment] and step_of(run_dir) >= step

        facts = cluster.wait_for_state(job, "RUNNING", "COMPLETED", "FAILED", seconds=600)
        assert facts["JobState"] == "RUNNING", f"job {job} ended before signal {number}\n{log.read_text()[-3000:]}"
        cluster.wait_for(is_reached, f"{moment}, step {step} or later")
        time.sleep(chance.uniform(0, LENGTHS[moment]))
        with suppress(subprocess.CalledProcessError):  # it has just ended
            cluster.run("scancel", "--batch", "--signal=USR1", str(job))
        cluster.wait_for(is_over, f"the end of attempt {number} of job {job}")
    facts = cluster.wait_for_state(job, "COMPLETED", "FAILED", "CANCELLED")
    assert facts["JobState"] == "COMPLETED", (facts, log.read_text()[-3000:])
    return attempts()


@pytest.mark.parametrize("jobs", [range(1), range(1, 3)], ids=["one", "two_in_turns"])
def test_preempted_jobs_are_requeued_and_end_with_the_same_bytes(jobs, cluster, undisturbed, tmp_path, results):
    """SLURM sends SIGUSR1 to the batch script at ten random moments, the first seconds and the end among them."""
    planned, run_dirs = [PREEMPTIONS[job] for job in jobs], [tmp_path / f"run{job}" for job in jobs]
    with ThreadPoolExecutor(len(jobs)) as pool:
        found = list(pool.map(preempt, [cluster] * len(jobs), run_dirs, planned, jobs))
    for run_dir, [*stopped, _], moments in zip(run_dirs, found, planned, strict=True):
        log = run_dir.with_suffix(".log")
        assert_same(run_dir, undisturbed, log)
        assert "Traceback" not in log.read_text() and "Exception" not in log.read_text()
        # A job whose run was done when the signal came is not requeued.
        assert len(stopped) in (len(moments), len(moments) - 1)
        for text in stopped:
            saved = STOP.search(text)
            after = text[saved.end() :].partition("\n")[2] if saved else ""
            assert all(OF_SLURM.fullmatch(line) for line in after.splitlines()), text
            phase = "start" if not saved else "ending" if saved[1] == str(STEPS) else "step"
            results.add("SIGUSR1 to the job", phase, "requeued, the same bytes")
        if len(stopped) < len(moments):
            results.add("SIGUSR1 to the job", "ending", "done, the same bytes")


# --- what else happens to jobs ------------------------------------------------------------------------------------


def test_the_job_of_a_dead_node_is_requeued_and_completed(cluster, undisturbed, tmp_path, results):
    run_dir, log = tmp_path / "run", tmp_path / "run.log"
    job = train(cluster, run_dir, words=[*WORDS, "engine.hang_seconds=20"])
    cluster.wait_for(lambda: step_of(run_dir) >= 20, "step 20")
    cluster.kill_node("n1")
    cluster.wait_for(lambda: cluster.state(job).get("Restarts", "0") != "0", "the job is requeued")
    cluster.start_node("n1")
    assert cluster.wait_for_state(job, "COMPLETED", "FAILED")["JobState"] == "COMPLETED", log.read_text()[-3000:]
    assert_same(run_dir, undisturbed, log)
    results.add("a node dies", "step", "requeued, the same bytes")


def test_an_array_trains_one_seed_per_task(cluster, tmp_path, results):
    job = train(cluster, tmp_path / "run", "--array=0-1", "--nodes=1", words=[*WORDS, "epochs=1"])
    for task in (0, 1):
        cluster.wait_for(lambda task=task: (tmp_path / f"run-seed{task}" / "summary.json").is_file(), f"seed {task}")
    cluster.wait_for(lambda: not cluster.run("squeue", "-h", "-j", str(job)).strip(), "the array has ended")
    seeds = [json.loads((tmp_path / f"run-seed{task}" / "summary.json").read_text())["seed"] for task in (0, 1)]
    assert seeds == [0, 1]
    results.add("nothing", "an array", "one seed per task")


def test_doctor_runs_as_a_job_on_both_nodes(cluster, tmp_path, results):
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
    results.add("nothing", "doctor", "both nodes are fit to train")


@pytest.mark.parametrize("script", ["slurm.sbatch", "elastic.sbatch"])
def test_a_cancelled_job_leaves_no_process(script, cluster, tmp_path, results):
    run_dir = tmp_path / "run"
    job = train(cluster, run_dir, words=[*WORDS, "epochs=4000"], script=script)
    cluster.wait_for(lambda: step_of(run_dir) >= 8, "step 8")
    cluster.run("scancel", str(job))
    cluster.wait_for_state(job, "CANCELLED")
    cluster.wait_for(lambda: not cluster.processes(), "no process on the nodes")
    results.add("scancel", "step" if script == "slurm.sbatch" else "elastic job", "no process is left")


# --- elastic jobs -------------------------------------------------------------------------------------------------

SLOW_WORDS = [*WORDS, "model.name=tests.cluster.slow_network:SlowLeNet", "epochs=30"]


@pytest.fixture(scope="module")
def slow_undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the training of the elastic jobs, in one process without SLURM."""
    return train_undisturbed(tmp_path_factory.mktemp("slow_undisturbed") / "run", SLOW_WORDS)


def history_of(run_dir: Path) -> list[tuple[int, str]]:
    """Number of processes and cause of each world of a run."""
    file = run_dir / "world.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [(each["processes"], each["cause"]) for each in found]


def wait_for_both_nodes(cluster: Cluster, run_dir: Path, step: int) -> None:
    """Waits until both nodes train and a step is reached. A node that starts 3 s after the other joins it."""
    cluster.wait_for(lambda: history_of(run_dir) and history_of(run_dir)[-1][0] == 2, "a world of two nodes")
    cluster.wait_for(lambda: step_of(run_dir) >= step, f"step {step}")


def train_slowly(cluster: Cluster, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, Path]:
    """Submits an elastic job on one or two nodes; returns its number, and the file without which it is fast."""
    slow = run_dir.with_suffix(".slow")
    slow.touch()
    monkeypatch.setenv("SLOW_WHILE", str(slow))
    job = train(cluster, run_dir, "--nodes=1-2", words=SLOW_WORDS, script="elastic.sbatch")
    wait_for_both_nodes(cluster, run_dir, step=12)
    return job, slow


def test_an_elastic_job_goes_on_without_a_dead_node_and_another_job_joins_it(
    cluster, slow_undisturbed, tmp_path, results, monkeypatch
):
    """SLURM does not give a node back to the job that it was in. A second job on that node joins the run."""
    run_dir, log = tmp_path / "run", tmp_path / "run.log"
    job, slow = train_slowly(cluster, run_dir, monkeypatch)
    cluster.kill_node("n1")
    died = time.monotonic()
    cluster.wait_for(lambda: history_of(run_dir)[-1] == (1, "processes lost"), "n0 goes on alone")
    seconds = time.monotonic() - died
    cluster.wait_for(lambda: cluster.state(job)["NodeList"] == "n0", "SLURM removes n1 from the job")
    cluster.start_node("n1")
    [command] = re.findall(r"(?m)^another node joins with: (.*)$", log.read_text())
    options = ("--nodes=1", "--nodelist=n1", "--wrap", command)
    second = submit(cluster, tmp_path / "second.log", options=options)
    cluster.wait_for(lambda: history_of(run_dir)[-1] == (2, "processes joined"), "n1 joins")
    slow.unlink()
    for each in (job, second):
        facts = cluster.wait_for_state(each, "COMPLETED", "FAILED")
        assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "0"), log.read_text()[-3000:]
    assert_same(run_dir, slow_undisturbed, log)
    results.add("a node dies", "elastic job", f"the other goes on after {seconds:.0f} s, the same bytes")
    results.add("a job on the returned node", "elastic job", "joins, the same bytes")


def test_an_elastic_job_is_requeued_by_another_node_if_its_first_node_dies(
    cluster, slow_undisturbed, tmp_path, results, monkeypatch
):
    """The first node runs the batch script and holds the rendezvous. The requeued job starts on the other one alone."""
    run_dir, log = tmp_path / "run", tmp_path / "run.log"
    job, slow = train_slowly(cluster, run_dir, monkeypatch)
    cluster.run("scancel", "--batch", "--signal=USR1", str(job))
    cluster.wait_for(
        lambda: any(cause == "resumed after a stop" for _, cause in history_of(run_dir)), "the stopped job resumes"
    )
    wait_for_both_nodes(cluster, run_dir, step=step_of(run_dir) + 8)
    cluster.kill_node("n0")
    cluster.wait_for(lambda: cluster.state(job).get("Restarts") == "2", "n1 requeues the job")
    slow.unlink()
    facts = cluster.wait_for_state(job, "COMPLETED", "FAILED")
    cluster.start_node("n0")
    assert facts["JobState"] == "COMPLETED", log.read_text()[-3000:]
    assert [number for number, _ in history_of(run_dir)][-2:] == [2, 1]
    assert_same(run_dir, slow_undisturbed, log)
    results.add("SIGUSR1 to the job", "elastic job", "requeued, the same bytes")
    results.add("the first node dies", "elastic job", "requeued by the other, the same bytes")
