"""Runs launch/gpu_report.sh with a replacement for `python` that only writes its arguments to a file."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PYTHON = """#!/usr/bin/env bash
echo "$*" >>"$CALLS"
for word in "$@"; do
    case $word in *.json) case "$*" in *--floors*) ;; *) echo '{}' >"${word#--json=}" ;; esac ;; esac
done
case "$*" in *$FAILS*) exit 3 ;; esac
"""


def report(tmp_path: Path, *words: str | Path, fails: str = "nothing") -> subprocess.CompletedProcess[str]:
    """Runs the script. The replacement for `python` fails if its arguments contain `fails`."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    (tmp_path / "bin" / "python").write_text(PYTHON)
    (tmp_path / "bin" / "python").chmod(0o755)
    variables = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls"), "FAILS": fails}
    command = ["bash", ROOT / "launch" / "gpu_report.sh", *words]
    return subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=60, cwd=tmp_path)


def test_the_report_has_every_part(tmp_path):
    done = report(tmp_path, "out", "mixed_precision=bf16")
    assert done.returncode == 0, done.stdout + done.stderr
    calls = (tmp_path / "calls").read_text()
    for recipe in ("model_v1_onecycle", "ms_ran", "resnet18", "resnet50"):
        assert f"--recipe {recipe} --rounds" in calls
        assert (tmp_path / "out" / f"speed_{recipe}.json").is_file()
    for words in (
        "tests/engine/test_cuda_graph.py",
        "--time-to-accuracy configs/speed/mnist_99.yaml --seeds 30",
        "--inference",
        "doctor",
    ):
        assert words in calls
    # 4 recipes, 3 times to accuracy and one of them again with another capture, inference of 2 networks
    assert calls.count("mixed_precision=bf16") == 10
    assert "0 part(s) failed" in (tmp_path / "out" / "summary.txt").read_text()


def test_several_gpus_are_tested_and_measured_together(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvidia-smi").write_text('#!/usr/bin/env bash\nprintf "GPU 0: x\\nGPU 1: x\\nGPU 2: x\\n"\n')
    (tmp_path / "bin" / "nvidia-smi").chmod(0o755)
    done = report(tmp_path, "out")
    assert done.returncode == 0, done.stdout + done.stderr
    calls = (tmp_path / "calls").read_text()
    assert "tests/distributed/test_gradients.py" in calls
    for recipe in ("model_v1_onecycle", "ms_ran", "resnet50"):
        assert f"--nproc_per_node 3 -m mnist_dist.benchmark --recipe {recipe} --rounds" in calls
        assert (tmp_path / "out" / f"several_gpus_{recipe}.json").is_file()


def test_the_report_continues_after_a_part_that_fails_and_names_it(tmp_path):
    done = report(tmp_path, "--rehearse", "out", fails="--time-to-accuracy")
    assert done.returncode == 1
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert summary.count("FAILED") == 4 and "4 part(s) failed" in summary
    assert "time_to_accuracy_mnist_99_5" in summary and "ok" in summary.split("floors")[1]
    assert "resnet18" not in (tmp_path / "calls").read_text()


@pytest.mark.parametrize("words", [["--help"], ["--rehearse", "--no"]])
def test_an_unknown_option_is_not_used_as_a_folder(words, tmp_path):
    done = report(tmp_path, *words)
    assert done.returncode == 2 and "launch/gpu_report.sh [--rehearse]" in done.stderr
    assert not (tmp_path / "calls").exists()


def test_the_report_overwrites_nothing(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("mine")
    done = report(tmp_path, "mine")
    assert done.returncode == 2 and "mine" in done.stderr
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["README.md"]
    assert not (tmp_path / "calls").exists()
