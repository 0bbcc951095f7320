"""Generates the reference of all recipe keys from the schema: `--explain KEY`, a JSON Schema, Markdown tables.

`python -m mnist_dist.recipe.reference` rewrites configs/recipe.schema.json and the tables in configs/README.md.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mnist_dist.engine.files import write_atomically
from mnist_dist.errors import Problem, RecipeError, unknown_key
from mnist_dist.recipe.checks import OPEN_SECTIONS, takes_any_keyword
from mnist_dist.recipe.file import configs_folder
from mnist_dist.recipe.keys import (
    NAMES,
    Key,
    all_keys,
    builder_of,
    first_sentence,
    keys_of,
    keywords,
    own_keys,
    range_text,
    type_text,
)
from mnist_dist.recipe.schema import OpenSection, Recipe, Section

MARKS = ("<!-- keys: made by mnist_dist.recipe.reference -->", "<!-- end of keys -->")
"""The lines of configs/README.md that enclose the tables."""

SCHEMA_FILE = "recipe.schema.json"

WIDTH = 120
"""Columns of the text that `explain` returns."""

# --- text for a terminal ------------------------------------------------------------------------------------------


def explain(key: str) -> str:
    """Returns type, default, range and meaning of a recipe key, or the keys of a section, as text for a terminal.

    Args:
        key: a dotted key, a section, or a keyword of an open section, e.g. "schedule.step_size".

    Raises:
        RecipeError: there is no such key.
    """
    known = all_keys()
    if key in known:
        return _explain_section(known[key]) if known[key].section else _explain_value(known[key])
    own = own_keys()
    if key in own:
        return _explain_keyword(*key.split("."))
    message = unknown_key(key, [*known, *own])
    if same_ending := [each for each in [*known, *own] if each.endswith(f".{key}")]:
        message = f"unknown key; did you mean {' or '.join(map(repr, same_ending))}?"
    elif "did you mean" not in message:
        message = unknown_key(key, Recipe.known_keys())
    raise RecipeError([Problem("command line", key, message, "unknown")])


def _explain_value(key: Key) -> str:
    assert key.values is not None
    facts = {"type": type_text(key.values), "default": key.default_text(), "range": range_text(key.values)}
    lines = _columns([(f"{name}:", value) for name, value in facts.items() if value])
    return "\n".join([key.name, *lines, "", _paragraph(key.meaning)])


def _explain_section(key: Key) -> str:
    assert key.section is not None
    inner = keys_of(key.section, f"{key.name}.")
    rows = [
        (each.name, "section" if each.section else each.default_text(), first_sentence(each.meaning)) for each in inner
    ]
    lines = [f"{key.name}: {key.meaning}", "", *_columns([("key", "default", "meaning"), *rows])]
    if issubclass(key.section, OpenSection):
        lines += ["", _paragraph(_open_note(key.name) + ":")]
        lines += _columns([(name, _list_keywords(key.name, name)) for name in NAMES[key.name]])
    return "\n".join(lines)


def _open_note(section: str) -> str:
    selected = "network" if section == "model" else section
    return f"Further keys of `{section}` are the keywords of the {selected} that `{section}.name` selects"


def _list_keywords(section: str, name: str) -> str:
    return ", ".join(keyword.name for keyword in keywords(section, name)) or "no keywords"


def _explain_keyword(section: str, keyword: str) -> str:
    takers = [(name, each) for name in NAMES[section] for each in keywords(section, name) if each.name == keyword]
    rows = [(name, type_text(each.values), each.default_text(), range_text(each.values)) for name, each in takers]
    return "\n".join(
        [f"{section}.{keyword}", _paragraph(f"A keyword of these values of {section}.name:"), *_columns(rows)]
    )


def _paragraph(text: str) -> str:
    return textwrap.fill(text, WIDTH, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Returns rows as aligned lines of at most `WIDTH` columns; the last column may take several lines."""
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]) - 1)]
    lines = []
    for row in rows:
        head = "  " + "".join(f"{cell:<{width}}  " for cell, width in zip(row, widths, strict=False))
        wrapped = textwrap.wrap(row[-1], WIDTH - len(head), break_on_hyphens=False) or [""]
        lines += [(head + wrapped[0]).rstrip(), *(" " * len(head) + more for more in wrapped[1:])]
    return lines


# --- JSON Schema --------------------------------------------------------------------------------------------------


def json_schema() -> dict[str, Any]:
    """Returns the JSON Schema (draft 2020-12) of a recipe file, with which editors complete keys and mark typos."""
    comment = f"Made by python -m mnist_dist.recipe.reference with torch {torch_version()}; do not edit."
    head = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$comment": comment,
        "title": "mnist_dist recipe",
    }
    return head | _section_schema(Recipe, "") | {"required": ["model"]}


def torch_version() -> str:
    """Returns major and minor version of torch, on which the set of optimizers and keywords depends."""
    return ".".join(torch.__version__.split(".")[:2])


def _section_schema(section: type[Section], prefix: str) -> dict[str, Any]:
    properties = {key.name.rpartition(".")[2]: _key_schema(key) for key in keys_of(section, prefix)}
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    if required := [key.name.rpartition(".")[2] for key in keys_of(section, prefix) if key.required]:
        schema["required"] = required
    if not issubclass(section, OpenSection):
        return schema | {"additionalProperties": False}
    name = prefix.rstrip(".")
    return schema | {"allOf": [_keywords_schema(name, each, list(properties)) for each in NAMES[name]]}


def _key_schema(key: Key) -> dict[str, Any]:
    if key.section:
        return {"description": key.meaning} | _section_schema(key.section, f"{key.name}.")
    assert key.values is not None
    default = {} if key.required else {"default": key.default}
    return {"description": key.meaning} | key.values | default


def _keywords_schema(section: str, name: str, reserved: list[str]) -> dict[str, Any]:
    """Returns the rule for the keywords of one name of an open section."""
    default = OPEN_SECTIONS[section][0].model_fields["name"].default
    condition: dict[str, Any] = {"properties": {"name": {"const": name}}}
    if name != default:
        condition["required"] = ["name"]
    properties: dict[str, Any] = dict.fromkeys(reserved, True)
    for keyword in keywords(section, name):
        text = f"Keyword of {name}, {type_text(keyword.values)}, {keyword.default_text()}."
        properties[keyword.name] = {"description": text, "anyOf": [keyword.values, {"type": "null"}]}
    rule: dict[str, Any] = {"properties": properties}
    if not takes_any_keyword(builder_of(section, name)):
        rule["additionalProperties"] = False
    if required := [keyword.name for keyword in keywords(section, name) if keyword.required]:
        rule["required"] = required
    return {"if": condition, "then": rule}


# --- Markdown -----------------------------------------------------------------------------------------------------


def markdown_reference() -> str:
    """Returns one Markdown table per section: key, type, default, range, meaning."""
    parts = [_markdown_table("Top level", Recipe, "", "")]
    parts += [
        _markdown_table(f"`{key.name}`", key.section, f"{key.name}.", key.meaning)
        for key in all_keys().values()
        if key.section
    ]
    return "\n\n".join(parts)


def _markdown_table(title: str, section: type[Section], prefix: str, meaning: str) -> str:
    lines = [f"### {title}", "", *([meaning, ""] if meaning else [])]
    lines += ["| key | type | default | range | meaning |", "| --- | --- | --- | --- | --- |"]
    for key in keys_of(section, prefix):
        if key.values is not None:
            cells = [type_text(key.values), f"`{key.default_text()}`", range_text(key.values), key.meaning]
            lines.append(" | ".join([f"| `{key.name}`", *(cell.replace("|", "\\|") for cell in cells)]) + " |")
    if issubclass(section, OpenSection):
        name = prefix.rstrip(".")
        lines += ["", _open_note(name) + "; `mnist-dist train --explain " + name + "` lists them."]
    return "\n".join(lines)


# --- files --------------------------------------------------------------------------------------------------------


def schema_text() -> str:
    """Returns the content of configs/recipe.schema.json."""
    return _compact_json(json_schema()) + "\n"


def _compact_json(value: Any, depth: int = 0) -> str:
    """Returns JSON with every object and list on one line if it fits into `WIDTH` columns."""
    line = json.dumps(value, ensure_ascii=False)
    if depth + len(line) < WIDTH - 20 or not isinstance(value, dict | list):  # 20: space for the key before the value
        return line
    names = [f"{json.dumps(name)}: " for name in value] if isinstance(value, dict) else [""] * len(value)
    inner = value.values() if isinstance(value, dict) else value
    start, end = "{}" if isinstance(value, dict) else "[]"
    indent = " " * (depth + 1)
    lines = [indent + name + _compact_json(each, depth + 1) for name, each in zip(names, inner, strict=True)]
    return "\n".join([start, ",\n".join(lines), " " * depth + end])


def write_reference(folder: Path) -> list[Path]:
    """Writes the JSON Schema and, if README.md has the marks, the tables. Returns the files written."""
    written = [folder / SCHEMA_FILE]
    write_atomically(written[0], schema_text())
    page = folder / "README.md"
    if page.is_file() and all(mark in page.read_text(encoding="utf-8") for mark in MARKS):
        before, _, rest = page.read_text(encoding="utf-8").partition(MARKS[0])
        after = rest.partition(MARKS[1])[2]
        write_atomically(page, f"{before}{MARKS[0]}\n{markdown_reference()}\n{MARKS[1]}{after}")
        written.append(page)
    return written


if __name__ == "__main__":
    folder = configs_folder()
    if folder is None:
        sys.exit("mnist_dist: there is no folder configs/")
    for path in write_reference(folder):
        print(f"written: {path}")
