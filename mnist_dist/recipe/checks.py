"""Checks a recipe. Each check yields findings: a dotted key, what is wrong with its value, and the kind of problem."""

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

from mnist_dist.data import Augmentation, is_data_code
from mnist_dist.data.form import DataError
from mnist_dist.data.sources import SHAPES
from mnist_dist.data.sources.arrays import import_function
from mnist_dist.engine import optimizers, schedules
from mnist_dist.errors import Kind, did_you_mean, unknown_key
from mnist_dist.models import FILLED_IN, build_model, find_builder, is_code, set_by_trainer
from mnist_dist.recipe.schema import DistillSection, ModelSection, OptimizerSection, Recipe, ScheduleSection, Section

Finding = tuple[str, str, Kind]
"""Dotted key, message, kind of problem."""

# --- keys and types of the schema ---------------------------------------------------------------------------------


def check_schema(values: dict[str, Any]) -> Iterator[Finding]:
    """Finds unknown keys, missing keys, and values of the wrong type or out of range."""
    try:
        Recipe.model_validate(values)
    except pydantic.ValidationError as error:
        by_key: dict[str, list[Any]] = {}
        for each in error.errors():
            by_key.setdefault(_dotted(each["loc"]), []).append(each)
        # A list that no member of a union accepts: the error of an element says more than "not a number".
        by_key = {
            key: errors for key, errors in by_key.items() if not any(each.startswith(f"{key}.") for each in by_key)
        }
        for key, errors in by_key.items():
            *sections, last = errors[0]["loc"]
            if errors[0]["type"] == "extra_forbidden":
                yield key, unknown_key(str(last), _section(sections).known_keys()), "unknown"
            elif key in ("model", "model.name") and errors[0]["type"] == "missing":
                yield key, "this key is required, e.g. `model: {name: simple_cnn}`", "missing"
            else:
                yield key, *_mismatch(errors, errors[0]["input"])


def _dotted(location: tuple[int | str, ...]) -> str:
    """Returns the location of a pydantic error as a dotted key, without the union members that pydantic appends."""
    depth = next((depth for depth in range(len(location)) if _section(location[:depth]) is None), len(location))
    return ".".join(str(part) for at, part in enumerate(location) if at < depth or isinstance(part, int))


def _section(path: Sequence[int | str]) -> Any:
    """Returns the section of the schema at a path; None where the schema has a plain value."""
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
    r"greater than": "more than",
    r"(Tuple|List) should have at most (\d+).*": r"a list of \2",
    r"Field required": "a longer list",
}
"""Pattern in a message of pydantic -> plain words."""

_RANGE_ERRORS = {"greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number", "int_too_big"}
"""Types of pydantic errors for a value of the right type that is out of range."""


NAMES = (("model", "name"), ("data", "dataset"))
"""Keys whose values are names that the program looks up."""


def _mismatch(errors: list[Any], given: Any) -> tuple[str, Kind]:
    """Returns message and kind for pydantic's errors about one value."""
    if errors[0]["type"] == "value_error":
        error = errors[0]["ctx"]["error"]
        return str(error), _kind_of_name(error) if errors[0]["loc"] in NAMES else "range"
    # Some signatures also take Python objects; YAML cannot write those.
    errors = [each for each in errors if each["type"] != "needs_python_object"]
    expectations = [each["msg"] for each in errors]
    for pattern, words in _PLAIN_WORDS.items():
        expectations = [re.sub(pattern, words, each) for each in expectations]
    expected = " or ".join(dict.fromkeys(expectations))
    near = did_you_mean(str(given), re.findall(r"'([^']*)'", expected))
    types = {each["type"] for each in errors}
    kind: Kind = "range" if types & _RANGE_ERRORS else "type"
    if "literal_error" in types and isinstance(given, str):
        kind = "unknown"
    return f"expected {expected}, got {json.dumps(given, ensure_ascii=False)[:80]}{near}", kind


def _kind_of_name(error: ValueError) -> Kind:
    """Returns the kind of a model name's problem: no such model, a missing package, or a failed import."""
    if error.__cause__ is None:
        return "unknown"
    return "missing" if isinstance(error.__cause__, ImportError) else "model"


# --- code of the user's own ---------------------------------------------------------------------------------------


def check_code(import_code: bool, values: dict[str, Any]) -> Iterator[Finding]:
    """Imports what `model.name` and `data.dataset` name by a dotted path, if it may be imported."""
    name, dataset = _value(values, "model", "name"), _value(values, "data", "dataset")
    if import_code and isinstance(name, str) and is_code(name):
        try:
            find_builder(name)
        except ValueError as error:
            yield "model.name", str(error), _kind_of_name(error)
    if import_code and is_data_code(dataset):
        try:
            import_function(dataset)
        except DataError as error:
            yield "data.dataset", str(error), error.kind


def _value(values: dict[str, Any], section: str, key: str) -> Any:
    """Returns a value of a recipe; None if it has no such section or key."""
    inner = values.get(section)
    return inner.get(key) if isinstance(inner, dict) else None


# --- keywords of open sections ------------------------------------------------------------------------------------

OPEN_SECTIONS: dict[str, tuple[type[Section], Callable[[str], Callable[..., Any]], tuple[str, ...]]] = {
    "model": (ModelSection, find_builder, FILLED_IN),
    "optimizer": (OptimizerSection, optimizers.OPTIMIZERS.__getitem__, ("params",)),
    "schedule": (ScheduleSection, schedules.SCHEDULES.__getitem__, ("span",)),
}
"""Open section -> its schema, name -> class or function, and the arguments that the program sets itself."""


def takes_any_keyword(builder: Callable[..., Any]) -> bool:
    """Returns whether a class or function takes `**keywords`."""
    return any(each.kind is each.VAR_KEYWORD for each in inspect.signature(builder).parameters.values())


def keywords_of(section: str, builder: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Returns the keywords that a recipe may give to a class or function in an open section, a key of OPEN_SECTIONS."""
    schema, _, filled_in = OPEN_SECTIONS[section]
    parameters = inspect.signature(builder, eval_str=True).parameters.values()
    named = {each.name: each for each in parameters if each.kind in (each.KEYWORD_ONLY, each.POSITIONAL_OR_KEYWORD)}
    return {name: each for name, each in named.items() if name not in (*filled_in, *schema.model_fields)}


def check_keywords(import_code: bool, values: dict[str, Any]) -> Iterator[Finding]:
    """Compares the keywords in open sections with the signature that takes them: names, types, required keywords.

    Args:
        import_code: a dotted path in `model.name` may be imported; if not, its keywords are not compared.
    """
    for section, (schema, find, _) in OPEN_SECTIONS.items():
        given, reserved = values.get(section, {}), schema.model_fields
        try:
            name = given.get("name", reserved["name"].default)
            if section == "model" and is_code(name) and not import_code:
                continue
            builder = find(name)
            named, takes_any = keywords_of(section, builder), takes_any_keyword(builder)
        except Exception:  # check_schema reports the section, or building the object does
            continue
        own = {key: value for key, value in given.items() if key not in reserved and value is not None}
        filled_in = set_by_trainer(name) if section == "model" else {}
        for key, value in own.items():
            if key in filled_in:
                yield f"{section}.{key}", filled_in[key], "conflict"
            elif key in named:
                for mismatch in _check_type(named[key].annotation, value):
                    yield f"{section}.{key}", *mismatch
            elif not takes_any:
                yield f"{section}.{key}", unknown_key(key, [*reserved, *named]), "unknown"
        for keyword, parameter in named.items():
            if parameter.default is parameter.empty and keyword not in own:
                yield f"{section}.{keyword}", f"{name} requires this key", "missing"


def keyword_type(annotation: Any) -> TypeAdapter[Any]:
    """Returns the pydantic type of an annotation in a signature.

    Raises:
        pydantic.errors.PydanticUserError: pydantic does not know the annotation.
    """
    kind = Any if annotation is inspect.Parameter.empty else annotation
    return TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False, arbitrary_types_allowed=True))


def _check_type(annotation: Any, value: Any) -> Iterator[tuple[str, Kind]]:
    try:
        # As JSON, because a JSON array is valid for a list and for a tuple.
        keyword_type(annotation).validate_json(json.dumps(value), strict=True)
    except pydantic.ValidationError as error:
        yield _mismatch(error.errors(), value)
    except pydantic.errors.PydanticUserError:
        return  # an annotation that pydantic cannot read: building the object checks the value


# --- combinations of values ---------------------------------------------------------------------------------------


def check_combinations(recipe: Recipe, build_network: bool = True) -> Iterator[Finding]:
    """Finds values that exclude each other. Builds optimizer, schedule and network once, without memory for weights.

    Args:
        build_network: False for the recipe in a run folder: a stranger's keywords may ask for a million layers.
    """
    yield from _check_sizes(recipe)
    if recipe.data.split is not None and recipe.data.dataset != "emnist":
        yield "data.split", f"only emnist has splits, not {recipe.data.dataset}; remove this key", "conflict"
    if recipe.data.test is not None and recipe.data.dataset not in ("mnist", "qmnist"):
        message = f"{recipe.data.test} tests mnist and qmnist, not {recipe.data.dataset}; remove this key"
        yield "data.test", message, "conflict"
    if not recipe.distill.teachers and recipe.distill != DistillSection():
        yield "distill.from", "this key is required, e.g. `distill: {from: runs/teacher}`", "missing"
    if (recipe.data.augment.mixup or recipe.data.augment.cutmix) and recipe.data.class_weights != "none":
        yield (
            "data.class_weights",
            "mixed images have no class of their own; remove mixup, cutmix or this key",
            "conflict",
        )
    if recipe.distill.teachers and recipe.data.class_weights != "none":
        yield "data.class_weights", "distillation has no class weights; remove this key or distill", "conflict"
    yield from _attempt("data.augment", recipe.data.augment.model_dump(), Augmentation)[1]
    yield from _check_training(recipe)
    if recipe.model.pretrained and recipe.model.init_from:
        yield "model.pretrained", "model.init_from gives other initial weights; remove one of the two keys", "conflict"
    model, shape = recipe.model, expected_shape(recipe)
    # A user's own class may have side effects: it is built only once, later. So is a network for images of any size.
    if build_network and shape and not is_code(model.name):
        given: dict[str, Any] = {"in_channels": shape[0], "image_size": shape[1:], "pretrained": model.pretrained}
        with torch.device("meta"):
            module, findings = _attempt("model", model.keywords, partial(build_model, model.name, **given))
        yield from findings
        if module:
            yield from check_freeze(model.freeze, [name for name, _ in module.named_parameters()])


def expected_shape(recipe: Recipe) -> tuple[int, int, int] | None:
    """Returns channels, height and width of the recipe's images; None if they follow from the images themselves."""
    data, published = recipe.data, SHAPES.get(recipe.data.dataset, (None, None, None))
    channels, size = data.channels or published[0], data.image_size or published[1:]
    height, width = (size, size) if isinstance(size, int) else size
    return (channels, height, width) if channels and height and width else None


def _check_sizes(recipe: Recipe) -> Iterator[Finding]:
    if isinstance(recipe.micro_batch_size, int) and recipe.micro_batch_size > recipe.batch_size:
        message = f"expected at most the batch_size, {recipe.batch_size}; got {recipe.micro_batch_size}"
        yield "micro_batch_size", message, "conflict"
    if recipe.logical_shards and recipe.logical_shards > recipe.batch_size:
        message = f"expected at most the batch_size, {recipe.batch_size}; got {recipe.logical_shards}"
        yield "logical_shards", message, "conflict"
    if recipe.logical_shards and recipe.sync_batchnorm:
        message = "logical_shards computes batch norm per shard; remove one of the two keys"
        yield "sync_batchnorm", message, "conflict"


def _check_training(recipe: Recipe) -> Iterator[Finding]:
    """Builds the optimizer and the schedule."""
    optimizer, schedule = recipe.optimizer, recipe.schedule
    optimizer_class, network = optimizers.OPTIMIZERS[optimizer.name], torch.nn.Linear(2, 2)
    build: Callable[..., Any] = partial(optimizers.build_optimizer, network, optimizer.name, lr=optimizer.lr or 0.1)
    own = optimizer_class.__module__.startswith("mnist_dist.")
    hint = "" if own else f"; see torch.optim.{optimizer_class.__name__}"
    yield from _attempt("optimizer", optimizer.keywords, build, hint)[1]
    build = partial(schedules.build_schedule, schedule.name, lr=optimizer.lr, steps_per_epoch=10, total_steps=100)
    built, findings = _attempt("schedule", schedule.keywords, build)
    yield from findings
    if built and built.momentum_at and not {"momentum", "betas"} & inspect.signature(optimizer_class).parameters.keys():
        yield "schedule.cycle_momentum", f"{optimizer.name} has no momentum to cycle; set this key to false", "conflict"


def _attempt(
    section: str, keywords: dict[str, Any], build: Callable[..., Any], hint: str = ""
) -> tuple[Any, list[Finding]]:
    """Builds an object; after an error that names a keyword builds it again without the keyword.

    This finds several bad values at once.

    Returns:
        The object, None if it cannot be built; and the findings.
    """
    left = dict(keywords)
    findings: list[Finding] = []
    while True:
        try:
            return build(**left), findings
        except Exception as error:  # constructors of PyTorch and other packages raise errors of many types
            message = str(error)
            if "meta " in message:  # it reads the values of weights, which a meta tensor does not have
                return None, findings
            # The keyword that the message names first. elastic_sigma precedes elastic, which is a part of its name.
            named = sorted((key for key in left if key in message), key=lambda key: (message.index(key), -len(key)))
            key = named[0] if named else None
            if key or not findings:  # an error without a key may be caused by the removal of a keyword
                kind = _kind_of(section, message, named)
                findings.append((f"{section}.{key}" if key else section, f"{message}{hint}", kind))
            if not key:
                return None, findings
            del left[key]


def _kind_of(section: str, message: str, named: list[str]) -> Kind:
    """Returns the kind of an error raised by a constructor.

    Args:
        named: keywords of the recipe that the message contains. With elastic_sigma it also contains elastic.
    """
    if "unexpected keyword" in message:
        return "unknown"
    if not named and section == "model":
        return "model"
    several = any(other not in named[0] for other in named[1:])
    return "range" if (named and not several) or message.startswith("Invalid ") else "conflict"


def check_freeze(patterns: list[str], names: list[str]) -> Iterable[Finding]:
    """Finds patterns of `model.freeze` that match no parameter, and a network whose parameters are all frozen.

    Args:
        names: of the network's parameters.
    """
    stages = dict.fromkeys(f"{name.partition('.')[0]}.*" for name in names)
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            hint = did_you_mean(pattern, [*stages, *names])
            yield "model.freeze", f"{pattern!r} matches no parameter{hint}\ntry: {', '.join(stages)}", "unknown"
    if patterns and all(any(fnmatch.fnmatch(name, pattern) for pattern in patterns) for name in names):
        yield "model.freeze", "every parameter is frozen: nothing is left to train", "conflict"
