"""Every command is listed, prints its help without importing torch, and refuses wrong arguments."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from configparser import ConfigParser
from importlib import import_module

import pytest

from mnist_dist import __main__ as program
from mnist_dist import cli, errors
from mnist_dist.cli import COMMANDS, Parser, parse, run_command
from mnist_dist.errors import MeasurementStopped, Problem, RecipeError, RunError, is_main_process
from tests import processes

HEAVY = ("torch", "accelerate", "wandb", "matplotlib", "numpy", "pydantic")
SMALLEST = {
    "train": [],
    "evaluate": ["RUN"],
    "predict": ["RUN", "a.png"],
    "explain": ["RUN", "a.png"],
    "ensemble": ["RUN", "RUN"],
    "sweep": ["lenet5"],
    "benchmark": ["--recipe", "lenet5"],
    "profile": ["--recipe", "lenet5"],
    "compare": ["RUN"],
    "doctor": [],
    "export": ["RUN", "--format", "onnx"],
}
"""Command -> the fewest arguments that it accepts."""


def heavy_modules_after(source: str) -> tuple[set[str], str]:
    """Runs a program in a new Python; returns which heavy packages it has imported, and its output."""
    report = f"import sys\nprint('HEAVY', *[name for name in {HEAVY} if name in sys.modules])\n"
    command = [sys.executable, "-c", f"{source}\n{report}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=processes.ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    output, _, heavy = done.stdout.rpartition("HEAVY")
    return set(heavy.split()), output


# --- help ---------------------------------------------------------------------------------------------------------


def test_every_command_has_a_minimal_command_line():
    assert SMALLEST.keys() == COMMANDS.keys()


def test_parsing_any_command_line_imports_nothing_heavy():
    source = f"from mnist_dist.cli import parse\nfor name, words in {SMALLEST}.items():\n    parse(name, words)"
    assert heavy_modules_after(source)[0] == set()


def test_the_list_of_commands_imports_nothing_heavy():
    source = "from mnist_dist.__main__ import main\nmain([])"
    heavy, output = heavy_modules_after(source)
    assert heavy == set()
    assert all(name in output for name in COMMANDS)


HELP = """
import contextlib, io, runpy, sys
for command in {commands}:
    sys.argv = [command, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            runpy.run_module({module}, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            assert not end.code, end.code
    assert f"usage: mnist-dist {{command}} " in out.getvalue() and "examples:" in out.getvalue()
"""


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_run_as_a_module_imports_nothing_heavy(command):
    """The command's module must call `answer_early` above its imports."""
    source = HELP.format(commands=[command], module='f"mnist_dist.{command}"')
    assert heavy_modules_after(source)[0] == set()


def test_help_through_the_program_imports_nothing_heavy():
    source = HELP.format(commands=list(COMMANDS), module='"mnist_dist"')
    source = source.replace('[command, "--help"]', '["mnist-dist", command, "--help"]')
    assert heavy_modules_after(source)[0] == set()


def test_a_wrong_argument_is_refused_before_anything_heavy_is_imported():
    source = """
import contextlib, io, runpy, sys
sys.argv = ["train", "--recpie", "x"]
with contextlib.redirect_stderr(io.StringIO()) as err:
    try:
        runpy.run_module("mnist_dist.train", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        assert end.code == 2, end.code
assert "--recpie" in err.getvalue()
"""
    assert heavy_modules_after(source)[0] == set()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_parses_its_minimal_command_line(command):
    assert parse(command, SMALLEST[command])


@pytest.mark.parametrize("command", COMMANDS)
def test_every_argument_of_a_command_is_explained(command):
    for action in cli.parser_of(command)._actions:
        assert action.help, f"{command} {action.dest}"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_example_of_a_command_is_valid(command):
    """An example starts a module or the program, and its arguments are those of the command."""
    examples = [line.split("#")[0].split() for line in COMMANDS[command][2].splitlines()]
    lines = [words for words in examples if "mnist-dist" in words or f"mnist_dist.{command}" in words]
    assert lines
    for words in lines:
        start = words.index("mnist-dist") + 2 if "mnist-dist" in words else words.index(f"mnist_dist.{command}") + 1
        assert "mnist-dist" not in words or words[start - 1] == command
        parse(command, [word.replace("*", "1") for word in words[start:]])


# --- wrong arguments ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "words", "key"),
    [
        ("train", ["--epochs", "3"], "--epochs"),
        ("train", ["--world-size", "many"], "--world-size"),
        ("train", ["--recipe"], "--recipe"),
        ("evaluate", [], "RUN"),
        ("evaluate", ["RUN", "--weights", "newest"], "--weights"),
        ("export", ["RUN"], "--format"),
        ("export", ["RUN", "--format", "jpeg"], "--format"),
        ("predict", ["RUN"], "IMAGE|FOLDER"),
        ("benchmark", ["--recipe", "a", "--floors", "b"], "--floors"),
    ],
)
def test_a_wrong_argument_is_named(command, words, key, refused):
    assert refused(lambda: parse(command, words)) == [(key, "usage")]


def test_a_path_with_an_unset_variable_is_named(monkeypatch):
    monkeypatch.delenv("NOT_SET", raising=False)
    with pytest.raises(RecipeError, match="NOT_SET") as error:
        parse("train", ["--recipe", "debug", "--run-dir", "$NOT_SET/x"])
    assert [(each.key, each.kind) for each in error.value.problems] == [("$NOT_SET/x", "missing")]


def test_options_and_positional_arguments_may_be_mixed():
    arguments = parse("train", ["epochs=1", "--recipe", "debug", "batch_size=8"])
    assert (arguments.recipe, arguments.overrides) == ("debug", ["epochs=1", "batch_size=8"])


# --- the program --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_the_program_lists_its_commands(argv, capsys):
    assert program.main(argv) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert lines == [[name, description] for name, (description, *_) in COMMANDS.items()]


@pytest.mark.parametrize(("word", "suggested"), [("tran", "'train'"), ("Evaluate", "'evaluate'"), ("zzz", "train, ")])
def test_the_program_suggests_a_command(word, suggested, refused):
    assert refused(lambda: program.main([word])) == [(word, "unknown")]
    with pytest.raises(RecipeError, match=suggested):
        program.main([word])


@pytest.mark.parametrize("command", COMMANDS)
def test_the_program_starts_the_module_of_a_command(command, monkeypatch):
    spec = program.find_spec(f"mnist_dist.{command}")
    module = import_module(f"mnist_dist.{command}" + (".__main__" if spec.submodule_search_locations else ""))
    monkeypatch.setattr(module, "main", lambda argv: ("started", argv))
    assert program.main([command, *SMALLEST[command]]) == ("started", SMALLEST[command])


def test_python_m_runs_the_program():
    done = processes.run([sys.executable, "-m", "mnist_dist", "train", "--explain", "epochs"])
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("epochs\n")
    done = processes.run([sys.executable, "-m", "mnist_dist", "trian"])
    assert (done.returncode, done.stdout) == (2, "")
    assert "'train'" in done.stderr


def test_a_command_can_be_started_as_a_script():
    """Python then puts the package's folder first on its path, where `profile` hides the standard library's module."""
    source = "import runpy, sys; sys.path.insert(0, 'mnist_dist'); sys.argv = ['train', '--list-recipes']\n"
    source += "runpy.run_path('mnist_dist/train.py', run_name='__main__')"
    environment = os.environ | {"PYTHONPATH": str(processes.ROOT)}
    command = [sys.executable, "-c", source]
    done = subprocess.run(command, capture_output=True, text=True, cwd=processes.ROOT, env=environment, timeout=120)
    assert "debug" in done.stdout and done.returncode == 0, done.stderr


def test_the_console_script_is_declared():
    settings = ConfigParser()
    settings.read(processes.ROOT / "setup.cfg")
    script = settings["options.entry_points"]["console_scripts"].strip()
    assert script == "mnist-dist = mnist_dist.__main__:entry_point"
    assert program.entry_point


# --- how a command ends -------------------------------------------------------------------------------------------


def failing(error: BaseException):
    def main() -> int:
        raise error

    return main


@pytest.mark.parametrize(
    ("main", "code", "words"),
    [
        (lambda: 0, 0, []),
        (lambda: 75, 75, []),
        (failing(RecipeError([Problem("here", "epochs", "wrong", "type")])), 2, ["here: epochs", "wrong"]),
        (failing(RunError("the disk is full")), 1, ["the disk is full"]),
        (failing(KeyboardInterrupt()), 130, ["interrupted"]),
        (failing(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB\nframe")), 1, ["2 GiB\n", "batch_size"]),
        (failing(MemoryError()), 1, ["the memory is full: MemoryError\n"]),
        (failing(OSError(errno.ENOMEM, "Cannot allocate memory")), 1, ["Cannot allocate memory"]),
    ],
)
def test_exit_codes(main, code, words, capsys):
    assert run_command(main) == code
    out, err = capsys.readouterr()
    assert out == "" and bool(err) == bool(words)
    assert not [word for word in words if word not in err]


@pytest.mark.parametrize("error", [ZeroDivisionError(), RuntimeError("wrong shape"), OSError(errno.EIO, "broken")])
def test_other_errors_are_not_hidden(error):
    with pytest.raises(type(error)):
        run_command(failing(error))


@pytest.mark.parametrize("name", ["RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID"])
def test_the_rank_comes_from_the_launcher(name, monkeypatch):
    for each in ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(each, raising=False)
    assert is_main_process()
    monkeypatch.setenv(name, "1")
    assert not is_main_process()


def test_other_ranks_wait_before_they_print(monkeypatch, capsys):
    waited: list[float] = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(errors.time, "sleep", waited.append)
    assert run_command(failing(RunError("failed"))) == 1
    assert waited == [errors.RANK_0_SECONDS]
    assert "failed" in capsys.readouterr().err


def test_other_ranks_of_a_stopped_measurement_end_at_once(monkeypatch, capsys):
    monkeypatch.setattr(errors.time, "sleep", lambda seconds: pytest.fail("the launcher would wait for this rank"))
    for rank, is_printed in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        assert run_command(failing(MeasurementStopped())) == 1
        assert ("signal" in capsys.readouterr().err) is is_printed


def test_a_parser_names_its_command():
    assert Parser("train").prog == "mnist-dist train"
