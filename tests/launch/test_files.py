"""Configuration files of launchers: accelerate, Kubeflow, W&B sweeps and SkyPilot accept them."""

from __future__ import annotations

import copy

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

from mnist_dist.train import main
from tests.launch.launching import LAUNCH, TRAINJOB, environment, executable, launch

CONFIGS = sorted((LAUNCH / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_accepts(file):
    config = load_config_from_file(str(file))
    assert config.mixed_precision == "no"
    arguments = launch_command_parser().parse_args(["train.py"])
    unknown = {f"--{key}" for key in config.fsdp_config if not hasattr(arguments, key)}
    assert not unknown


def test_there_is_a_file_for_every_kind_of_launch():
    assert [file.stem for file in CONFIGS] == ["cpu", "fsdp2", "multi_gpu", "multi_node", "single_gpu"]


def test_trainjob_follows_the_published_schema():
    from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob  # generated from the CRD by its authors

    # The models drop unknown keys and refuse wrong types.
    assert TrainerV1alpha1TrainJob.from_dict(TRAINJOB).to_dict() == TRAINJOB
    misspelt = copy.deepcopy(TRAINJOB)
    misspelt["spec"]["trainer"]["numNode"] = 2
    assert TrainerV1alpha1TrainJob.from_dict(misspelt).to_dict() != misspelt
    assert (TRAINJOB["apiVersion"], TRAINJOB["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")


def test_the_trainjob_of_doctor_follows_the_schema_and_starts_the_command():
    from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob

    from mnist_dist.cli import parse

    job = yaml.safe_load((LAUNCH / "kubernetes" / "doctor.yaml").read_text())
    assert TrainerV1alpha1TrainJob.from_dict(job).to_dict() == job
    trainer, [patch] = job["spec"]["trainer"], job["spec"]["runtimePatches"]
    assert trainer["command"] == ["torchrun"] and trainer["args"][:2] == ["-m", "mnist_dist.doctor"]
    words = parse("doctor", trainer["args"][2:])
    assert words.world_size == trainer["numNodes"] * trainer["numProcPerNode"]
    [node] = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    mounted = {mount["mountPath"]: mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert str(words.run_dir) in mounted and words.json.parent == words.run_dir
    [shared] = [volume for volume in pod["volumes"] if volume["name"] == mounted["/dev/shm"]]
    assert shared["emptyDir"]["medium"] == "Memory"


def test_trainjob_has_time_to_save_and_shared_memory():
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
    nodes, each = trainer["numNodes"], trainer["numProcPerNode"]
    assert f"--nnodes=1:{nodes}" in trainer["args"] and f"--world-size={each}:{nodes * each}" in trainer["args"]
    assert_resolves(trainer["args"][trainer["args"].index("mnist_dist.train") + 1 :])


def test_sweep_passes_the_chosen_values_as_overrides():
    sweep = yaml.safe_load((LAUNCH / "sweep.yaml").read_text())
    chosen = [f"{key}={space.get('min') or space['values'][0]}" for key, space in sweep["parameters"].items()]
    words = [word for entry in sweep["command"] for word in (chosen if entry == "${args_no_hyphens}" else [entry])]
    assert words[:4] == ["${env}", "python", "-m", "${program}"] and sweep["program"] == "mnist_dist.train"
    assert_resolves(words[4:])


def test_skypilot_starts_torchrun_with_the_world_size(tmp_path):
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
    """Checks that the trainer accepts these arguments."""
    assert main([*words, "--print-recipe"]) == 0
