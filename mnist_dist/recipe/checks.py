"""Checks of a recipe: each yields pairs of a dotted key and what is wrong with its value."""

from __future__ import annotations

import fnmatch
import inspect
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import pydantic
import torch
from pydantic import ConfigDict, TypeAdapter

from mnist_dist.data import Augmentation
from mnist_dist.engine import optimizers, schedules
from mnist_dist.errors import did_you_mean, unknown_key
from mnist_dist.models import build_model, find_builder
from mnist_dist.recipe.schema import DistillSection, ModelSection, OptimizerSection, Recipe, ScheduleSection, Section

# --- checks: each finds pairs of a dotted key and what is wrong with its value -------------------------------------


Findings = Iterable[tuple[str, str]]


def check_schema(values: dict[str, Any]) -> Findings:
    try:
        Recipe.model_validate(values)
    except pydantic.ValidationError as error:
        by_key: dict[str, list[Any]] = {}
        for each in error.errors():
            by_key.setdefault(_dotted(each["loc"]), []).append(each)
        for key, errors in by_key.items():
            *sections, last = errors[0]["loc"]
            if errors[0]["type"] == "extra_forbidden":
                yield key, unknown_key(str(last), _section(sections).known_keys())
            elif key in ("model", "model.name") and errors[0]["type"] == "missing":
                yield key, "this key is needed, e.g. `model: {name: simple_cnn}`"
            else:
                yield key, _mismatch(errors, errors[0]["input"])


def _dotted(place: tuple[int | str, ...]) -> str:
    """Where pydantic found an error, as the recipe spells it: without the member of a union that was tried."""
    depth = next((depth for depth in range(len(place)) if _section(place[:depth]) is None), len(place))
    return ".".join(str(part) for at, part in enumerate(place) if at < depth or isinstance(part, int))


def _section(path: Sequence[int | str]) -> Any:
    """The schema that stands at a path; None where there is a plain value."""
    schema: Any = Recipe
    for part in path:
        field = schema.model_fields.get(part)
        schema = field.annotation if field and isinstance(field.annotation, type) else None
        if schema is None or not issubclass(schema, Section):
            return None
    return schema


_PLAIN_WORDS = {
    r"Input should be ": "",
    r"a valid integer.*": "a whole number",
    r"a valid number": "a number",
    r"a valid boolean": "true or false",
    r"a valid string": "text",
    r"a valid (list|array|tuple)": "a list, e.g. [a, b]",
    r"a valid dictionary.*": "a section with keys of its own",
    r"greater than or equal to": "at least",
    r"less than or equal to": "at most",
    r"(Tuple|List) should have at most (\d+).*": r"a list of \2",
    r"Field required": "a longer list",
}


def _mismatch(errors: list[Any], given: Any) -> str:
    """pydantic's errors about one value as one sentence."""
    if errors[0]["type"] == "value_error":
        return str(errors[0]["ctx"]["error"])
    # Some signatures take Python objects beside plain values; no YAML can give those.
    wanted = [each["msg"] for each in errors if each["type"] != "needs_python_object"]
    for pattern, words in _PLAIN_WORDS.items():
        wanted = [re.sub(pattern, words, each) for each in wanted]
    expected = " or ".join(dict.fromkeys(wanted))
    near = did_you_mean(str(given), re.findall(r"'([^']*)'", expected))
    return f"expected {expected}, got {json.dumps(given, ensure_ascii=False)[:80]}{near}"


def check_keywords(values: dict[str, Any]) -> Findings:
    """Own keywords against the signature of what takes them: known, of the annotated type, and none missing."""
    for section, schema, find, ours in (
        ("model", ModelSection, find_builder, "num_classes"),
        ("optimizer", OptimizerSection, optimizers.OPTIMIZERS.__getitem__, "params"),
        ("schedule", ScheduleSection, schedules.SCHEDULES.__getitem__, "span"),
    ):
        given, reserved = values.get(section, {}), schema.model_fields
        try:
            builder = find(given.get("name", reserved["name"].default))
            parameters = inspect.signature(builder, eval_str=True).parameters.values()
        except Exception:  # the schema has refused it already, or only building it will tell
            continue
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
        named = {p.name: p for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
        named = {name: p for name, p in named.items() if name not in (ours, *reserved)}
        own = {key: value for key, value in given.items() if key not in reserved and value is not None}
        for key, value in own.items():
            if key in named:
                for message in _check_type(named[key].annotation, value):
                    yield f"{section}.{key}", message
            elif not takes_any:
                yield f"{section}.{key}", unknown_key(key, [*reserved, *named])
        for name, parameter in named.items():
            if parameter.default is parameter.empty and name not in own:
                yield f"{section}.{name}", f"{given['name']} needs this key"


def _check_type(annotation: Any, value: Any) -> Iterator[str]:
    try:
        kind = Any if annotation is inspect.Parameter.empty else annotation
        adapter = TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False, arbitrary_types_allowed=True))
        adapter.validate_json(json.dumps(value), strict=True)  # JSON's arrays serve lists and tuples alike
    except pydantic.ValidationError as error:
        yield _mismatch(error.errors(), value)
    except pydantic.errors.PydanticUserError:
        return  # an annotation that pydantic cannot read: the builder itself will judge


def check_combinations(recipe: Recipe) -> Findings:
    """What only shows when parts meet: each is built once, small or without memory, and asked."""
    optimizer, schedule, model = recipe.optimizer, recipe.schedule, recipe.model
    if isinstance(recipe.micro_batch_size, int) and recipe.micro_batch_size > recipe.batch_size:
        yield "micro_batch_size", f"{recipe.micro_batch_size} is more than the batch_size of {recipe.batch_size}"
    if recipe.logical_shards and recipe.logical_shards > recipe.batch_size:
        yield "logical_shards", f"{recipe.logical_shards} is more than the batch_size of {recipe.batch_size}"
    if recipe.logical_shards and recipe.sync_batchnorm:
        yield "sync_batchnorm", "with logical_shards batch norm belongs to the shard; leave one of the two out"
    if recipe.data.split is not None and recipe.data.dataset != "emnist":
        yield "data.split", f"only emnist has splits, not {recipe.data.dataset}; leave it out"
    if not recipe.distill.teachers and recipe.distill != DistillSection():
        yield "distill.from", "this key is needed, e.g. `distill: {from: runs/teacher}`"
    yield from _attempt("data.augment", recipe.data.augment.model_dump(), Augmentation)[1]

    kind, parameter = optimizers.OPTIMIZERS[optimizer.name], torch.nn.Parameter(torch.zeros(2, 2))
    build: Callable[..., Any] = partial(optimizers.build_optimizer, [parameter], optimizer.name, lr=optimizer.lr or 0.1)
    yield from _attempt("optimizer", optimizer.keywords, build, f"; see torch.optim.{kind.__name__}")[1]
    build = partial(schedules.build_schedule, schedule.name, lr=optimizer.lr, steps_per_epoch=10, total_steps=100)
    made, findings = _attempt("schedule", schedule.keywords, build)
    yield from findings
    if made and made.momentum_at and not {"momentum", "betas"} & inspect.signature(kind).parameters.keys():
        yield "schedule.cycle_momentum", f"{optimizer.name} has no momentum to cycle; set it to false"

    if ":" not in model.name:  # a user's own class may do anything when built: build it once only
        with torch.device("meta"):
            made, findings = _attempt("model", model.keywords, partial(build_model, model.name))
        yield from findings
        if made:
            yield from check_freeze(model.freeze, [name for name, _ in made.named_parameters()])


def _attempt(section: str, keywords: dict[str, Any], build: Callable[..., Any], hint: str = "") -> tuple[Any, Findings]:
    """Builds, and again without each keyword that a refusal names, so that one bad value hides no other."""
    left = dict(keywords)
    findings: list[tuple[str, str]] = []
    while True:
        try:
            return build(**left), findings
        except Exception as error:  # PyTorch's and other people's constructors refuse in many ways
            said = str(error)
            if "meta " in said:  # it looks into the memory that it has not: only building it in earnest will tell
                return None, findings
            # The first that it names; of elastic and elastic_sigma, which begin alike, the longer.
            named = sorted((key for key in left if key in said), key=lambda key: (said.index(key), -len(key)))
            guilty = named[0] if named else None
            if guilty or not findings:  # else it may only miss what was taken away
                findings.append((f"{section}.{guilty}" if guilty else section, f"{said}{hint}"))
            if not guilty:
                return None, findings
            del left[guilty]


def check_freeze(patterns: list[str], names: list[str]) -> Findings:
    """Every pattern must match a parameter name, and something must be left to train."""
    stages = dict.fromkeys(f"{name.partition('.')[0]}.*" for name in names)
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            hint = did_you_mean(pattern, [*stages, *names])
            yield "model.freeze", f"{pattern!r} matches no parameter{hint}\ntry: {', '.join(stages)}"
    if patterns and all(any(fnmatch.fnmatch(name, pattern) for pattern in patterns) for name in names):
        yield "model.freeze", "every parameter is frozen: nothing is left to train"
