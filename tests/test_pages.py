"""Every command in the pages is valid, every path and link exists, and tables and quotations are current."""

from __future__ import annotations

import argparse
import configparser
import importlib
import importlib.util
import itertools
import json
import os
import re
import shlex
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

from mnist_dist.benchmark.operations import table_of
from mnist_dist.cli import COMMANDS, parse, run_command
from mnist_dist.compare.__main__ import Comparison
from mnist_dist.compare.table import MARKS, Row, fill_tables, group, representative_rows
from mnist_dist.recipe.file import bundled_recipes, recipe_notes
from mnist_dist.recipe.loading import load_recipe
from mnist_dist.train import main

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    page.relative_to(ROOT).as_posix()
    for pattern in ("README.md", "configs/*.md", "launch/**/*.md", "tests/README.md")
    for page in ROOT.glob(pattern)
)
REPORTS = [page for page in PAGES if page.startswith("launch/benchmarks/") and not page.endswith("README.md")]
LESSONS = [page for page in PAGES if page.startswith("launch/lessons/") and not page.endswith("README.md")]
READERS_OWN = ("mine.yaml", "my_recipes/wide.yaml")
"""Recipes in examples that a reader would write."""
PROGRAMS = ("mnist-dist ", "python ", "accelerate ", "torchrun ", "pytest", "launch/", "pip ", "sbatch ", "wandb ")
"""First words of commands. Other programs are found only in code blocks, not in running text."""


@cache
def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, *languages: str) -> list[str]:
    """Returns the code blocks of a page in these languages."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", text_of(page), flags=re.DOTALL | re.MULTILINE)
    return [text for language, text in found if language in languages]


def prose(page: str) -> str:
    """Returns a page without its code blocks."""
    return re.sub(r"^```.*?^```", "", text_of(page), flags=re.DOTALL | re.MULTILINE)


def table_between(page: str, start: str, end: str) -> list[list[str]]:
    """Returns the cells of the Markdown table between two lines, without the row of dashes."""
    content = text_of(page)
    assert content.count(start) == 1, f"{page} needs {start!r} once"
    lines = content.partition(start)[2].partition(end)[0].strip().splitlines()
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines if line.startswith("|")]
    return [rows[0], *rows[2:]]


# --- commands -----------------------------------------------------------------------------------------------------


def commands_of(page: str) -> Iterator[str]:
    """Yields the commands in shell blocks and in running text, where a program's name alone is not a command.

    The blocks of lessons are left out: `tests/lessons` runs them.
    """
    for line in "".join([] if page in LESSONS else blocks(page, "bash")).replace("\\\n", " ").splitlines():
        yield from split_at_and(line)
    for span in re.findall(r"`([^`\n]* [^`\n]*)`", prose(page)):
        if re.match(r"(\w+=\S+ )*(" + "|".join(PROGRAMS) + ")", span) and "…" not in span:
            is_name = " -m " not in span if span.startswith(("accelerate", "torchrun")) else len(span.split()) < 3
            yield from () if is_name else split_at_and(span)


def split_at_and(line: str) -> Iterator[str]:
    words = shlex.split(line, comments=True)
    for is_and, part in itertools.groupby(words, lambda word: word == "&&"):
        if not is_and:
            yield shlex.join(part)


def examples() -> Iterator[tuple[str, str]]:
    """Yields the examples that `--help` of each command prints."""
    for command, (_, _, text) in COMMANDS.items():
        for line in re.findall(r"^  (\S.*)", text, flags=re.MULTILINE):
            yield from ((f"{command} --help", each) for each in split_at_and(line))


ALL_COMMANDS = [*dict.fromkeys((page, each) for page in PAGES for each in commands_of(page)), *examples()]


class Parsed(Exception):
    """Raised instead of running a program whose arguments were accepted."""


def check_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parses a command as its program would. Raises what the program's parser raises, or AssertionError."""
    while re.fullmatch(r"\w+=.*", words[0]):
        words = words[1:]
    program, *rest = words
    if program == "mnist-dist":
        check_own_command(rest[0], rest[1:])
    elif program == "python" and rest[0] == "-m":
        check_module(rest[1], rest[2:], monkeypatch)
    elif program == "python":
        check_main_of_script(rest[0], rest[1:], monkeypatch)
    elif program in ("accelerate", "torchrun"):
        parser = launch_command_parser() if program == "accelerate" else get_args_parser()
        launched = parser.parse_args(rest[1:] if program == "accelerate" else rest)
        assert launched.module
        assert getattr(launched, "config_file", None) is None or (ROOT / launched.config_file).is_file()
        check_module(launched.training_script, launched.training_script_args, monkeypatch)
    elif program in ("mpirun", "srun"):
        check_command(rest[rest.index("python") :], monkeypatch)
    elif program.startswith("launch/"):
        assert os.access(ROOT / program, os.X_OK)
        check_launch_script(program, rest)
    else:
        OTHER_PROGRAMS[program](rest)


def check_module(module: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    package, _, command = module.partition(".")
    if package == "mnist_dist" and command:
        check_own_command(command, words)
        return
    assert package == "tests" and importlib.util.find_spec(module), f"there is no module {module}"
    if ROOT.joinpath(*module.split(".")).is_dir():
        module = f"{module}.__main__"
    check_main(importlib.import_module(module), [module, *words], monkeypatch)


def check_main_of_script(script: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    specification = importlib.util.spec_from_file_location("script", ROOT / script)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    check_main(module, [script, *words], monkeypatch)


def check_main(module: object, argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls `main` of a module up to the point where its arguments have been parsed."""
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser: argparse.ArgumentParser, *arguments: object, **keywords: object) -> None:
        parse_args(parser, *arguments, **keywords)
        raise Parsed

    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    with pytest.raises(Parsed):
        module.main()


def check_own_command(command: str, words: list[str]) -> None:
    """Parses the arguments, and loads the recipe that they name with their overrides."""
    arguments = parse(command, words)
    overrides = getattr(arguments, "overrides", [])
    if data := getattr(arguments, "data", None):
        overrides = [f"data.dataset={data}", *overrides]
    if command == "sweep":
        if arguments.sweep.endswith(".yaml"):
            assert (ROOT / arguments.sweep).is_file()
        check_lists(arguments.sweep, overrides)
    elif command == "benchmark":
        counted = arguments.operations or []  # recipes and overrides
        overrides = [*overrides, *(word for word in counted if "=" in word)]
        recipes = [arguments.recipe, arguments.time_to_accuracy, *(word for word in counted if "=" not in word)]
        for recipe in list(filter(None, recipes)) or ["debug"]:
            load_recipe(recipe, *overrides)
        check_lists(arguments.recipe, [arguments.sweep] if arguments.sweep else [])
    elif command == "train" and arguments.recipe:
        load_recipe("debug" if arguments.recipe in READERS_OWN else arguments.recipe, *overrides)
    elif command != "train":
        load_recipe("debug", *overrides)
    pages = [arguments.markdown] if command == "compare" and arguments.markdown else []
    assert all((ROOT / page).is_file() for page in pages)


def check_lists(recipe: str, overrides: list[str]) -> None:
    """Loads a recipe with each value of `key=a,b,c`."""
    for key, values in (override.split("=", 1) for override in overrides):
        for value in values.split(","):
            load_recipe(recipe, f"{key}={value}")


def check_launch_script(script: str, words: list[str]) -> None:
    """Checks what follows the script's own arguments. `tests/launch` runs the scripts."""
    if script == "launch/reproduce.sh":
        overrides = [word for word in words if "=" in word]
        for recipe in set(words) - set(overrides):
            load_recipe(recipe, *overrides)
    elif script == "launch/gpu_report.sh":
        load_recipe("debug", *(word for word in words if "=" in word))
        assert {word for word in words if word.startswith("-")} <= {"--rehearse"}
    else:
        numbers = {"launch/multi_node.sh": 3, "launch/elastic.sh": 2, "launch/cpu.sh": 2, "launch/local.sh": 0}[script]
        own = list(itertools.takewhile(lambda word: not word.startswith("--"), words))
        assert len(own) == numbers or (script == "launch/cpu.sh" and len(own) < numbers)
        if words:
            check_own_command("train", words[len(own) :])


def check_pip(words: list[str]) -> None:
    install, editable, what = words
    assert (install, editable, what[:2], what[-1]) == ("install", "-e", ".[", "]")
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    assert set(what[2:-1].split(",")) <= set(settings["options.extras_require"])


def check_pytest(words: list[str]) -> None:
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("paths", nargs="*", type=Path)
    parser.add_argument("-m", default="")
    parser.add_argument("-n")
    parser.add_argument("-x", action="store_true")
    parser.add_argument("--durations", type=int)
    arguments = parser.parse_args(words)
    assert all((ROOT / path).exists() for path in arguments.paths)
    markers = re.findall(r'^    "(\w+):', text_of("pyproject.toml"), flags=re.MULTILINE)
    assert set(re.findall(r"\w+", arguments.m)) - {"and", "or", "not"} <= set(markers)


def check_wandb(words: list[str]) -> None:
    from wandb.cli.cli import cli

    assert words[0] in cli.commands
    if words[0] == "sweep":
        assert (ROOT / words[1]).is_file()


def check_sbatch(words: list[str]) -> None:
    options = list(itertools.takewhile(lambda word: word.startswith("--"), words))
    script, run_dir, *rest = words[len(options) :]
    assert (ROOT / script).is_file() and not run_dir.startswith("-")
    check_own_command("doctor" if script == "launch/doctor.sbatch" else "train", rest)


def check_file_named(words: list[str]) -> None:
    assert (ROOT / next(word for word in words if word.startswith("launch/"))).is_file()


def check_tracker(words: list[str]) -> None:
    """Checks the first word only: the trackers are optional."""
    assert words[0] in ("--logdir", "ui", "show")


OTHER_PROGRAMS = {
    "pip": check_pip,
    "pytest": check_pytest,
    "wandb": check_wandb,
    "tensorboard": check_tracker,
    "mlflow": check_tracker,
    "trackio": check_tracker,
    "sbatch": check_sbatch,
    "kubectl": check_file_named,
    "sky": check_file_named,
    "ls": lambda words: words,  # shows the user's own folder
    "export": lambda words: words,
    "pre-commit": lambda words: text_of(".pre-commit-config.yaml"),
}


@pytest.mark.parametrize(("source", "command"), ALL_COMMANDS)
def test_a_command_is_one_that_its_program_accepts(source, command, monkeypatch):
    monkeypatch.chdir(ROOT)
    check_command(shlex.split(command), monkeypatch)


def test_commands_are_found():
    """The tests above check as many commands as there are, not an empty list."""
    found = [command for _, command in ALL_COMMANDS]
    assert len(found) > 100
    assert {page for page, _ in ALL_COMMANDS} >= set(PAGES) - {"configs/EXPERIMENTS.md", *LESSONS}
    assert {each.split()[1] for each in found if each.startswith("mnist-dist ")} == set(COMMANDS)


@pytest.mark.parametrize(
    "command",
    [
        "mnist-dist train --recipe lenet5 --run-dri x",
        "mnist-dist train --recipe lenet5 epochs=x",
        "accelerate launch -m mnist_dist.train --recipe lenet6",
        "accelerate launch --num_proceses 2 -m mnist_dist.train --recipe lenet5",
        "launch/cpu.sh 2 --recipe lenet5 epoch=1",
        "launch/gone.sh",
        "python -m tests.faults --kils 200",
        "pytest -m fast",
        'pip install -e ".[gone]"',
        "make all",
    ],
)
def test_a_wrong_command_is_noticed(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises((Exception, SystemExit)):
        check_command(shlex.split(command), monkeypatch)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    name = f"mnist_dist.{command}"
    module = importlib.import_module(f"{name}.__main__" if (ROOT / "mnist_dist" / command).is_dir() else name)
    with pytest.raises(SystemExit) as exited:
        module.main(["--help"])
    assert exited.value.code == 0
    assert "examples:" in capsys.readouterr().out


def test_the_two_set_up_commands():
    [quickstart, *_] = blocks("README.md", "bash")
    lines = [line.split("#")[0].strip() for line in quickstart.splitlines()]
    assert lines[0] == 'pip install -e ".[demo]" && accelerate launch -m mnist_dist.train --recipe quickstart.yaml'
    assert 'pip install -e ".[test]" && pytest' in lines
    ci = text_of(".ci/run")
    assert ci.index('pip install --quiet -e ".[test]"') < ci.index("pytest")


# --- paths and links ----------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Returns the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)", prose(page.relative_to(ROOT).as_posix()), flags=re.MULTILINE)
    words = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {each.replace(" ", "-") for each in words}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    folder = (ROOT / page).parent
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        target, _, anchor = link.partition("#")
        if target.startswith("http"):
            continue
        path = (folder / target).resolve() if target else ROOT / page
        assert path.exists() and path.is_relative_to(ROOT), f"{page}: {link}"
        assert not anchor or anchor in anchors(path), f"{page}: {link}"


@pytest.mark.parametrize("page", PAGES)
def test_every_path_named_exists(page):
    named = re.findall(r"(?<![\w./-])(?:mnist_dist|launch|configs|tests|\.ci|\.github)/[\w./-]*[\w/]", text_of(page))
    assert not [path for path in named if not (ROOT / path).exists()]


# --- the front page -----------------------------------------------------------------------------------------------


def test_the_readme_is_short():
    lines = text_of("README.md").splitlines()
    assert len(lines) <= 180
    assert len(text_of("README.md").split()) <= 1700
    assert lines.index("```bash") + 2 <= 20, "the line of the first command"


def test_the_readme_quotes_the_current_loop():
    quoted = next(block for block in blocks("README.md", "python") if block.startswith("while True:"))
    lines = iter([line.strip() for line in text_of("mnist_dist/train.py").splitlines()])
    for line in map(str.strip, quoted.splitlines()):
        if line and not line.startswith("#"):
            assert line in lines, f"not in train.py, or not in this order: {line}"
    assert len(quoted.splitlines()) >= 20


def test_the_recipe_of_the_readme_loads(tmp_path):
    [source] = blocks("README.md", "yaml")
    (tmp_path / "mine.yaml").write_text(source)
    assert load_recipe(tmp_path / "mine.yaml").name == "mine"


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = next(block for block in blocks("README.md", "python") if "import" in block)
    scope: dict = {}
    exec(compile(source, "README.md", "exec"), scope)
    assert scope["summary"]["recipe"] == "debug" == scope["run"].recipe.name


def test_the_worked_error_is_the_current_screen(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    [shown] = blocks("README.md", "console")
    prompt, _, expected = shown.partition("\n")
    words = shlex.split(prompt.removeprefix("$ mnist-dist train "))
    assert run_command(lambda: main(words)) == 2
    assert capsys.readouterr().err.strip() == expected.strip()


# --- results ------------------------------------------------------------------------------------------------------


def results() -> list[Row]:
    return group(Comparison([ROOT / "configs" / "results.jsonl"]).read())


@pytest.mark.parametrize("page", ["README.md", "configs/README.md"])
def test_the_results_are_the_generated_ones(page):
    assert fill_tables(text_of(page), results(), ROOT / page) == text_of(page)


def test_the_readme_has_few_results_and_the_other_page_has_all():
    [start] = re.findall(r"<!-- results of .*: made by mnist_dist.compare -->", text_of("README.md"))
    assert 0 < len(table_between("README.md", start, MARKS[1])) - 1 <= 8
    assert len(table_between("configs/README.md", *MARKS)) - 1 == len(results())


def test_the_recipes_say_what_was_measured():
    shipped = {path.stem: path for path in bundled_recipes().values()}
    for name, row in representative_rows(results()).items():
        assert recipe_notes(shipped[name])["measured"] == row.measured()


def test_the_keys_are_between_their_marks():
    start, end = "<!-- keys: made by mnist_dist.recipe.reference -->", "<!-- end of keys -->"
    assert text_of("configs/README.md").partition(start)[2].partition(end)[0].strip()


# --- benchmark reports --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("report", REPORTS)
def test_a_benchmark_report_is_short_and_in_the_index(report):
    assert re.fullmatch(r"[a-z0-9-]+_[a-z0-9-]+_\d{4}-\d\d-\d\d\.md", Path(report).name)
    assert len(text_of(report).splitlines()) <= 250
    assert f"]({Path(report).name})" in text_of("launch/benchmarks/README.md")


def test_the_figures_beside_a_report_are_in_it():
    files = sorted((ROOT / "launch" / "benchmarks").glob("*.jsonl"))
    assert files
    for file in files:
        report = file.with_suffix(".md").read_text(encoding="utf-8")
        for line in file.read_text(encoding="utf-8").splitlines():
            result = json.loads(line)
            if "images_per_second" in result:
                for speed in result["images_per_second"].values():
                    assert " | ".join(f"{speed[which]:,.0f}" for which in ("median", "min", "max")) in report
            elif "operations" in result:
                for row in table_of(result)[1:]:
                    assert f"| {' | '.join(row)} |" in report
            elif "reference_time_to_ours" in result:
                for part in (result["ours"], result["reference"]):
                    accuracy, seconds = (
                        f"{part[key]['mean']:.3f} ± {part[key]['sd']:.3f}" for key in ("accuracy", "seconds")
                    )
                    assert f"{accuracy} % in {seconds} s (n = {result['seeds']}" in report
            else:
                for ways in result["ms_per_call"].values():
                    for ms in ways.values():
                        assert " | ".join(f"{ms[which]:,.3f}" for which in ("median", "min", "max")) in report
