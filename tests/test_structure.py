"""The house keeps its shape: who may import whom, what lies at the top, and a loop that fits on one screen."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mnist_dist"

ROOMS = {"models", "data", "engine", "tracking", "reports"}
DOORS = {
    "train", "evaluate", "predict", "explain", "ensemble", "export", "benchmark", "record", "compare", "sweep",
    "doctor",
}  # fmt: skip
BEHIND_THE_DOORS = {
    "keeper", "outputs", "parts", "runs", "run_reader", "command_line", "recipe", "recipe_file", "world", "ranks",
    "probes", "loops", "frameworks", "inference", "transfer",
}  # fmt: skip
MAY_USE = {"engine": {"data"}}

# Heavy or optional packages, and the places that import each.
ONLY_IN = {
    "wandb": {"tracking"},
    "matplotlib": {"reports"},
    "onnx": {"export"},
    "onnxruntime": {"export", "inference"},
    "onnxscript": {"export"},
    "lightning": {"frameworks"},
}

TOP_LEVEL = {"mnist_dist", "launch", "configs", "tests", "setup.cfg", "README.md", "pyproject.toml", "LICENSE"}


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def name_of(source: Path) -> str:
    return source.relative_to(ROOT).as_posix()


def place_of(source: Path) -> str:
    """The room, door or module behind the doors that a source belongs to; `__init__` for the package's own."""
    return source.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(text: str, package: str = "mnist_dist") -> set[str]:
    """Dotted names of all that a source imports, wherever in it: `from a import b` is a.b.

    Args:
        package: the dotted package that the source lies in, to resolve relative imports.
    """
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            found |= {each.value for each in node.args[:1] if isinstance(each, ast.Constant)}
    return found


def imports_of(source: Path) -> set[str]:
    return imports(source.read_text(encoding="utf-8"), ".".join(source.relative_to(ROOT).parent.parts))


def inside(names: set[str]) -> set[str]:
    """The places of this package among imported names; `mnist_dist` for the package itself."""
    own = [name.split(".") for name in names if name.split(".")[0] == "mnist_dist"]
    return {parts[1] if len(parts) > 1 else parts[0] for parts in own}


@pytest.mark.parametrize(
    ("text", "package", "expected"),
    [
        ("import mnist_dist", "mnist_dist", {"mnist_dist"}),
        ("import mnist_dist.train as t", "mnist_dist.data", {"train"}),
        ("from mnist_dist import train, recipe", "mnist_dist.data", {"train", "recipe"}),
        ("from mnist_dist.data.batches import Batches", "mnist_dist.engine", {"data"}),
        ("from ..train import fit", "mnist_dist.data", {"train"}),
        ("from .. import train", "mnist_dist.data", {"train"}),
        ("from .batches import Batches", "mnist_dist.data", {"data"}),
        ("def late():\n    from mnist_dist.recipe.schema import Recipe", "mnist_dist.data", {"recipe"}),
        ("import importlib\nimportlib.import_module('mnist_dist.run.folder')", "mnist_dist.data", {"runs"}),
        ("import mnist_distant, torch", "mnist_dist.data", set()),
    ],
)
def test_imports_are_read_in_every_form(text, package, expected):
    assert inside(imports(text, package)) == expected


@pytest.mark.parametrize("source", sources(), ids=name_of)
def test_every_module_has_its_place(source):
    assert place_of(source) in ROOMS | DOORS | BEHIND_THE_DOORS | {"__init__"}
    assert source.name != "utils.py"


def test_every_room_and_the_training_door_are_there():
    places = {place_of(source) for source in sources()}
    assert ROOMS | BEHIND_THE_DOORS | {"train"} <= places


@pytest.mark.parametrize("source", [s for s in sources() if place_of(s) in ROOMS], ids=name_of)
def test_a_room_imports_neither_doors_nor_other_rooms(source):
    room = place_of(source)
    assert inside(imports_of(source)) <= {room} | MAY_USE.get(room, set())


@pytest.mark.parametrize("source", [s for s in sources() if place_of(s) in BEHIND_THE_DOORS], ids=name_of)
def test_what_is_behind_the_doors_does_not_import_them(source):
    assert not inside(imports_of(source)) & DOORS


@pytest.mark.parametrize("source", sources(), ids=name_of)
def test_heavy_packages_are_imported_in_their_places_only(source):
    for name in imports_of(source):
        package = name.split(".")[0]
        assert place_of(source) in ONLY_IN.get(package, {place_of(source)}), f"{package} in {name_of(source)}"


def test_wandb_and_matplotlib_are_imported_where_they_belong():
    found = {(name.split(".")[0], place_of(source)) for source in sources() for name in imports_of(source)}
    assert {("wandb", "tracking"), ("matplotlib", "reports")} <= found


def test_the_top_level_is_what_it_should_be():
    try:
        answer = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"not in a git repository: {error}")
    tracked = answer.stdout.splitlines()
    if not tracked:
        pytest.skip("git tracks nothing here")
    found = {file.split("/")[0] for file in tracked}
    assert {name for name in found if not name.startswith(".")} == TOP_LEVEL
    assert not [file for file in tracked if Path(file).name == "utils.py"]


def test_the_loop_fits_on_one_screen():
    tree = ast.parse((PACKAGE / "train.py").read_text(encoding="utf-8"))
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert lengths["fit"] <= 60
