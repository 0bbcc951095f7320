"""Reads recipe files (YAML, with the line of every key), applies overrides, finds bundled recipes and their notes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mnist_dist.engine.files import expand_path, read_regular, write_atomically
from mnist_dist.errors import Kind, Problem, RecipeError, did_you_mean

# --- the origin of a key ------------------------------------------------------------------------------------------


@dataclass
class Origins:
    """Stores where each key of a recipe was written. Recipes that differ only in their origins are equal."""

    source: str = field(default="the recipe", compare=False)
    """The recipe's file, for keys that are not in it."""
    places: dict[str, str] = field(default_factory=dict, compare=False)
    """Dotted key -> "file:line" or "command line"."""
    named_by_user: bool = field(default=False, compare=False)
    """Whether a person named the recipe's file, so that it may name code; False for the file of a run folder."""

    def are_trusted(self, key: str) -> bool:
        """Returns whether a person, not a file of a run, gave the value of a key."""
        return self.named_by_user or self.places.get(key) == "command line"

    def problem(self, key: str, message: str, kind: Kind) -> Problem:
        """Returns a problem located at the key, or at the nearest enclosing section that was written."""
        path = key
        while path and path not in self.places:
            path = path.rpartition(".")[0]
        return Problem(self.places.get(path, self.source), key, message, kind)


# --- YAML ---------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Reads YAML 1.2 scalars: `1e-3` is a float, `no` is text, `010` is ten. Python's `None` is null."""


class Dumper(yaml.SafeDumper):
    """Writes YAML; quotes text that YAML 1.1 or 1.2 would read as another type."""


MOST_BYTES, MOST_KEYS = 1_000_000, 10_000
"""The size of the largest recipe that is read: bytes of its file, keys and list entries together."""


def _whole_number(node: yaml.Node) -> int:
    """Returns the value of a whole number. No float can hold one of 309 digits, and computing with one is slow."""
    if len(node.value) > 300:
        raise yaml.MarkedYAMLError(problem="a number of more than 300 digits", problem_mark=node.start_mark)
    return int(node.value)


_Loader.yaml_implicit_resolvers = {}
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: _whole_number(node))
_NUMBER = r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
for _kind, _pattern, _first in [
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", _NUMBER, "-+0123456789."),
    ("null", r"~|null|Null|NULL|None|", ["~", "n", "N", ""]),
]:
    for _class in (_Loader, Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"^(?:{_pattern})$"), list(_first))
_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"^<<$"), ["<"])


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

    if len(places) > MOST_KEYS:  # a few aliases of aliases would make billions
        refuse(node, f"a recipe has at most {MOST_KEYS:,} keys and list entries")
    kind = node.tag.removeprefix("tag:yaml.org,2002:")
    if kind == "map":
        node.value = list(_merged(node, refuse, (*ancestors, node)))
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


def _merged(
    node: yaml.Node, refuse: Callable[[yaml.Node, str], None], ancestors: tuple[yaml.Node, ...]
) -> Iterator[tuple[yaml.Node, yaml.Node]]:
    """Yields the keys and values of a mapping with those that its merge keys, `<<: *base`, add.

    A key of the mapping itself wins, then the first section that is merged.

    Args:
        refuse: raises yaml.MarkedYAMLError for a node.
        ancestors: the nodes around the mapping, and itself.
    """
    own = [pair for pair in node.value if not pair[0].tag.endswith(":merge")]
    yield from own
    seen = {name.value for name, _ in own}
    for _, value in (pair for pair in node.value if pair[0].tag.endswith(":merge")):
        # A section that is listed twice adds nothing, and a few aliases of aliases would make billions.
        for base in dict.fromkeys(value.value) if isinstance(value, yaml.SequenceNode) else [value]:
            if not isinstance(base, yaml.MappingNode):
                refuse(base, "`<<` merges a section or a list of sections, e.g. `<<: *base`")
            if base in ancestors:
                refuse(base, "a section or list contains itself")
            base.value = list(_merged(base, refuse, (*ancestors, base)))  # merged once, however often it is named
            for name, inner in base.value:
                if name.value not in seen:
                    seen.add(name.value)
                    yield name, inner


def read_recipe(path: Path) -> tuple[dict[str, Any], Origins]:
    """Reads the keys and values of a recipe file without a check, and the origin of each key.

    Raises:
        RecipeError: the file cannot be read or is not a YAML mapping.
    """
    kind: Kind = "syntax"
    try:
        text = read_regular(path, MOST_BYTES).decode()
        values, places = parse(text, lambda line: f"{path}:{line}" if line else str(path))
        if isinstance(values, dict):
            return values, Origins(str(path), places)
        problem = "not a recipe: expected keys with values, e.g. `epochs: 10`"
    except UnicodeDecodeError as error:
        problem = f"not a text file ({error.reason} at byte {error.start}); expected YAML in UTF-8"
    except OSError as error:
        problem, kind = f"cannot be read: {error.strerror}", "missing"
    raise RecipeError([Problem(str(path), "", problem, kind)])


def apply_overrides(
    values: dict[str, Any], origins: Origins, words: Iterable[str], names: Mapping[str, str]
) -> Iterator[Problem]:
    """Writes `key=value` words into `values` and `origins`; yields a problem for each word that it cannot read.

    A section that is given as a mapping, `optimizer={lr: 0.01}`, changes the keys that it names and leaves the others.
    If it names another class, `optimizer={name: adam}`, it replaces the section, whose keys belong to the old class.

    Args:
        names: open section -> the default of its key `name`.
    """
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
        target[last] = _changed(target.get(last), value, names.get(key))
        origins.places |= {key: here} | {f"{key}.{inner}": here for inner in places}


def _changed(old: Any, new: Any, default_name: str | None = None) -> Any:
    """Returns the new value; a mapping with the keys of the old mapping that it does not name."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return new
    if new.get("name") is not None and new["name"] != old.get("name", default_name):
        return new
    return old | {key: _changed(old.get(key), value) for key, value in new.items()}


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
    path, bundled = expand_path(name), bundled_recipes()
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
