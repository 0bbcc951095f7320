"""The commands that load the network of a run folder whose run has not written its weights yet."""

from __future__ import annotations

from pathlib import Path

import pytest

from mnist_dist import ensemble, evaluate, explain, predict
from mnist_dist.errors import RecipeError
from mnist_dist.export.__main__ import main as export_main
from mnist_dist.run.reader import load_run, open_run

COMMANDS = {
    "predict": (predict.main, ["RUN", "photo.png"]),
    "evaluate": (evaluate.main, ["RUN"]),
    "explain": (explain.main, ["RUN", "photo.png"]),
    "ensemble": (ensemble.main, ["RUN", "RUN"]),
    "export": (export_main, ["RUN", "--format", "torch"]),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unfinished_run_is_refused(refused, debug_run, command):
    (debug_run / "last.safetensors").unlink()
    main, words = COMMANDS[command]
    words = [word.replace("RUN", str(debug_run)) for word in words]
    assert refused(lambda: main(words)) == [(str(debug_run), "missing")]


@pytest.mark.parametrize(("missing", "other"), [("last", "best"), ("best", "last")])
def test_the_message_names_the_weights_that_the_run_has(debug_run: Path, missing, other):
    def message() -> str:
        with pytest.raises(RecipeError) as found:
            open_run(debug_run, missing)
        [problem] = found.value.problems
        return problem.message

    (debug_run / f"{missing}.safetensors").unlink()
    assert f"--weights {other}" in message() and "Errno" not in message()
    (debug_run / f"{other}.safetensors").unlink()
    assert f"{missing}.safetensors" in message() and "--weights" not in message()
    with pytest.raises(FileNotFoundError, match=missing):
        _ = load_run(debug_run, missing).model


def test_a_path_with_an_unknown_variable_is_one_problem():
    with pytest.raises(RecipeError) as caught:
        open_run("$NOT_SET/run", "best")
    [problem] = caught.value.problems
    assert "NOT_SET" in problem.message and "nothing was done" not in problem.message
