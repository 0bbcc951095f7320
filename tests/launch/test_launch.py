"""The scripts and files of launch/: every launcher starts the world it promises, and the run is the same in each."""

from __future__ import annotations

import copy
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

from mnist_dist import load_recipe, load_run, train
from mnist_dist.errors import RecipeError
from mnist_dist.run.build import check_world
from mnist_dist.train import main

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
CONFIGS = sorted((LAUNCH / "accelerate").glob("*.yaml"))
TRAINJOB = yaml.safe_load((LAUNCH / "kubernetes" / "trainjob.yaml").read_text())

# SGD, as Adam makes much of the last bits of a gradient near 0, and these differ between world sizes.
OVERRIDES = [
    *("data.dataset=synthetic", "batch_size=64", "max_steps=10", "log_every=1", "tracking.wandb.mode=disabled"),
    *("optimizer.name=sgd", "optimizer.lr=0.05"),
]
WORDS = ["--recipe", "lenet5", *OVERRIDES]


def environment(*first_in_path: Path, **variables: str) -> dict[str, str]:
    """Threads, device and programs of the tests; nothing of a launcher that may run the tests themselves."""
    path = [*map(str, first_in_path), str(Path(sys.executable).parent), os.environ["PATH"]]
    ours = {"PATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return os.environ | ours | variables


@contextmanager
def started(*command: str | Path, **variables: str) -> Iterator[subprocess.Popen]:
    """Runs a command; when a test fails before it ends, it goes by SIGTERM, so that its workers go too."""
    process = subprocess.Popen(
        list(map(str, command)),
        env=environment() | variables,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.communicate(timeout=20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def finish(process: subprocess.Popen, expected: int = 0) -> str:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == expected, f"exit code {process.returncode}\n{output}"
    return output


def launch(*command: str | Path, **variables: str) -> str:
    with started(*command, **variables) as process:
        return finish(process)


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def metrics(run_dir: Path) -> list[dict]:
    """metrics.jsonl without times."""
    return [
        {key: value for key, value in line.items() if key != "train/images_per_second"}
        for line in load_run(run_dir).metrics
    ]


def losses(run_dir: Path) -> list[float]:
    return [line.get("train/loss", line.get("eval/loss")) for line in load_run(run_dir).metrics]


@pytest.fixture
def alone(tmp_path) -> list[float]:
    """The losses of one process without any launcher."""
    train(load_recipe("lenet5", *OVERRIDES), tmp_path / "alone")
    found = losses(tmp_path / "alone")
    assert max(found) - min(found) > 0.01, "a run that learns nothing shows nothing"
    return found


# --- the scripts ----------------------------------------------------------------------------------------------------


def test_shellcheck_finds_nothing():
    scripts = [*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch", ROOT / ".ci" / "run"]
    assert len(scripts) >= 6
    done = subprocess.run(["shellcheck", *scripts], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("script", ["cpu.sh", "multi_node.sh", "slurm.sbatch"])
def test_a_script_without_words_says_how_it_is_called(script):
    done = subprocess.run(["bash", LAUNCH / script], env=environment(), capture_output=True, text=True)
    assert done.returncode != 0
    assert f"launch/{script}" in done.stderr and "--recipe NAME" in done.stderr


def test_cpu_sh_is_the_run_of_one_process(tmp_path, alone):
    launch(LAUNCH / "cpu.sh", "2", "1", *WORDS, "--run-dir", tmp_path / "run")
    assert load_run(tmp_path / "run").summary["world_size"] == 2
    assert losses(tmp_path / "run") == pytest.approx(alone, rel=1e-6)


def test_sharded_parameters_give_the_run_of_one_process_and_its_checkpoints(tmp_path):
    # Three batches are evaluated by two processes; the momentum shows whether the optimizer's state was taken over.
    words = ["optimizer.momentum=0.9", "clip_grad_norm=1", "data.limit_test=150", "eval_batch_size=64"]
    words += ["checkpoint.every_steps=4", "checkpoint.keep=9"]
    recipe = load_recipe("lenet5", *OVERRIDES, *words)
    train(recipe, tmp_path / "whole")

    def launch_sharded(name: str, *more: str | Path) -> None:
        launcher = ["accelerate", "launch", "--quiet", "--config_file", LAUNCH / "accelerate" / "fsdp2.yaml"]
        launcher += ["--num_processes", "2", "--fsdp_min_num_params", "1000", "-m", "mnist_dist.train"]
        output = launch(*launcher, "--world-size", "2", *WORDS, *words, "--run-dir", tmp_path / name, *more)
        assert "FSDP2" in output

    launch_sharded("sharded")
    launch_sharded("from whole", "--resume", tmp_path / "whole" / "checkpoints" / "step-4")
    train(recipe, tmp_path / "from sharded", resume=str(tmp_path / "sharded" / "checkpoints" / "step-4"))
    for name in ("sharded", "from whole", "from sharded"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "whole"), rel=1e-6)
        ours, theirs = (load_run(tmp_path / run).model.state_dict() for run in (name, "whole"))
        for key, value in theirs.items():
            torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-6)


def test_what_needs_whole_parameters_is_refused_where_they_are_sharded(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    keys = {"ema_decay": "0.9", "logical_shards": "2", "micro_batch_size": "8", "mixed_precision": "fp16"}
    recipe = load_recipe("lenet5", *(f"{key}={value}" for key, value in keys.items()))
    with pytest.raises(RecipeError) as caught:
        check_world(recipe, SimpleNamespace(num_processes=2))
    assert {problem.key for problem in caught.value.problems} == set(keys)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")  # the launcher's wish is no other one
    with pytest.raises(RecipeError, match="fp16 cannot be had with FSDP"):
        check_world(load_recipe("lenet5"), SimpleNamespace(num_processes=2))
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(RecipeError, match="FSDP's first version"):
        check_world(recipe, SimpleNamespace(num_processes=2))


STARTS_FOUR = {
    "local.sh": ([], "multi_gpu"),
    "cpu.sh": (["4"], "cpu"),
    "multi_node.sh": (["a:1", "2", "2"], "multi_node"),
}


@pytest.mark.parametrize("script", STARTS_FOUR)
def test_a_launcher_gets_an_explicit_file_and_the_trainer_the_world_it_starts(script, tmp_path):
    executable(tmp_path / "python", "#!/bin/sh\necho 4\n")  # says that torch sees four GPUs
    executable(tmp_path / "accelerate", '#!/bin/sh\nshift; printf "%s\\n" "$@"\n')
    (first, config), path = STARTS_FOUR[script], environment(tmp_path)["PATH"]
    words = launch(LAUNCH / script, *first, "--recipe", "lenet5", "model.name=a b", PATH=path).splitlines()
    arguments = launch_command_parser().parse_args(words)
    assert Path(arguments.config_file) == LAUNCH / "accelerate" / f"{config}.yaml"
    assert (arguments.num_processes, arguments.training_script, arguments.quiet) == (4, "mnist_dist.train", True)
    assert arguments.training_script_args == ["--world-size", "4", "--recipe", "lenet5", "model.name=a b"]


@pytest.mark.parametrize(("cores", "processes"), [(3, 3), (64, 8)])
def test_cpu_sh_starts_a_process_a_core_unless_told(cores, processes, tmp_path):
    executable(tmp_path / "nproc", f"#!/bin/sh\necho {cores}\n")
    executable(tmp_path / "accelerate", '#!/bin/sh\nshift; printf "%s\\n" "$@"\n')
    words = launch(LAUNCH / "cpu.sh", "--recipe", "lenet5", PATH=environment(tmp_path)["PATH"]).splitlines()
    arguments = launch_command_parser().parse_args(words)
    assert arguments.num_processes == processes
    assert arguments.training_script_args == ["--world-size", str(processes), "--recipe", "lenet5"]


@pytest.mark.parametrize("script", [["local.sh"], ["cpu.sh", "1"]], ids=lambda words: words[0])
def test_one_process_needs_no_launcher(script, tmp_path):
    # Says that torch sees no GPU, or with which words it was called.
    executable(tmp_path / "python", '#!/bin/sh\n[ "$1" = -c ] && echo 0 || printf "%s\\n" "$@"\n')
    path = environment(tmp_path)["PATH"]
    words = launch(LAUNCH / script[0], *script[1:], "--recipe", "lenet5", "epochs=1", PATH=path).splitlines()
    assert words == ["-m", "mnist_dist.train", "--world-size", "1", "--recipe", "lenet5", "epochs=1"]


# --- two machines ---------------------------------------------------------------------------------------------------

BECOME = "import os, socket, sys; socket.sethostname(sys.argv[1]); os.execvp(sys.argv[2], sys.argv[2:])"


def test_reproduce_trains_what_is_missing_teachers_first_and_writes_the_table(tmp_path):
    small = "model: {name: lenet5}\ndata: {dataset: synthetic, limit_train: 64, limit_test: 20}\nbatch_size: 32\n"
    small += "tracking: {wandb: {mode: disabled}}\n"
    (tmp_path / "teacher").write_text(small)
    (tmp_path / "pupil").write_text(small + "distill: {from: [runs/reproduce/teacher-seed1]}\n")

    def reproduce(*words: str) -> str:
        command = [LAUNCH / "reproduce.sh", *words]
        settings = environment(SEEDS="3")
        result = subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout

    assert "pupil" in reproduce("pupil", "epochs=2")
    folder = tmp_path / "runs" / "reproduce"
    made = {"teacher-seed1", "pupil-seed3-epochs=2"}
    assert {path.name for path in folder.iterdir()} == {*made, "results.md"}
    table = (folder / "results.md").read_text()
    assert re.search(r"\| pupil \|.* 1 \| 2 \|", table)
    assert re.search(r"\| teacher \|.* 1 \| 1 \|", table)
    before = {name: (folder / name / "summary.json").stat().st_mtime_ns for name in made}
    reproduce("pupil", "epochs=2")
    assert before == {name: (folder / name / "summary.json").stat().st_mtime_ns for name in made}, "trained again"


def test_reproduce_without_words_takes_every_recipe_of_the_table(tmp_path):
    (tmp_path / "configs").mkdir()
    shutil.copy(ROOT / "configs" / "results.jsonl", tmp_path / "configs")
    executable(tmp_path / "bin" / "python", '#!/bin/sh\necho "$@" >> calls\n')
    settings = environment(tmp_path / "bin", SEEDS="7")
    done = subprocess.run([LAUNCH / "reproduce.sh"], cwd=tmp_path, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    trained = set(re.findall(r"--recipe (\S.*?) --run-dir", (tmp_path / "calls").read_text()))
    assert {"ms_ran", "resnet152", "plus_8k"} <= trained <= {path.stem for path in (ROOT / "configs").rglob("*.yaml")}


@pytest.fixture
def machines() -> Iterator[dict[str, str]]:
    """Two machines with a cable between them, host name -> network namespace; they see nothing else."""
    if not shutil.which("ip"):
        pytest.skip("two machines need network namespaces: there is no `ip` here (iproute2)")
    names = {name: f"{name}-{os.getpid()}" for name in ("alice", "bob")}

    def ip(*words: str, check: bool = True) -> subprocess.CompletedProcess:
        return subprocess.run(["ip", *words], check=check, capture_output=True, text=True)

    try:
        for namespace in names.values():
            made = ip("netns", "add", namespace, check=False)
            if made.returncode:
                pytest.skip(f"two machines need network namespaces: `ip netns add` says {made.stderr.strip()}")
            hosts = Path("/etc/netns") / namespace / "hosts"  # `ip netns exec` puts it over /etc/hosts
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


def test_two_machines_run_the_same_line_and_are_one_world(tmp_path, machines, alone):
    line = [LAUNCH / "multi_node.sh", "alice:29500", "2", "2", *WORDS, "--run-dir", tmp_path / "together"]

    def on(machine: str):
        become = ["ip", "netns", "exec", machines[machine], "unshare", "--uts", sys.executable, "-c", BECOME, machine]
        return started(*become, *line, GLOO_SOCKET_IFNAME="eth0")

    with on("bob") as second, on("alice") as first:
        finish(first)
        finish(second)
    assert load_run(tmp_path / "together").summary["world_size"] == 4
    assert losses(tmp_path / "together") == pytest.approx(alone, rel=1e-6)


# --- SLURM ----------------------------------------------------------------------------------------------------------

# What the script relies on: srun hands USR1 to its task, and at TERM kills it; when the task is gone, so is the step.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
"$@" &
task=$!
trap 'kill -USR1 "$task"' USR1
trap 'kill -KILL "$task"' TERM
while kill -0 "$task" 2>/dev/null; do wait "$task"; code=$?; done
exit "$code"
"""
SCONTROL = """#!/usr/bin/env bash
case $1 in show) echo localhost ;; *) echo "$@" >>"$CALLS" ;; esac
"""


def run_trainjob(run_dir: Path, *words: str) -> None:
    """The TrainJob's line in one pod of two processes, as Kubeflow's torch plugin starts it."""
    plugin = {"PET_NNODES": "1", "PET_NPROC_PER_NODE": "2", "PET_NODE_RANK": "0", "PET_STANDALONE": "1"}
    trainer = TRAINJOB["spec"]["trainer"]
    # Of words given twice the last counts.
    launch(*trainer["command"], *trainer["args"], "data.root=null", *words, "--run-dir", run_dir, **plugin)


def test_sbatch_is_preempted_requeued_and_ends_as_an_undisturbed_trainjob_does(tmp_path):
    # Long enough for a signal to find the run in the middle.
    words = [*WORDS, "max_steps=300", "epochs=10", "data.limit_train=2048", "data.limit_test=128"]
    run_trainjob(tmp_path / "undisturbed", *words)

    executable(tmp_path / "bin" / "srun", SRUN)
    executable(tmp_path / "bin" / "scontrol", SCONTROL)
    slurm = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_NUM_NODES": "1"}
    slurm |= {"SLURM_GPUS_ON_NODE": "2", "CALLS": str(tmp_path / "calls")}
    slurm["PATH"] = environment(tmp_path / "bin")["PATH"]
    run_dir = tmp_path / "run"
    job = ["bash", LAUNCH / "slurm.sbatch", run_dir, *words]

    with started(*job, **slurm) as process:
        wait_for_step(run_dir, 10, process)
        process.send_signal(signal.SIGUSR1)
        finish(process, expected=75)
    assert (run_dir / "STATUS").read_text() == "preempted\n"
    assert (tmp_path / "calls").read_text() == f"requeue {slurm['SLURM_JOB_ID']}\n"
    assert len(metrics(run_dir)) < len(metrics(tmp_path / "undisturbed"))

    output = launch(*job, **slurm)  # the requeued job
    assert "resumed from the checkpoint at step" in output
    assert (run_dir / "STATUS").read_text() == "done\n"
    assert (tmp_path / "calls").read_text().count("requeue") == 1
    assert metrics(run_dir) == metrics(tmp_path / "undisturbed")
    assert (run_dir / "last.safetensors").read_bytes() == (tmp_path / "undisturbed" / "last.safetensors").read_bytes()


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen) -> None:
    """Until metrics.jsonl has a line for each step up to that one."""
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        file = run_dir / "metrics.jsonl"
        if file.is_file() and file.read_bytes().count(b"\n") >= step:
            return
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached:\n{process.stdout.read() if process.poll() else ''}")


def test_sbatch_asks_slurm_to_requeue_and_to_warn():
    head, _, _ = (LAUNCH / "slurm.sbatch").read_text().partition("\nset ")  # SLURM reads no option after a command
    asked = set(re.findall(r"(?m)^#SBATCH (\S+)$", head))
    assert {"--requeue", "--open-mode=append", "--signal=B:USR1@120", "--ntasks-per-node=1"} <= asked


def test_sbatch_requeues_no_run_that_broke(tmp_path):
    executable(tmp_path / "srun", "#!/bin/sh\nexit 3\n")
    executable(tmp_path / "scontrol", SCONTROL)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "STATUS").write_text("preempted\n")  # left by an earlier start of the job
    slurm = {"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "a", "SLURM_JOB_NUM_NODES": "1", "CALLS": str(tmp_path / "c")}
    with started(
        *("bash", LAUNCH / "slurm.sbatch", tmp_path / "run", *WORDS), PATH=environment(tmp_path)["PATH"], **slurm
    ) as process:
        finish(process, expected=3)
    assert not (tmp_path / "c").exists()


# --- files that others read -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_accepts(file):
    config = load_config_from_file(str(file))
    assert config.mixed_precision == "no"
    arguments = launch_command_parser().parse_args(["train.py"])
    unknown = {f"--{key}" for key in config.fsdp_config if not hasattr(arguments, key)}
    assert not unknown


def test_there_is_a_file_for_every_kind_of_world():
    assert [file.stem for file in CONFIGS] == ["cpu", "fsdp2", "multi_gpu", "multi_node", "single_gpu"]


def test_trainjob_follows_the_published_schema():
    from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob  # generated by its makers from the CRD

    # The models leave out what they do not know, and refuse a wrong type.
    assert TrainerV1alpha1TrainJob.from_dict(TRAINJOB).to_dict() == TRAINJOB
    misspelt = copy.deepcopy(TRAINJOB)
    misspelt["spec"]["trainer"]["numNode"] = 2
    assert TrainerV1alpha1TrainJob.from_dict(misspelt).to_dict() != misspelt
    assert (TRAINJOB["apiVersion"], TRAINJOB["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")


def test_trainjob_saves_in_time_and_has_shared_memory():
    trainer = TRAINJOB["spec"]["trainer"]
    [patch] = TRAINJOB["spec"]["runtimePatches"]
    [node] = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    variables = {each["name"]: each for each in trainer["env"]}
    assert pod["terminationGracePeriodSeconds"] > int(variables["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]["value"])
    assert "secretKeyRef" in variables["WANDB_API_KEY"]["valueFrom"]
    [container] = pod["containers"]
    mounted = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    [shared] = [volume for volume in pod["volumes"] if volume["name"] == mounted["/dev/shm"]]
    assert shared["emptyDir"]["medium"] == "Memory"
    assert f"--world-size={trainer['numNodes'] * trainer['numProcPerNode']}" in trainer["args"]
    assert_resolves(trainer["args"][2:])


def test_sweep_passes_its_choice_as_overrides():
    sweep = yaml.safe_load((LAUNCH / "sweep.yaml").read_text())
    choice = [f"{key}={space.get('min') or space['values'][0]}" for key, space in sweep["parameters"].items()]
    words = [word for entry in sweep["command"] for word in (choice if entry == "${args_no_hyphens}" else [entry])]
    assert words[:4] == ["${env}", "python", "-m", "${program}"] and sweep["program"] == "mnist_dist.train"
    assert_resolves(words[4:])


def test_skypilot_starts_torchrun_with_the_whole_world(tmp_path):
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    executable(tmp_path / "torchrun", '#!/bin/sh\nprintf "%s\\n" "$@"\n')
    variables = {"SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_TASK_ID": "sky-7"}
    variables |= {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "4", **task["envs"]}
    words = launch("bash", "-euc", task["run"], PATH=environment(tmp_path)["PATH"], **variables).splitlines()
    options, trainer = words[: words.index("-m")], words[words.index("-m") + 2 :]
    assert options[options.index("--master_addr") + 1] == "10.0.0.7"
    assert trainer[:2] == ["--world-size", "8"]
    assert trainer[-1].startswith("/runs/") and "/runs" in task["file_mounts"]
    assert_resolves(trainer)


def assert_resolves(words: list[str]) -> None:
    """The trainer takes these words."""
    assert main([*words, "--print-recipe"]) == 0
