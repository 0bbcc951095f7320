"""Reads recipe files (YAML, with the line of every key), applies overrides, finds bundled recipes and their notes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mnist_dist.engine.files import write_atomically
from mnist_dist.errors import Kind, Problem, RecipeError, did_you_mean

# --- the origin of a key ------------------------------------------------------------------------------------------


@dataclass
class Origins:
    """Stores where each key of a recipe was written. Recipes that differ only in their origins are equal."""

    source: str = field(default="the recipe", compare=False)
    """The recipe's file, for keys that are not in it."""
    places: dict[str, str] = field(default_factory=dict, compare=False)
    """Dotted key -> "file:line" or "command line"."""

    def problem(self, key: str, message: str, kind: Kind) -> Problem:
        """Returns a problem located at the key, or at the nearest enclosing section that was written."""
        path = key
        while path and path not in self.places:
            path = path.rpartition(".")[0]
        return Problem(self.places.get(path, self.source), key, message, kind)


# --- YAML ---------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Reads YAML 1.2 scalars: `1e-3` is a float, `no` is text, `010` is ten."""


class Dumper(yaml.SafeDumper):
    """Writes YAML; quotes text that YAML 1.1 or 1.2 would read as another type."""


_Loader.yaml_implicit_resolvers = {}
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))
_NUMBER = r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
for _kind, _pattern, _first in [
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", _NUMBER, "-+0123456789."),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
]:
    for _class in (_Loader, Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"^(?:{_pattern})$"), list(_first))


def parse(text: str, where: Callable[[int | None], str], key: str = "") -> tuple[Any, dict[str, str]]:
    """Reads a YAML text.

    Args:
        where: line number (None: unknown) -> the location that messages name.
        key: the recipe key that the text is the value of; empty for a file.

    Returns:
        The value, and the location of each dotted key in it.

    Raises:
        RecipeError: the text is not YAML, or contains a value that a recipe cannot contain.
    """
    places: dict[str, str] = {}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, places
        _locate_keys(node, where, places)
        return loader.construct_document(node), places
    except Exception as error:  # PyYAML raises errors of many types for a wrong explicit tag
        mark = getattr(error, "problem_mark", None)
        parts = [getattr(error, "context", None), getattr(error, "problem", None)]
        problem = " ".join(filter(None, parts)) or str(error).partition("\n")[0]
        if "'\\t'" in problem:
            problem += ": indent with spaces, not tabs"
        elif isinstance(error, yaml.scanner.ScannerError | yaml.parser.ParserError):
            problem += "\ncheck indentation, colons, brackets and quotes in this line and the line before"
        message = f"cannot be read: {problem}"
        raise RecipeError([Problem(where(mark and mark.line + 1), key, message, "syntax")]) from error


def _locate_keys(
    node: yaml.Node,
    where: Callable[[int | None], str],
    places: dict[str, str],
    path: str = "",
    ancestors: tuple[yaml.Node, ...] = (),
) -> None:
    """Adds the location of every key below `node` to `places`.

    Raises:
        yaml.MarkedYAMLError: a node that a recipe cannot contain.
    """

    def refuse(node: yaml.Node, problem: str) -> None:
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)

    kind = node.tag.removeprefix("tag:yaml.org,2002:")
    if kind not in ("null", "bool", "int", "float", "str", "seq", "map"):
        refuse(node, f"a recipe cannot contain {kind!r}; it contains text, numbers, true, false, lists and sections")
    if node in ancestors:
        refuse(node, "a section or list contains itself")
    for index, child in enumerate(node.value if kind in ("seq", "map") else ()):
        name, value = child if kind == "map" else (child, child)
        inner = f"{path}.{name.value if kind == 'map' else index}".lstrip(".")
        if kind == "map" and not name.tag.endswith(":str"):
            refuse(name, "a key must be text; put it in quotes")
        if inner in places:
            refuse(name, f"{inner} is given twice, here and at {places[inner]}; remove one")
        places[inner] = where(name.start_mark.line + 1)
        _locate_keys(value, where, places, inner, (*ancestors, node))


def read_recipe(path: Path) -> tuple[dict[str, Any], Origins]:
    """Reads the keys and values of a recipe file without a check, and the origin of each key.

    Raises:
        RecipeError: the file cannot be read or is not a YAML mapping.
    """
    kind: Kind = "syntax"
    try:
        values, places = parse(path.read_text(encoding="utf-8"), lambda line: f"{path}:{line}" if line else str(path))
        if isinstance(values, dict):
            return values, Origins(str(path), places)
        problem = "not a recipe: expected keys with values, e.g. `epochs: 10`"
    except UnicodeDecodeError as error:
        problem = f"not a text file ({error.reason} at byte {error.start}); expected YAML in UTF-8"
    except OSError as error:
        problem, kind = f"cannot be read: {error.strerror}", "missing"
    raise RecipeError([Problem(str(path), "", problem, kind)])


def apply_overrides(values: dict[str, Any], origins: Origins, words: Iterable[str]) -> Iterator[Problem]:
    """Writes `key=value` words into `values` and `origins`; yields a problem for each word that cannot be parsed."""
    here = "command line"
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", key):
            yield Problem(here, word, "expected key=value, e.g. optimizer.lr=0.05", "usage")
            continue
        try:
            value, places = parse(text, lambda line: here, key)
        except RecipeError as error:
            yield from error.problems
            continue
        *sections, last = key.split(".")
        target, path = values, ""
        for section in sections:
            path = f"{path}.{section}".lstrip(".")
            if not isinstance(target.get(section), dict):  # where the schema has a value, it refuses the section
                target[section], origins.places[path] = {}, here
            target = target[section]
        target[last] = value
        origins.places |= {key: here} | {f"{key}.{inner}": here for inner in places}


# --- finding recipes ----------------------------------------------------------------------------------------------


def configs_folder() -> Path | None:
    """Returns the folder configs/ of an installed wheel or of the repository; None if there is none."""
    package = Path(__file__).parent.parent
    return next((f for f in (package / "configs", package.parent / "configs") if f.is_dir()), None)


def bundled_recipes() -> dict[str, Path]:
    """Returns name -> file of every recipe in configs/."""
    folder = configs_folder()
    if folder is None:
        return {}
    files = sorted(folder.rglob("*.yaml"), key=lambda file: (len(file.parts), file))  # files of subfolders last
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}


def find_recipe(name: str | Path) -> Path:
    """Returns the file at a path, else the bundled recipe of that name, with or without `.yaml`.

    Raises:
        RecipeError: there is no such file and no such bundled recipe.
    """
    path, bundled = Path(name), bundled_recipes()
    stem = path.as_posix().removesuffix(".yaml")
    try:
        if path.is_file():
            return path
        if match := next((file for key, file in bundled.items() if stem in (key, key.rpartition("/")[2])), None):
            return match
        message = "is a folder; the recipe of a run folder is recipe.yaml in it" if path.is_dir() else "does not exist"
        message += did_you_mean(str(path), map(str, path.parent.glob("*.yaml"))) or did_you_mean(stem, bundled)
    except OSError as error:
        message = f"cannot be read: {error.strerror}"
    message = f"{str(name)!r} {message}\nbundled recipes: {', '.join(bundled)}"
    raise RecipeError([Problem("command line", "--recipe", message, "missing")])


# --- head comments ------------------------------------------------------------------------------------------------


def recipe_notes(path: Path) -> dict[str, str]:
    """Returns the `# key: value` lines of a recipe's head comment: command, document, claim, measured."""
    lines = path.read_text(encoding="utf-8").splitlines()
    pairs = (re.fullmatch(r"#\s*(\w+):\s+(.*)", line) for line in lines if line.startswith("#"))
    return {pair[1]: pair[2] for pair in pairs if pair}


def note_measured(path: Path, measured: str) -> None:
    """Writes a result into the line `# measured: …` of a recipe's head comment."""
    text = path.read_text(encoding="utf-8")
    write_atomically(path, re.sub(r"(?m)^# measured: .*$", f"# measured: {measured}", text))
