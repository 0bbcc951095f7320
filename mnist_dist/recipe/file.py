"""A recipe as a file: YAML with the line of every key, overrides, where recipes lie, and problems that say where."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mnist_dist.errors import Kind, Problem, RecipeError, did_you_mean

# --- where a key was written ---------------------------------------------------------------------------------------


@dataclass
class Origins:
    """Where each key was written; it has no say in whether two recipes are equal."""

    source: str = field(default="the recipe", compare=False)
    places: dict[str, str] = field(default_factory=dict, compare=False)

    def problem(self, key: str, message: str, kind: Kind = "usage") -> Problem:
        """A problem placed at the key, or at the nearest section around it that somebody wrote."""
        path = key
        while path and path not in self.places:
            path = path.rpartition(".")[0]
        return Problem(self.places.get(path, self.source), key, message, kind)


# --- YAML ---------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars: `1e-3` is a float, `no` is text, `010` is ten."""


class Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 would read as something else."""


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
    """The value of a YAML text, and `where` each dotted key in it stands by its line.

    Raises:
        RecipeError: the text is no YAML, or holds what has no place in a recipe.
    """
    places: dict[str, str] = {}

    def refuse(node: yaml.Node, problem: str) -> None:
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)

    def walk(node: yaml.Node, path: str, around: tuple[yaml.Node, ...]) -> None:
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        if kind not in ("null", "bool", "int", "float", "str", "seq", "map"):
            refuse(node, f"{kind!r} has no place in a recipe, which holds text, numbers, true, false and lists")
        if node in around:
            refuse(node, "a section or list contains itself")
        for index, child in enumerate(node.value if kind in ("seq", "map") else ()):
            name, value = child if kind == "map" else (child, child)
            inner = f"{path}.{name.value if kind == 'map' else index}".lstrip(".")
            if kind == "map" and not name.tag.endswith(":str"):
                refuse(name, "a key is text; put it in quotes if it is meant")
            if inner in places:
                refuse(name, f"{inner} is given twice, here and at {places[inner]}; keep one")
            places[inner] = where(name.start_mark.line + 1)
            walk(value, inner, (*around, node))

    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is not None:
            walk(node, "", ())
        return loader.construct_document(node) if node else None, places
    except Exception as error:  # PyYAML fails in many ways where an explicit tag does not fit
        mark = getattr(error, "problem_mark", None)
        parts = [getattr(error, "context", None), getattr(error, "problem", None)]
        problem = " ".join(filter(None, parts)) or str(error).partition("\n")[0]
        if "'\\t'" in problem:
            problem += ": indent with spaces, not tabs"
        elif isinstance(error, yaml.scanner.ScannerError | yaml.parser.ParserError):
            problem += "\ncheck indentation, colons, brackets and quotes, here and in the line before"
        raise RecipeError([Problem(where(mark and mark.line + 1), key, f"cannot be read: {problem}")]) from error


def read_recipe(path: Path) -> tuple[dict[str, Any], Origins]:
    try:
        values, places = parse(path.read_text(encoding="utf-8"), lambda line: f"{path}:{line}" if line else str(path))
        if isinstance(values, dict):
            return values, Origins(str(path), places)
        problem = "a recipe is a mapping of keys to values, such as `epochs: 10`; this file holds none"
    except UnicodeDecodeError as error:
        problem = f"not a text file ({error.reason} at byte {error.start}); a recipe is YAML in UTF-8"
    except OSError as error:
        problem = f"cannot be read: {error.strerror}"
    raise RecipeError([Problem(str(path), "", problem)])


def apply_overrides(values: dict[str, Any], origins: Origins, words: Iterable[str]) -> Iterator[Problem]:
    """Writes `key=value` words into the values."""
    here = "command line"
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", key):
            yield Problem(here, word, "an override is written key=value, e.g. optimizer.lr=0.05")
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
            if not isinstance(target.get(section), dict):  # if it was a value, the schema will want one again
                target[section], origins.places[path] = {}, here
            target = target[section]
        target[last] = value
        origins.places |= {key: here} | {f"{key}.{inner}": here for inner in places}


# --- where recipes lie --------------------------------------------------------------------------------------------


def bundled_recipes() -> dict[str, Path]:
    """Name -> file of every recipe in configs/, in the repository or in an installed wheel."""
    package = Path(__file__).parent.parent
    folder = next((f for f in (package / "configs", package.parent / "configs") if f.is_dir()), None)
    if folder is None:
        return {}
    files = sorted(folder.rglob("*.yaml"), key=lambda file: (len(file.parts), file))  # folders behind single files
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}


def find_recipe(name: str | Path) -> Path:
    """A path as it stands, else a bundled recipe by name, with or without `.yaml`."""
    path, bundled = Path(name), bundled_recipes()
    stem = path.as_posix().removesuffix(".yaml")
    try:
        if path.is_file():
            return path
        if match := next((file for key, file in bundled.items() if stem in (key, key.rpartition("/")[2])), None):
            return match
        what = "a folder; in a run folder the recipe is recipe.yaml" if path.is_dir() else "there is no such recipe"
        what += did_you_mean(str(path), map(str, path.parent.glob("*.yaml"))) or did_you_mean(stem, bundled)
    except OSError as error:
        what = f"cannot be read: {error.strerror}"
    raise RecipeError([Problem(f"--recipe {str(name)!r}", "", f"{what}\nbundled: {', '.join(bundled)}")])


def recipe_notes(path: Path) -> dict[str, str]:
    """The `# key: value` lines of a recipe's head comment: command, document, claim, measured."""
    lines = path.read_text(encoding="utf-8").splitlines()
    pairs = (re.fullmatch(r"#\s*(\w+):\s+(.*)", line) for line in lines if line.startswith("#"))
    return {pair[1]: pair[2] for pair in pairs if pair}


def note_measured(path: Path, measured: str) -> None:
    """Writes what was measured into the line for it in a recipe's head comment."""
    text = path.read_text(encoding="utf-8")
    path.write_text(re.sub(r"(?m)^# measured: .*$", f"# measured: {measured}", text), encoding="utf-8")
