"""FSDP2 through launch/accelerate/fsdp2.yaml: the run of one process, and checkpoints in shards that both can read."""

from __future__ import annotations

import errno
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mnist_dist import load_recipe, load_run, train
from mnist_dist.engine.checkpoint import list_checkpoints
from mnist_dist.errors import RecipeError
from mnist_dist.run.build import check_world
from mnist_dist.run.folder import RunFolder
from tests.launch.launching import LAUNCH, OVERRIDES, WORDS, launch, losses
from tests.processes import free_port, rank_variables, run_in_each, run_ranks

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_MIN_NUM_PARAMS": "1000"}
"""Variables that `accelerate launch` sets for the processes."""

# Two processes evaluate three batches. The momentum shows whether the optimizer's state is restored.
MORE = ["optimizer.momentum=0.9", "clip_grad_norm=1", "data.limit_test=150", "eval_batch_size=64"]
MORE += ["checkpoint.every_steps=4", "checkpoint.keep=9", "data.limit_train=null"]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    """The run folder of two processes that `accelerate launch` has started."""
    folder = tmp_path_factory.mktemp("fsdp2") / "sharded"
    launcher = ["python", "-m", "accelerate.commands.launch", "--quiet", "--num_processes", "2"]
    launcher += ["--config_file", LAUNCH / "accelerate" / "fsdp2.yaml", "--fsdp_min_num_params", "1000"]
    launcher += ["-m", "mnist_dist.train"]
    output = launch(*launcher, "--world-size", "2", *WORDS, *MORE, "--run-dir", folder)
    assert "FSDP2" in output
    return folder


def test_sharded_parameters_give_the_run_of_one_process_and_its_checkpoints(sharded, tmp_path):
    recipe = load_recipe("lenet5", *OVERRIDES, *MORE)
    train(recipe, tmp_path / "one process")
    checkpoint = tmp_path / "one process" / "checkpoints" / "step-4"

    resume = ["--run-dir", tmp_path / "sharded from one process", "--resume", checkpoint]
    command = [sys.executable, "-m", "mnist_dist.train", *WORDS, *MORE, *resume]
    assert "FSDP2" in run_ranks(2, command, env=os.environ | FSDP2)[0].stdout

    train(recipe, tmp_path / "one process from sharded", resume=str(sharded / "checkpoints" / "step-4"))

    expected = load_run(tmp_path / "one process")
    for folder in (sharded, tmp_path / "sharded from one process", tmp_path / "one process from sharded"):
        assert losses(folder) == pytest.approx(losses(tmp_path / "one process"), rel=1e-6)
        found = load_run(folder).model.state_dict()
        for key, value in expected.model.state_dict().items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6)


# --- shards -------------------------------------------------------------------------------------------------------

DISTURBED = """
import errno, os, signal, sys
from mnist_dist import errors
from mnist_dist.cli import run_command
from mnist_dist.engine import shards
from mnist_dist.run import checkpointing
from mnist_dist.train import main

what, rank = os.environ["WHAT"], os.environ["RANK"]
write, save = shards.write_flushed, checkpointing.save_checkpoint

def write_flushed(path, content):
    if "step-8" in str(path) and rank == "1" and what == "kill before the shard":
        os.kill(os.getpid(), signal.SIGKILL)
    if "step-8" in str(path) and rank == "1" and what == "full disk":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    write(path, content)

def save_checkpoint(folder, step, *rest, **options):
    if step == 8 and what == "kill before the publication":
        os.kill(os.getpid(), signal.SIGKILL)
    if step == 8 and what == "other disk":
        (folder / ".step-8.staged" / "shard-00001.safetensors").unlink()
    save(folder, step, *rest, **options)

shards.write_flushed, checkpointing.save_checkpoint = write_flushed, save_checkpoint
errors.RANK_0_SECONDS = 0.0
sys.exit(run_command(lambda: main(sys.argv[1:])))
"""


def run_disturbed(what: str, folder: Path, script: Path) -> list:
    """Runs two processes that are disturbed while they save step 8; returns how they ended."""
    script.write_text(DISTURBED)
    port, base = free_port(), os.environ | FSDP2 | {"ACCELERATE_USE_CPU": "true", "WHAT": what}
    variables = [base | rank_variables(rank, 2, port) for rank in range(2)]
    return run_in_each(variables, [sys.executable, script, *WORDS, *MORE, "--run-dir", folder])


@pytest.mark.parametrize(
    ("what", "killed", "staged"), [("kill before the publication", 0, {0, 1}), ("kill before the shard", 1, {0})]
)
def test_a_run_killed_before_its_shards_are_published_resumes_to_the_same_bytes(
    what, killed, staged, sharded, tmp_path
):
    folder = RunFolder(tmp_path / "run")
    done = run_disturbed(what, folder.path, tmp_path / "disturbed.py")
    assert done[killed].returncode == -signal.SIGKILL and done[1 - killed].returncode > 0
    assert [path.name for path in list_checkpoints(folder.checkpoints)] == ["step-4"]
    left = {path.name for path in (folder.checkpoints / ".step-8.staged").glob("*")}
    assert left <= {f"shard-{rank:05}.safetensors" for rank in staged}
    assert killed or len(left) == 2  # otherwise rank 0 may have removed its file

    command = [sys.executable, "-m", "mnist_dist.train", *WORDS, *MORE, "--run-dir", folder.path]
    assert "resumed" in run_ranks(2, command, env=os.environ | FSDP2)[0].stdout
    for name in ("last.safetensors", "best.safetensors"):
        assert (folder.path / name).read_bytes() == (sharded / name).read_bytes()
    shards = {path.relative_to(sharded): path.read_bytes() for path in sharded.glob("checkpoints/step-*/shard-*")}
    assert len(shards) == 6
    assert all((folder.path / name).read_bytes() == content for name, content in shards.items())
    assert not list(folder.checkpoints.glob(".*"))


@pytest.mark.parametrize(("what", "words"), [("full disk", os.strerror(errno.ENOSPC)), ("other disk", "shared disk")])
def test_a_shard_that_is_not_written_ends_all_ranks_and_leaves_the_earlier_checkpoint(what, words, tmp_path):
    folder = RunFolder(tmp_path / "run")
    done = run_disturbed(what, folder.path, tmp_path / "disturbed.py")
    assert [each.returncode for each in done] == [1, 1]
    for each in done:
        assert words in each.stderr and "shard-00001.safetensors" in each.stderr and "Traceback" not in each.stderr
    assert [path.name for path in list_checkpoints(folder.checkpoints)] == ["step-4"]
    assert not list(folder.checkpoints.glob(".*"))
    assert folder.status.read_text() == "failed\n"


def test_a_run_folder_that_a_rank_does_not_see_is_refused_before_the_training(tmp_path):
    source = "import os, runpy; from mnist_dist import errors; errors.RANK_0_SECONDS = 0.0; "
    source += "os.chdir(os.environ['RANK']); runpy.run_module('mnist_dist.train', run_name='__main__')"
    for rank in "01":
        (tmp_path / rank).mkdir()
    port, base = free_port(), os.environ | FSDP2 | {"ACCELERATE_USE_CPU": "true"}
    variables = [base | rank_variables(rank, 2, port) for rank in range(2)]
    command = [sys.executable, "-c", source, *WORDS, *MORE, "--run-dir", "run"]
    done = run_in_each(variables, command, cwd=tmp_path)
    assert [each.returncode for each in done] == [2, 2]
    assert "--run-dir" in done[0].stderr and "Traceback" not in done[0].stderr + done[1].stderr
    assert not (tmp_path / "0" / "run" / "checkpoints").exists()


def test_settings_that_need_unsharded_parameters_are_refused(monkeypatch, refused):
    for name, value in FSDP2.items():
        monkeypatch.setenv(name, value)
    two = SimpleNamespace(num_processes=2)
    keys = {"ema_decay": "0.9", "logical_shards": "2", "micro_batch_size": "8", "mixed_precision": "fp16"}
    recipe = load_recipe("lenet5", *(f"{key}={value}" for key, value in keys.items()))
    with pytest.raises(RecipeError) as found:
        check_world(recipe, two)
    assert {problem.key for problem in found.value.problems} == set(keys)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")  # the precision may come from the launcher, too
    with pytest.raises(RecipeError) as found:
        check_world(load_recipe("lenet5"), two)
    assert [problem.key for problem in found.value.problems] == ["mixed_precision"]
    monkeypatch.setenv("FSDP_VERSION", "1")
    assert refused(lambda: check_world(recipe, two)) == [("FSDP_VERSION", "unsupported")]
