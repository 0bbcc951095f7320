"""What a recipe may say: the schema, the YAML file, overrides, and error messages that name file, line and key.

A value travels: schema default < file < `key=value` on the command line -> typed and checked, every problem in one
message -> the resolved recipe. Only doors import this module; the rooms take plain keywords.
"""

from __future__ import annotations

import difflib
import fnmatch
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field

from mnist_dist.data import DATASETS, Augmentation
from mnist_dist.engine import optim
from mnist_dist.models import MODELS, build_model, find_builder

# --- schema -------------------------------------------------------------------------------------------------------

Positive = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Strict: 2.5 is not an int, "3" is not a number, an unknown key is refused, and nothing changes afterwards."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class OpenSection(Section):
    """A section whose further keys are the own keywords of what it names."""

    model_config = ConfigDict(extra="allow")

    name: str

    @property
    def keywords(self) -> dict[str, Any]:
        """The keys beyond the schema's; null means not given, so an override can take a key away."""
        return {key: value for key, value in (self.model_extra or {}).items() if value is not None}


class ModelSection(OpenSection):
    name: str
    """ms_ran, resnet18 … resnet152, simple_cnn, …, `torchvision/<name>`, `timm/<name>` or `package.module:Name`."""
    freeze: list[str] = []
    """Patterns of parameter names that are not trained, e.g. `layer1.*`."""


class OptimizerSection(OpenSection):
    name: str = "sgd"
    """The lower-case name of a `torch.optim` class; its own keywords stand beside it."""
    lr: Annotated[float, Field(gt=0)] | None = None
    """Null: PyTorch's default; with schedule onecycle: `max_lr / div_factor`."""


class ScheduleSection(OpenSection):
    name: str = "constant"
    """constant, step, cosine, onecycle, plateau or linear; PyTorch's own keywords, durations in epochs."""


class AugmentSection(Section):
    rotation: float = 0.0
    """Degrees, uniform in ±."""
    translation: float = 0.0
    """Fraction of the side, uniform in ±, in whole pixels."""
    scale: list[float] | None = None
    """[lowest, highest] zoom."""
    shear: float = 0.0
    """Degrees along x, uniform in ±."""
    interpolation: Literal["nearest", "bilinear"] = "nearest"
    fill: float = 0.0
    """Grey level, 0 to 255, of what comes in from outside."""

    def build(self) -> Augmentation:
        values = self.model_dump()
        return Augmentation(**{**values, "scale": tuple(values["scale"]) if values["scale"] else None})


class DataSection(Section):
    dataset: str = "mnist"
    root: str | None = None
    """The folder that holds MNIST/raw; null: the environment variable MNIST_DIST_DATA, else ./data."""
    split: str | None = None
    """EMNIST's split; null: balanced."""
    validation: Annotated[int, Field(ge=0)] = 0
    """So many training images are held out; evaluation while training is then on them, the test set is used once."""
    limit_train: Positive | None = None
    limit_test: Positive | None = None
    augment: AugmentSection = AugmentSection()


class EarlyStoppingSection(Section):
    patience: Positive | None = None
    """Evaluations without a better accuracy before the run ends; null: never."""


class EngineSection(Section):
    channels_last: bool = True
    """Memory layout of images and convolutions; changes rounding, never meaning."""


class WandbSection(Section):
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online with credentials, offline without."""
    project: str = "mnist_dist"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = []


class TrackingSection(Section):
    wandb: WandbSection = WandbSection()


class Recipe(Section):
    """An experiment: all that changes its result. Processes, launcher and device are not in it."""

    name: str
    """Null or absent in a file: the file's own name."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    epochs: Positive = 1
    max_steps: Positive | None = None
    """End after so many updates if the epochs are not over before; schedules span the shorter run."""
    batch_size: Positive = 128
    """Global: the sum over all processes."""
    micro_batch_size: Positive | None = None
    """Samples a process computes at once; null: its whole share. Never changes the update but for batch norm."""
    eval_batch_size: Positive = 500
    """Evaluation's fixed batches; matters only to networks that normalise by the evaluated batch (simple_cnn)."""
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    """Null: the launcher's."""
    clip_grad_norm: Annotated[float, Field(gt=0)] | None = None
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Averaged weights, which are then the ones evaluated and saved."""
    deterministic: bool = True
    """Deterministic kernels only; false lets a GPU choose faster ones, and runs then differ in rounding."""
    eval_every: Positive = 1
    """Epochs between evaluations; the last step is always evaluated."""
    log_every: Positive = 50
    """Steps between log lines."""
    early_stopping: EarlyStoppingSection = EarlyStoppingSection()
    model: ModelSection
    data: DataSection = DataSection()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    engine: EngineSection = EngineSection()
    tracking: TrackingSection = TrackingSection()

    def to_yaml(self) -> str:
        """The resolved recipe; loads back to an equal one."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)


# --- problems -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    where: str
    """File and line, or the command line."""
    key: str
    message: str

    def __str__(self) -> str:
        head = f"{self.where}: {self.key}" if self.key else self.where
        return f"  {head}\n      {self.message}"


class RecipeError(ValueError):
    """Something the user can put right; its text is the whole screen to show."""

    def __init__(self, problems: list[Problem]):
        self.problems = problems
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n".join([f"{count}; nothing was trained:", *map(str, problems)]))


def did_you_mean(word: str, known: list[str]) -> str:
    """A sentence with the nearest known words and all of them."""
    near = difflib.get_close_matches(word, known, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    return f"{hint}known: {', '.join(known)}" if known else f"{hint}none is taken here"


# --- YAML ---------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars: `1e-3` is a float, `no` is text, `010` is text."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in [
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", r"<<", "<"),
]:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first))


def _keys_with_lines(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            path = f"{prefix}{key.value}"
            yield path, key.start_mark.line + 1
            yield from _keys_with_lines(value, f"{path}.")


@dataclass
class _Draft:
    """A recipe while it is put together: the merged values, and where each came from."""

    source: str
    values: dict[str, Any]
    origins: dict[str, str]

    def problem(self, key: str, message: str) -> Problem:
        """A problem placed at the key, or at the nearest section around it that somebody wrote."""
        path = key
        while path and path not in self.origins:
            path = path.rpartition(".")[0]
        return Problem(self.origins.get(path, self.source), key, message)


def _read(path: Path) -> _Draft:
    def refuse(message: str, line: int | None = None) -> RecipeError:
        return RecipeError([Problem(f"{path}:{line}" if line else str(path), "", message)])

    try:
        text = path.read_text(encoding="utf-8")
        loader = _Loader(text)
        node = loader.get_single_node()
        values = loader.construct_document(node) if node else None
    except UnicodeDecodeError as error:
        raise refuse(f"not a text file ({error.reason} at byte {error.start}); a recipe is YAML in UTF-8") from error
    except OSError as error:
        raise refuse(f"cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        detail = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise refuse(f"not valid YAML: {detail}", mark.line + 1 if mark else None) from error
    if not isinstance(values, dict):
        raise refuse("a recipe is a mapping of keys to values, such as `epochs: 10`; this file holds none")
    origins: dict[str, str] = {}
    try:
        for key, line in _keys_with_lines(node):
            if key in origins:
                raise refuse(f"{key} is given twice, here and at {origins[key]}; keep one", line)
            origins[key] = f"{path}:{line}"
    except RecursionError as error:
        raise refuse("not valid YAML for a recipe: a section contains itself") from error
    values.setdefault("name", path.stem)
    return _Draft(str(path), values, origins)


def _override(draft: _Draft, words: tuple[str, ...]) -> list[Problem]:
    problems = []
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", key):
            problems.append(
                Problem(f"command line: {word}", "", "an override is written key=value, e.g. optimizer.lr=0.05")
            )
            continue
        try:
            value = yaml.load(text, _Loader)
        except (yaml.YAMLError, ValueError) as error:
            problems.append(Problem(f"command line: {word}", key, f"not a YAML value: {str(error).splitlines()[0]}"))
            continue
        *sections, last = key.split(".")
        target = draft.values
        for section in sections:
            if target.get(section) is None:
                target[section] = {}
            target = target[section]
            if not isinstance(target, dict):
                break
        if isinstance(target, dict):
            target[last] = value
            draft.origins[key] = f"command line: {word}"
        else:
            problems.append(Problem(f"command line: {word}", key, f"{section} is one value, not a section with keys"))
    return problems


# --- where recipes lie --------------------------------------------------------------------------------------------


def bundled_recipes() -> dict[str, Path]:
    """Name -> file of every recipe in configs/, in the repository or in an installed wheel."""
    package = Path(__file__).parent
    folder = next((f for f in (package / "configs", package.parent / "configs") if f.is_dir()), None)
    if folder is None:
        return {}
    files = sorted(folder.rglob("*.yaml"))
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}


def find_recipe(name: str | Path) -> Path:
    """A path as it stands, else a bundled recipe by name, with or without `.yaml`."""
    path = Path(name)
    if path.is_file():
        return path
    bundled = bundled_recipes()
    stem = path.as_posix().removesuffix(".yaml")
    matches = [file for key, file in bundled.items() if stem in (key, key.rpartition("/")[2])]
    if matches:
        return matches[0]
    kind = "a folder, not a recipe; inside a run folder it is recipe.yaml" if path.is_dir() else "no such recipe"
    raise RecipeError([Problem(f"--recipe {name}", "", f"{kind}; {did_you_mean(stem, list(bundled))}")])


def recipe_notes(path: Path) -> dict[str, str]:
    """The `# key: value` lines of a recipe's head comment: command, document, claim, measured."""
    lines = path.read_text(encoding="utf-8").splitlines()
    pairs = (re.fullmatch(r"#\s*(\w+):\s+(.*)", line) for line in lines if line.startswith("#"))
    return {pair[1]: pair[2] for pair in pairs if pair}


# --- loading ------------------------------------------------------------------------------------------------------


def load_recipe(name: str | Path, *overrides: str) -> Recipe:
    """Reads, merges, types and checks a recipe.

    Args:
        name: a path, or the name of a bundled recipe.
        overrides: `key=value` words with dotted keys, e.g. "optimizer.lr=0.05".

    Raises:
        RecipeError: with every problem there is.
    """
    draft = _read(find_recipe(name))
    problems = _override(draft, overrides)
    recipe = None
    try:
        recipe = Recipe.model_validate(draft.values)
    except pydantic.ValidationError as error:
        problems += [draft.problem(*_describe(details, draft.values)) for details in error.errors()]
    for key, message in _check_choices(draft.values):
        problems.append(draft.problem(key, message))
    if recipe is not None and not problems:
        problems = [draft.problem(key, message) for key, message in _check_combinations(recipe)]
    if problems or recipe is None:
        raise RecipeError(problems)
    return _resolve(recipe)


def _resolve(recipe: Recipe) -> Recipe:
    """Writes out the one default that depends on another key: PyTorch's learning rate for the optimizer."""
    if recipe.optimizer.lr is not None or recipe.schedule.name == "onecycle":
        return recipe
    lr = optim.default_lr(recipe.optimizer.name)
    return recipe.model_copy(update={"optimizer": recipe.optimizer.model_copy(update={"lr": lr})})


def _describe(details: Any, values: dict[str, Any]) -> tuple[str, str]:
    """pydantic's error as (dotted key, sentence)."""
    location, given, kind = details["loc"], details["input"], details["type"]
    key = ".".join(str(part) for part in location)
    if kind == "extra_forbidden":
        section = Recipe
        for part in location[:-1]:
            section = section.model_fields[part].annotation  # type: ignore[assignment]
        return key, f"unknown key; {did_you_mean(str(location[-1]), list(section.model_fields))}"
    if kind == "missing":
        return key, "this key is needed, e.g. `model: {name: simple_cnn}`" if location[0] == "model" else "needed"
    sentences = {
        "int_type": "a whole number",
        "int_parsing": "a whole number",
        "int_from_float": "a whole number",
        "float_type": "a number",
        "bool_type": "true or false",
        "string_type": "text",
        "list_type": "a list, e.g. [a, b]",
        "model_type": "a section with keys of its own",
        "model_attributes_type": "a section with keys of its own",
        "finite_number": "a finite number",
        "literal_error": "one of " + str(details.get("ctx", {}).get("expected", "")).replace("'", ""),
    }
    expected = sentences.get(kind) or details["msg"].removeprefix("Input should be ")
    hint = ""
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", details["ctx"]["expected"])
        near = difflib.get_close_matches(str(given), choices, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
    return key, f"expected {expected}, got {given!r}{hint}"


# --- checks that pydantic cannot make -----------------------------------------------------------------------------


def _choices(section: str) -> tuple[list[str], Callable[[str], Any], int]:
    """For a section: its known names, name -> callable, and how many leading parameters are not the user's."""
    return {
        "model": (list(MODELS), find_builder, 0),
        "optimizer": (sorted(optim.OPTIMIZERS), optim.OPTIMIZERS.__getitem__, 1),
        "schedule": (list(optim.SCHEDULES), optim.SCHEDULES.__getitem__, 1),
    }[section]


def _check_choices(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Names and own keywords of model, optimizer and schedule; works on raw values so that one wrong key hides none."""
    for section, schema in (("model", ModelSection), ("optimizer", OptimizerSection), ("schedule", ScheduleSection)):
        given = values.get(section, {})
        name = given.get("name", schema.model_fields["name"].default) if isinstance(given, dict) else None
        if not isinstance(name, str):
            continue  # the schema has said so already
        names, find, skip = _choices(section)
        try:
            target = find(name)
        except (KeyError, ValueError) as error:
            what = (
                str(error)
                if isinstance(error, ValueError)
                else f"unknown {section} {name!r}; {did_you_mean(name, names)}"
            )
            yield f"{section}.name", what
            continue
        own = {k: v for k, v in given.items() if k not in schema.model_fields and v is not None}
        for key, message in _check_keywords(target, own, skip, list(schema.model_fields)):
            yield f"{section}.{key}", message
    dataset = values["data"].get("dataset") if isinstance(values.get("data"), dict) else None
    if isinstance(dataset, str) and dataset not in DATASETS:
        yield "data.dataset", f"unknown data set {dataset!r}; {did_you_mean(dataset, list(DATASETS))}"


def _check_keywords(
    target: Callable[..., Any], keywords: dict[str, Any], skip: int, reserved: list[str]
) -> Iterator[tuple[str, str]]:
    """Each keyword against the callable's own signature: known, and of the annotated type."""
    parameters = list(inspect.signature(target, eval_str=False).parameters.values())[skip:]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    named = {p.name: p for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    named.pop("num_classes", None)  # the data set's to say
    hints = _type_hints(target)
    for key, value in keywords.items():
        if key not in named:
            if not takes_any:
                known = [*reserved, *(k for k in named if k not in reserved)]
                yield key, f"unknown key; {did_you_mean(key, known)}"
            continue
        try:
            adapter = pydantic.TypeAdapter(hints.get(key, Any), config=ConfigDict(arbitrary_types_allowed=True))
            adapter.validate_python(tuple(value) if isinstance(value, list) else value, strict=True)
        except pydantic.ValidationError as error:
            wanted = "; or ".join(dict.fromkeys(e["msg"].removeprefix("Input should be ") for e in error.errors()))
            yield key, f"expected {wanted}, got {value!r}"
        except pydantic.errors.PydanticUserError:
            continue  # an annotation pydantic cannot read: the callable itself will judge
    for name, parameter in named.items():
        needed = parameter.default is parameter.empty and name not in keywords and name not in reserved
        if needed and parameter.kind is parameter.KEYWORD_ONLY:
            yield name, "this key is needed"


def _type_hints(target: Callable[..., Any]) -> dict[str, Any]:
    function = target.__init__ if inspect.isclass(target) else target
    try:
        return inspect.get_annotations(function, eval_str=True)
    except Exception:  # annotations of foreign code may name what cannot be imported
        return {}


def _check_combinations(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """What only shows when parts meet: each is built once, small or without memory, and asked."""
    try:
        recipe.data.augment.build()
    except ValueError as error:
        yield "data.augment", str(error)
    if recipe.micro_batch_size and recipe.micro_batch_size > recipe.batch_size:
        yield "micro_batch_size", f"{recipe.micro_batch_size} is more than batch_size {recipe.batch_size}"
    if recipe.data.split is not None and recipe.data.dataset != "emnist":
        yield "data.split", f"only emnist has splits, not {recipe.data.dataset}"
    lr = recipe.optimizer.lr or (
        None if recipe.schedule.name == "onecycle" else optim.default_lr(recipe.optimizer.name)
    )
    try:
        parameter = torch.nn.Parameter(torch.zeros(2, 2))
        optim.build_optimizer([parameter], recipe.optimizer.name, lr=lr or 0.1, **recipe.optimizer.keywords)
    except (ValueError, TypeError, RuntimeError) as error:
        yield "optimizer", f"{recipe.optimizer.name} refuses these values: {error}"
    try:
        keywords = recipe.schedule.keywords
        schedule = optim.build_schedule(recipe.schedule.name, lr=lr, steps_per_epoch=10, total_steps=100, **keywords)
        if schedule.momentum_at and not {"momentum", "betas"} & set(_signature_names(recipe.optimizer.name)):
            yield "schedule.cycle_momentum", f"{recipe.optimizer.name} has no momentum to cycle; set it to false"
    except (ValueError, TypeError) as error:
        yield "schedule", str(error)
    if ":" not in recipe.model.name:  # a user's own class may do anything when built: build it once only
        yield from _check_model(recipe)


def _signature_names(optimizer: str) -> list[str]:
    return list(inspect.signature(optim.OPTIMIZERS[optimizer]).parameters)


def _check_model(recipe: Recipe) -> Iterator[tuple[str, str]]:
    try:
        with torch.device("meta"):
            names = [name for name, _ in build_model(recipe.model.name, **recipe.model.keywords).named_parameters()]
    except (ValueError, TypeError) as error:
        yield "model", str(error)
        return
    yield from check_freeze(recipe.model.freeze, names)


def check_freeze(patterns: list[str], names: list[str]) -> Iterator[tuple[str, str]]:
    """Every pattern must match a parameter name, and something must be left to train."""
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            near = difflib.get_close_matches(pattern, [f"{n.split('.')[0]}.*" for n in names] + names, n=1, cutoff=0)
            yield "model.freeze", f"{pattern!r} matches no parameter; did you mean {near[0]!r}?"
    if patterns and all(any(fnmatch.fnmatch(name, pattern) for pattern in patterns) for name in names):
        yield "model.freeze", "every parameter is frozen: nothing is left to train"
