"""Rules for the structure of the package: layers, commands, cycles, sizes, and where heavy packages are imported."""

from __future__ import annotations

import ast
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mnist_dist"

LAYERS = (
    {"run"},
    {"recipe"},
    {"engine"},
    {"data", "distributed", "models", "tracking", "plots"},
    {"errors", "machine"},
)
"""From top to bottom, below the commands. A module imports its own folder and lower layers."""

ROOT_ONLY = {"__init__", "__main__", "cli", "errors"}
"""Modules at the package's root that are not commands."""

LOOP_IS_TIMED_BY = {"benchmark", "profile"}
"""The commands that import another: they measure the loop in train.py itself."""

ONLY_IN = {
    "wandb": {"tracking"},
    "matplotlib": {"plots", "benchmark"},
    "onnx": {"export", "run"},
    "onnxruntime": {"export", "benchmark", "run"},
    "lightning": {"benchmark"},
    "accelerate": {"train", "benchmark", "compare", "doctor", "profile", "run", "engine", "distributed", "tracking"},
}
"""Heavy or optional package -> the folders and commands that import it."""

STANDARD_LIBRARY_ONLY = {"__init__", "__main__", "cli", "errors"}

TOP_LEVEL = {"mnist_dist", "launch", "configs", "tests", "setup.cfg", "README.md", "pyproject.toml", "LICENSE"}

LONGEST_FUNCTION, LONGEST_FILE = 60, 350

# --- reading the sources ------------------------------------------------------------------------------------------


@cache
def modules() -> dict[str, Path]:
    """Dotted name below `mnist_dist` -> file; a package by its own name."""
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = file
    return found


@cache
def tree_of(name: str) -> ast.Module:
    return ast.parse(modules()[name].read_text(encoding="utf-8"))


def imported(tree: ast.Module, package: str) -> set[str]:
    """Every dotted name that a module imports, wherever in it; relative imports resolved against its package."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            found |= {each.value for each in node.args[:1] if isinstance(each, ast.Constant)}
    return found


def imports_of(name: str) -> set[str]:
    return imported(tree_of(name), ".".join(modules()[name].relative_to(ROOT).parent.parts))


def own_imports(name: str) -> set[str]:
    """The modules of this package that a module imports."""
    found = set()
    for each in imports_of(name):
        if each.split(".")[0] == "mnist_dist":
            path = each.split(".")[1:]
            while path and ".".join(path) not in modules():
                path.pop()
            found.add(".".join(path) or "__init__")
    return found


def folder_of(name: str) -> str:
    return name.partition(".")[0]


def has_main(name: str) -> bool:
    return name in modules() and any(isinstance(n, ast.FunctionDef) and n.name == "main" for n in tree_of(name).body)


@cache
def commands() -> set[str]:
    """Modules at the root with a function `main`, and packages whose `__main__` has one."""
    roots = {folder_of(name) for name in modules()} - ROOT_ONLY
    return {root for root in roots if has_main(root) or has_main(f"{root}.__main__")}


def layer_of(folder: str) -> int:
    """0 for commands and the root's own modules, then 1 for the top layer, and so on."""
    return next((depth for depth, layer in enumerate(LAYERS, start=1) if folder in layer), 0)


def may_import(importer: str, target: str) -> bool:
    """Whether a module in `importer` (a folder or a command) may import one in `target`."""
    if target == importer or target == "__init__":  # the package's own version number
        return True
    if target == "cli":
        return importer in commands() | {"__main__"}
    if target in commands():
        return importer == "__init__" or (importer in LOOP_IS_TIMED_BY and target == "train")
    return layer_of(importer) < layer_of(target)


# --- the rules can fail -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "package", "expected"),
    [
        ("import mnist_dist", "mnist_dist", {"mnist_dist"}),
        ("import mnist_dist.train as t", "mnist_dist.data", {"mnist_dist.train"}),
        ("from mnist_dist import train, cli", "mnist_dist.data", {"mnist_dist.train", "mnist_dist.cli"}),
        ("from ..train import fit", "mnist_dist.data", {"mnist_dist.train.fit"}),
        ("from .. import train", "mnist_dist.data", {"mnist_dist.train"}),
        ("from .batches import Batches", "mnist_dist.data", {"mnist_dist.data.batches.Batches"}),
        ("def late():\n    from mnist_dist.recipe import file", "mnist_dist.data", {"mnist_dist.recipe.file"}),
        ("importlib.import_module('mnist_dist.run')", "mnist_dist.data", {"mnist_dist.run"}),
    ],
)  # fmt: skip
def test_imports_are_read_in_every_form(text, package, expected):
    assert imported(ast.parse(text), package) == expected


@pytest.mark.parametrize(
    ("importer", "target", "allowed"),
    [
        ("train", "run", True),
        ("run", "train", False),
        ("run", "engine", True),
        ("engine", "run", False),
        ("engine", "data", True),
        ("data", "distributed", False),
        ("data", "errors", True),
        ("errors", "data", False),
        ("predict", "evaluate", False),
        ("benchmark", "train", True),
        ("sweep", "train", False),
        ("run", "cli", False),
    ],
)
def test_the_order_of_layers_decides_what_may_be_imported(importer, target, allowed):
    assert may_import(importer, target) is allowed


# --- the rules ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", modules())
def test_imports_run_downward(name):
    wrong = {each for each in own_imports(name) if not may_import(folder_of(name), folder_of(each))}
    assert not wrong


def test_there_is_no_import_cycle():
    graph = {name: own_imports(name) - {name, "__init__"} for name in modules()}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above[above.index(name) :], name])
        if name not in done:
            for each in sorted(graph[name]):
                visit(each, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_the_root_holds_commands_and_four_modules():
    assert {folder_of(name) for name in modules()} == ROOT_ONLY | commands() | set().union(*LAYERS)
    assert "train" in commands()


@pytest.mark.parametrize("name", [name for name in modules() if "launched_world" in modules()[name].read_text()])
def test_a_command_that_may_join_a_world_ends_as_a_process_of_a_world(name):
    """Python's own exit frees the objects: a thread of gloo may then abort the process although its work is done."""
    _, is_command, end = modules()[name].read_text().rpartition('if __name__ == "__main__":\n')
    assert not is_command or end == "    end_process(run_command(main))\n"


def test_the_command_line_knows_every_command():
    from mnist_dist.cli import COMMANDS

    assert set(COMMANDS) == commands()


@pytest.mark.parametrize("name", modules())
def test_heavy_packages_are_imported_in_listed_modules_only(name):
    for each in imports_of(name):
        package = each.split(".")[0]
        assert folder_of(name) in ONLY_IN.get(package, {folder_of(name)}), f"{package} in {name}"


@pytest.mark.parametrize("name", sorted(STANDARD_LIBRARY_ONLY))
def test_modules_that_help_imports_need_only_the_standard_library(name):
    import sys

    outside = {each.split(".")[0] for each in imports_of(name)} - set(sys.stdlib_module_names) - {"mnist_dist"}
    assert not outside


IN_PLACE = {
    "engine.files",
    "data.store",  # under another name; the complete file is renamed
    "data.decoding",  # in a folder without its name; the complete folder is renamed
    "export.exporter",  # in a temporary folder; the file that is ready is renamed
    "sweep.trials",  # the output of a trial while it runs
    "doctor.measurements",  # measures how long a rename takes to reach another node
}
"""Modules that may write a file other than by `engine.files.write_atomically`."""

APPENDS = {
    "tracking.jsonl",  # metrics.jsonl: one line per write; a resumed run cuts it at the checkpoint's length
    "tracking.console",  # console.log
    "compare.__main__",  # --keep: one line per run
    "ensemble",  # --keep: one line
}
"""Modules that append to a file."""


@pytest.mark.parametrize("name", sorted(modules().keys() - IN_PLACE))
def test_files_are_written_by_one_function(name):
    """If a file is written in place, a reader may see half of it. Few modules append, each for a reason."""
    in_place = ("w", "x") if name in APPENDS else ("w", "x", "r+", "rb+", "a")
    calls = [node for node in ast.walk(tree_of(name)) if isinstance(node, ast.Call)]
    for call in calls:
        function = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        modes = [each.value for each in call.args if isinstance(each, ast.Constant)] if function == "open" else []
        assert function not in ("write_text", "write_bytes"), f"line {call.lineno}"
        assert not [mode for mode in modes if str(mode).startswith(in_place)], f"line {call.lineno}"


@pytest.mark.parametrize("name", modules())
def test_files_and_functions_are_short_and_modules_have_a_docstring(name):
    tree, text = tree_of(name), modules()[name].read_text(encoding="utf-8")
    assert ast.get_docstring(tree) or not text
    assert text.count("\n") <= LONGEST_FILE
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    assert {name: length for name, length in lengths.items() if length > LONGEST_FUNCTION} == {}


def test_the_top_level_holds_the_listed_files_only():
    try:
        answer = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"git does not answer here: {error}")
    tracked = answer.stdout.splitlines()
    if not tracked:
        pytest.skip("git tracks no file here")
    found = {file.split("/")[0] for file in tracked}
    assert {name for name in found if not name.startswith(".")} == TOP_LEVEL
    assert not [file for file in tracked if Path(file).name == "utils.py"]


def test_tests_mirror_the_package():
    """A folder below tests/ is named after a folder or command of the package, or holds what is tested as a whole."""
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders <= {folder_of(name) for name in modules()} | {"launch", "faults", "cluster", "lessons", "screens"}
