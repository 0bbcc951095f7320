"""Arguments that the command `benchmark` refuses before it measures anything, and its default for W&B."""

from __future__ import annotations

from pathlib import Path

import pytest

from mnist_dist.benchmark import __main__ as benchmark
from mnist_dist.cli import parse, run_command

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("words", "key", "kind"),
    [
        (["--recipe", "debug", "--sweep", "batch_size"], "--sweep", "syntax"),
        (["--recipe", "debug", "--sweep", "batch_size=1,,2"], "--sweep", "syntax"),
        (["--recipe", "debug", "--sweep", "batch_size=32,x"], "batch_size", "type"),
        (["--recipe", "debug", "--sweep", "epochs=1,2"], "--sweep", "conflict"),
        (["--recipe", "debug", "--sweep", "batch_size=8,16", "--inference"], "--sweep", "conflict"),
        (["--recipe", "debug", "--plot", "x.png"], "--plot", "conflict"),
        (["--recipe", "debug", "--inference", "--batches", "1,0"], "--batches", "type"),
        (["--recipe", "debug", "--json", "/no/such/folder/x.json"], "--json", "missing"),
        (["--recipe", "debug", "--json", "/"], "--json", "unwritable"),
        (["--recipe", "debug", "--rounds", "0"], "--rounds", "range"),
        (["--time-to-accuracy", "debug", "--seeds", "0"], "--seeds", "range"),
        (["--time-to-accuracy", "debug", "--json", "/no/such/folder/x.json"], "--json", "missing"),
        (["--time-to-accuracy", "debug", "--sweep", "batch_size=8,16"], "--sweep", "conflict"),
        (["--time-to-accuracy", "debug", "--inference"], "--inference", "conflict"),
        (["--time-to-accuracy", "debug", "--plot", "x.png"], "--plot", "conflict"),
        (["--recipe", "debug", "--inference", "--whole-epochs"], "--whole-epochs", "conflict"),
        (["--operations", "debug", "--whole-epochs"], "--whole-epochs", "conflict"),
        (["--operations", "debug", "--inference"], "--inference", "conflict"),
        (["--operations", "--note"], "--note", "conflict"),
        (["--operations", "no_such_recipe"], "no_such_recipe", "missing"),
        (["--recipe", "debug", "--note"], "--note", "conflict"),
        (["--recipe", "debug", "batch_size=513"], "batch_size", "conflict"),
        (["--recipe", "plus_8k"], "distill.from", "unsupported"),
        (["--recipe", "debug", "data.augment.mixup=0.2"], "data.augment.mixup", "unsupported"),
        (["--recipe", "debug", "data.augment.cutmix=1"], "data.augment.cutmix", "unsupported"),
        (["--recipe", "debug", "data.class_weights=[1, 2]"], "data.class_weights", "conflict"),
        (["--time-to-accuracy", "debug", "data.channels=3"], "data.dataset", "unsupported"),
        (["--floors", "no_such.json"], "--floors", "missing"),
        (["--floors", str(ROOT / "setup.cfg")], "--floors", "damaged"),
    ],
)
def test_a_measurement_that_is_impossible_is_refused(words, key, kind, refused):
    assert refused(lambda: benchmark.main(words)) == [(key, kind)]


def test_one_of_three_options_is_required(refused, capsys):
    [(_, kind)] = refused(lambda: benchmark.main([]))
    assert kind == "usage"
    assert run_command(lambda: benchmark.main([])) == 2
    assert "--time-to-accuracy" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "mode"), [([], "offline"), (["tracking.wandb.mode=disabled"], "disabled")])
def test_wandb_writes_to_disk_unless_the_user_chooses(words, mode):
    [recipe] = benchmark._recipes(parse("benchmark", ["--recipe", "debug", *words])).values()
    assert recipe.tracking.wandb.mode == mode
