"""Lists all recipe keys, read from the schema, and the keywords of open sections, read from signatures."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import TypeAdapter
from pydantic.errors import PydanticUserError
from pydantic.fields import FieldInfo

from mnist_dist.engine.optimizers import OPTIMIZERS
from mnist_dist.engine.schedules import SCHEDULES
from mnist_dist.models import MODELS
from mnist_dist.recipe.checks import OPEN_SECTIONS, keyword_type, keywords_of
from mnist_dist.recipe.schema import Recipe, Section

# --- keys ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Key:
    """One key of the schema: a section or a value."""

    name: str
    """The dotted key."""
    meaning: str
    default: Any = None
    required: bool = False
    section: type[Section] | None = None
    """The section that the key opens; None for a value."""
    values: dict[str, Any] | None = None
    """JSON Schema of the key's values; None for a section."""

    def default_text(self) -> str:
        """Returns the default as YAML writes it, or "required"."""
        return "required" if self.required else as_yaml(self.default)


def keys_of(section: type[Section] = Recipe, prefix: str = "") -> list[Key]:
    """Returns the keys of a section in the order of the schema, without those of its subsections."""
    return [_key(f"{prefix}{field.alias or name}", field) for name, field in section.model_fields.items()]


def all_keys(section: type[Section] = Recipe, prefix: str = "") -> dict[str, Key]:
    """Returns dotted name -> key, for all sections."""
    found: dict[str, Key] = {}
    for key in keys_of(section, prefix):
        found[key.name] = key
        if key.section:
            found |= all_keys(key.section, f"{key.name}.")
    return found


def _key(name: str, field: FieldInfo) -> Key:
    meaning = " ".join((field.description or "").split())
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
        return Key(name, meaning, section=field.annotation)
    annotation: Any = field.annotation
    for each in field.metadata:
        annotation = Annotated[annotation, each]
    values = _simplify(TypeAdapter(annotation).json_schema())
    required = field.is_required() and name != "name"  # the default is the file's name
    return Key(name, meaning, None if field.is_required() else field.default, required, values=values)


def _simplify(values: Any) -> Any:
    """Rewrites a JSON Schema of pydantic, so that old and new versions of pydantic give the same text."""
    if isinstance(values, list):
        return [_simplify(each) for each in values]
    if not isinstance(values, dict):
        return values
    values = {key: _simplify(each) for key, each in values.items()}
    if "const" in values:
        values |= {"enum": [values.pop("const")]}
    items = values.get("prefixItems", [])
    if items and all(each == items[0] for each in items):  # every version of JSON Schema knows `items`
        del values["prefixItems"]
        values["items"] = items[0]
    return dict(sorted(values.items()))


# --- open sections ------------------------------------------------------------------------------------------------

NAMES = {"model": list(MODELS), "optimizer": sorted(OPTIMIZERS), "schedule": list(SCHEDULES)}
"""Open section -> names whose keywords are known."""


@dataclass(frozen=True)
class Keyword:
    """A keyword of a class or function that an open section names."""

    name: str
    values: dict[str, Any]
    default: Any
    required: bool

    def default_text(self) -> str:
        """Returns "default …" or "required"."""
        return "required" if self.required else f"default {as_yaml(self.default)}"


def builder_of(section: str, name: str) -> Callable[..., Any]:
    """Returns the class or function that a name of `NAMES` selects in an open section."""
    return OPEN_SECTIONS[section][1](name)


def keywords(section: str, name: str) -> list[Keyword]:
    """Returns the keywords that a recipe may give to a name of `NAMES` in an open section."""
    found = []
    for keyword, parameter in keywords_of(section, builder_of(section, name)).items():
        try:
            values = _simplify(keyword_type(parameter.annotation).json_schema())
        except PydanticUserError:  # an annotation that JSON Schema cannot express: any value
            values = {}
        required = parameter.default is inspect.Parameter.empty
        found.append(Keyword(keyword, values, None if required else parameter.default, required))
    return found


def own_keys() -> list[str]:
    """Returns the dotted keys of all keywords that open sections are known to take."""
    found = [
        f"{section}.{each.name}" for section in NAMES for name in NAMES[section] for each in keywords(section, name)
    ]
    return list(dict.fromkeys(found))


# --- types and ranges as text -------------------------------------------------------------------------------------


def as_yaml(value: Any) -> str:
    """Returns a plain value as YAML writes it."""
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


_TYPES = {"integer": "int", "number": "float", "string": "str", "boolean": "bool", "null": "null"}
_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def type_text(values: dict[str, Any]) -> str:
    """Returns the type of a JSON Schema's values, e.g. `float or null`."""
    if "anyOf" in values:
        return " or ".join(dict.fromkeys(type_text(each) for each in values["anyOf"]))
    if values.get("type") == "array":
        inner = [type_text(each) for each in values.get("prefixItems") or [values["items"]] * values.get("minItems", 0)]
        return f"[{', '.join(inner)}]" if inner else f"list of {type_text(values['items'])}"
    return _TYPES.get(values.get("type", ""), "any")


def range_text(values: dict[str, Any]) -> str:
    """Returns the range or the choices of a JSON Schema's values, e.g. `≥ 1`; empty if there are none."""
    if "enum" in values:
        return ", ".join(as_yaml(each) for each in values["enum"])
    if values.get("type") == "array" and "items" in values:
        return f"each {inner}" if (inner := range_text(values["items"])) else ""
    if "anyOf" in values:
        return ", ".join(filter(None, map(range_text, values["anyOf"])))
    return " and ".join(f"{sign} {values[name]}" for name, sign in _BOUNDS.items() if name in values)


def first_sentence(text: str) -> str:
    """Returns the first sentence of a text."""
    return re.split(r"(?<=\.)\s+(?=[A-Z`])", text)[0]
