"""The README tells the truth: its commands run, its paths exist, and its table is the generated one."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mnist_dist.cli import Parser
from mnist_dist.compare import __main__ as compare
from mnist_dist.recipe.file import bundled_recipes, recipe_notes
from mnist_dist.train import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.DOTALL)
SHELL = "\n".join(text for language, text in BLOCKS if language == "bash").replace("\\\n", " ")
COMMANDS = [line.split("#")[0].strip() for line in SHELL.splitlines() if line.split("#")[0].strip()]
TRAINING = [command for command in COMMANDS if "-m mnist_dist.train" in command and "--recipe" in command]


def test_the_first_two_commands_are_the_whole_set_up():
    assert COMMANDS[:2] == [
        'pip install -e ".[demo]" && accelerate launch -m mnist_dist.train --recipe quickstart.yaml',
        'pip install -e ".[test]" && pytest',
    ]
    assert 'pip install --quiet -e ".[test]"\npytest\n' in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("command", TRAINING)
def test_a_training_command_resolves(command, capsys):
    words = shlex.split(command.split("-m mnist_dist.train ")[1])
    assert main([*words, "--print-recipe"]) == 0
    assert capsys.readouterr().out.startswith("name: ")


class Parsed(Exception):
    pass


@pytest.mark.parametrize("command", [command for command in COMMANDS if "-m mnist_dist." in command])
def test_a_door_s_command_is_one_that_it_takes(command, monkeypatch):
    def parse_and_stop(method):
        def parse(*arguments, **keywords):
            method(*arguments, **keywords)
            raise Parsed

        return parse

    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(Parser, name, parse_and_stop(getattr(Parser, name)))
    door, *words = shlex.split(command.split("-m ", 1)[1])
    with pytest.raises(Parsed):
        importlib.import_module(door).main(words)


@pytest.mark.parametrize("door", sorted(set(re.findall(r"-m (mnist_dist\.\w+)", README))))
def test_every_door_named_opens(door):
    done = subprocess.run([sys.executable, "-m", door, "--help"], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "examples:" in done.stdout


def test_every_path_named_exists():
    named = set(re.findall(r"`((?:mnist_dist|launch|configs|tests)/[\w./-]+)`", README))
    named |= set(re.findall(r"\]\(((?!http|#)[\w./-]+)\)", README)) | set(re.findall(r"launch/[\w./-]+\.\w+", README))
    assert named
    assert not [path for path in named if not (ROOT / path).exists()]


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [source] = [text for language, text in BLOCKS if language == "python"]
    scope: dict = {}
    exec(compile(source, "README.md", "exec"), scope)
    assert scope["summary"]["recipe"] == "debug"


def test_the_results_table_is_the_generated_one():
    rows = compare.group(compare.Comparison([ROOT / "configs" / "results.jsonl"]).read())
    table = README.partition(compare.MARKS[0])[2].partition(compare.MARKS[1])[0].strip()
    assert table == compare.to_markdown(rows)


def test_the_worked_error_is_the_one_that_is_shown(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    from mnist_dist.cli import run_command

    shown = next(text for language, text in BLOCKS if language == "console" and "problem" in text)
    prompt, _, expected = shown.partition("\n")
    words = shlex.split(prompt.split("-m mnist_dist.train ")[1])
    assert run_command(lambda: main(words)) == 2
    assert capsys.readouterr().err.strip() == expected.strip()


def test_the_recipes_say_what_was_measured():
    rows = compare.group(compare.Comparison([ROOT / "configs" / "results.jsonl"]).read())
    shipped = {path.stem: path for path in bundled_recipes().values()}
    longest = {row.recipe: row for row in rows if not row.recipe.startswith("mean of ")}  # ensembles have no recipe
    for name, row in longest.items():
        assert recipe_notes(shipped[name])["measured"] == row.measured()
