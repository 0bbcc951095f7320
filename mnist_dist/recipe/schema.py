"""What a recipe may say: the schema, its checks, and how a recipe is put together from file and overrides.

A value travels: schema default < file < `key=value` on the command line -> typed and checked, every problem in one
message -> the resolved recipe. The packages below (data, models, engine, …) never import this module: they take plain
keywords.
"""

from __future__ import annotations

import fnmatch
import inspect
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import torch
import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, Strict, TypeAdapter

from mnist_dist.data import DATASETS, Augmentation
from mnist_dist.engine import optimizers as optim
from mnist_dist.errors import Problem, RecipeError, did_you_mean, unknown_key
from mnist_dist.models import build_model, find_builder
from mnist_dist.recipe.file import Dumper, Origins, apply_overrides, find_recipe, read_recipe

# --- schema -------------------------------------------------------------------------------------------------------

Positive = Annotated[int, Field(ge=1)]
AboveZero = Annotated[float, Field(gt=0)]


def _a_folder(name: str) -> str:
    if not re.fullmatch(r"\w[^/\\\x00-\x1f]{0,99}", name):
        raise ValueError(f"{name!r} cannot name a folder: a letter or digit first, no slash, at most 100 characters")
    return name


def _a_power_of_two(count: int) -> int:
    if count & (count - 1):
        raise ValueError(f"expected a power of two, got {count}; try {1 << (count.bit_length() - 1)}")
    return count


def _a_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class Section(BaseModel):
    """Strict: 2.5 is not an int, "3" is not a number, an unknown key is refused, and nothing changes afterwards."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    def model_dump(self, **keywords: Any) -> dict[str, Any]:
        """With the keys as a recipe spells them: one of them, `from`, is a word of Python's."""
        return super().model_dump(**{"by_alias": True, **keywords})

    @classmethod
    def known_keys(cls) -> list[str]:
        return [field.alias or name for name, field in cls.model_fields.items()]


class OpenSection(Section):
    """A section whose further keys are the own keywords of what it names."""

    model_config = ConfigDict(extra="allow")

    @property
    def keywords(self) -> dict[str, Any]:
        """The keys beyond the schema's; null means not given, so an override can take a key away."""
        return {key: value for key, value in (self.model_extra or {}).items() if value is not None}


class ModelSection(OpenSection):
    name: Annotated[str, AfterValidator(lambda name: find_builder(name) and name)]
    """ms_ran, resnet18 … resnet152, simple_cnn, …, `torchvision/<name>`, `timm/<name>` or `package.module:Name`."""
    freeze: list[str] = []
    """Patterns of parameter names that are not trained, e.g. `layer1.*`."""
    init_from: str | None = None
    """Weights to begin with: of a run folder the last ones, or a .safetensors file; from the working directory."""


class OptimizerSection(OpenSection):
    name: Literal[tuple(sorted(optim.OPTIMIZERS))] = "sgd"  # type: ignore[valid-type]  # made while running; pydantic reads it
    """The lower-case name of a `torch.optim` class; its own keywords stand beside it."""
    lr: AboveZero | None = None
    """Null: PyTorch's default; with schedule onecycle: `max_lr / div_factor`."""


class ScheduleSection(OpenSection):
    name: Literal[tuple(optim.SCHEDULES)] = "constant"  # type: ignore[valid-type]  # made while running; pydantic reads it
    """PyTorch's own keywords stand beside it; durations are in epochs."""


class AugmentSection(Section):
    rotation: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Degrees, uniform in ±."""
    translation: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Fraction of the side, uniform in ±, in whole pixels."""
    scale: Annotated[tuple[AboveZero, AboveZero], Strict(False)] | None = None  # YAML has lists, not tuples
    """[lowest, highest] zoom."""
    shear: Annotated[float, Field(ge=0, lt=90)] = 0.0
    """Degrees along x, uniform in ±."""
    interpolation: Literal["nearest", "bilinear"] = "nearest"
    fill: Annotated[float, Field(ge=0, le=255)] = 0.0
    """Grey level of what comes in from outside."""
    elastic: Annotated[float, Field(ge=0)] = 0.0
    """Pixels, standard deviation of a smooth random displacement; 1.4 is that of Simard et al. 2003."""
    elastic_sigma: Annotated[float, Field(ge=3)] = 4.0
    """Pixels over which neighbours are displaced alike."""

    def build(self) -> Augmentation:
        return Augmentation(**self.model_dump())


class DataSection(Section):
    dataset: Literal[tuple(DATASETS)] = "mnist"  # type: ignore[valid-type]  # made while running; pydantic reads it
    root: str | None = None
    """The folder that holds MNIST/raw; null: the environment variable MNIST_DIST_DATA, else ./data."""
    split: Literal["balanced", "byclass", "bymerge", "letters", "digits", "mnist"] | None = None
    """EMNIST's; null: balanced."""
    validation: Annotated[int, Field(ge=0)] = 0
    """So many training images are held out; evaluation while training is then on them, the test set is used once."""
    limit_train: Positive | None = None
    limit_test: Positive | None = None
    augment: AugmentSection = AugmentSection()


class DistillSection(Section):
    teachers: Annotated[list[str] | None, Field(alias="from"), BeforeValidator(_a_list)] = None
    """A run folder, or a list of them: trained networks of the same classes to learn from; null: none. What they say
    of the same augmented images counts beside the labels (Hinton et al. 2015)."""
    weight: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Of the teachers; the labels have the rest."""
    temperature: AboveZero = 1.0
    """Divides the logits of both sides: above 1 the less likely classes count more."""


class EarlyStoppingSection(Section):
    patience: Positive | None = None
    """Evaluations without a better accuracy before the run ends; null: never."""


class EngineSection(Section):
    capture: Literal["auto", "off", "step", "epoch"] = "auto"
    """Of a GPU: replay a step from one CUDA graph; changes rounding, never meaning. auto: where it can be done; epoch:
    ten steps a replay between two looks at the weights, for networks without dropout."""
    channels_last: bool = True
    """Memory layout of images and convolutions; changes rounding, never meaning."""
    tf32: Literal["off", "convolutions", "on"] = "convolutions"
    """Of a GPU, in fp32: where products keep 10 bits of mantissa, not 23; convolutions: as PyTorch does by default."""
    cudnn_benchmark: bool = True
    """Of a GPU: try cuDNN's kernels and take the fastest, which may round otherwise; not with `deterministic`."""
    hang_seconds: AboveZero = 60.0
    """Of several processes: when nothing moves for so long, the one that hangs is named and all end."""


class DDPSection(Section):
    comm_hook: Literal["none", "bf16", "fp16"] = "none"
    """Precision in which gradients travel between processes."""
    find_unused_parameters: bool = False
    """For networks that leave parameters out of some steps; costs a search every step."""


class CheckpointSection(Section):
    every_steps: Positive | None = None
    every_minutes: AboveZero | None = 5.0
    """Minutes of training between checkpoints, to the next log line."""
    keep: Positive = 2


class WandbSection(Section):
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online with credentials, offline without."""
    project: str = "mnist_dist"
    entity: str | None = None
    group: str | None = None
    """Null: the recipe's name, so that its seeds stand together."""
    job_type: str = "train"
    tags: list[str] = []
    histograms: bool = False
    """Of all weights, and of the last step's gradients, at each evaluation."""


class TrackingSection(Section):
    wandb: WandbSection = WandbSection()


class Recipe(Section):
    """An experiment: all that changes its result, and how it is saved and tracked.

    How many processes compute it, on what devices and by which launcher is not in it.
    """

    name: Annotated[str, AfterValidator(_a_folder)]
    """Of the run; null or absent in a file: the file's own."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    epochs: Positive = 1
    max_steps: Positive | None = None
    """End after so many updates if the epochs are not over before; schedules span the shorter run."""
    batch_size: Positive = 128
    """Global: the sum over all processes."""
    micro_batch_size: Positive | Literal["auto"] | None = None
    """Samples a process computes at once; null: its whole share; auto: as many as fit into memory, found by halving.
    Never changes the update but for batch norm."""
    sync_batchnorm: bool = False
    """Batch norm over the global batch instead of each process's share."""
    logical_shards: Annotated[int, Field(ge=1, le=1024), AfterValidator(_a_power_of_two)] | None = None
    """Cut the global batch into so many fixed pieces: the same bytes at every world size that divides them."""
    eval_batch_size: Positive = 500
    """Evaluation's fixed batches; matters only to networks that normalise by the evaluated batch (simple_cnn)."""
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    """Null: the launcher's."""
    clip_grad_norm: AboveZero | None = None
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """Before an update whose gradient is not finite: end the run and say why, or pass over that step."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Averaged weights, which are then the ones evaluated and saved."""
    compile: bool | Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = False
    """`torch.compile` of the network, true or its mode; changes rounding, and on a GPU what dropout drops. Its first
    steps take seconds to minutes."""
    deterministic: bool = True
    """Deterministic kernels only; false lets a GPU choose faster ones, and runs then differ in rounding."""
    eval_every: Positive = 1
    """Epochs between evaluations; the last step is always evaluated."""
    log_every: Positive = 50
    """Steps between log lines."""
    early_stopping: EarlyStoppingSection = EarlyStoppingSection()
    model: ModelSection
    data: DataSection = DataSection()
    distill: DistillSection = DistillSection()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    engine: EngineSection = EngineSection()
    ddp: DDPSection = DDPSection()
    checkpoint: CheckpointSection = CheckpointSection()
    tracking: TrackingSection = TrackingSection()

    _origins: Origins = PrivateAttr(default_factory=lambda: Origins())

    def to_yaml(self) -> str:
        """The resolved recipe; loads back to an equal one."""
        return yaml.dump(self.model_dump(), Dumper=Dumper, sort_keys=False)

    def problem(self, key: str, message: str) -> Problem:
        """A problem with the value of a dotted key, placed at the file and line that gave it."""
        return self._origins.problem(key, message)


# --- loading ------------------------------------------------------------------------------------------------------


def load_recipe(name: str | Path, *overrides: str) -> Recipe:
    """Reads, merges, types and checks a recipe.

    Args:
        name: a path, or the name of a bundled recipe.
        overrides: `key=value` words with dotted keys, e.g. "optimizer.lr=0.05".

    Raises:
        RecipeError: with every problem there is.
    """
    path = find_recipe(name)
    values, origins = read_recipe(path)
    problems = list(apply_overrides(values, origins, overrides))
    if values.get("name") is None:
        values["name"] = path.stem
    for check in (_check_schema, _check_keywords):
        problems += [origins.problem(key, message) for key, message in check(values)]
    recipe = _sound(values, {problem.key.partition(".")[0] for problem in problems})
    problems += [origins.problem(key, message) for key, message in _check_combinations(recipe)]
    if problems:
        raise RecipeError(problems)
    recipe._origins = origins
    return recipe


def _sound(values: dict[str, Any], faulty: set[str]) -> Recipe:
    """The resolved recipe, with defaults for what is faulty, so that no mistake hides another."""
    if "batch_size" in faulty:
        faulty |= {"micro_batch_size", "logical_shards"}  # which are judged by it
    stand_ins = {"name": "recipe", "model": {"name": "lenet5"}}
    sound = {key: value for key, value in values.items() if key.partition(".")[0] not in faulty}
    recipe = Recipe.model_validate(stand_ins | sound)
    if recipe.optimizer.lr is not None or recipe.schedule.name == "onecycle":
        return recipe
    # The one default that depends on another key: PyTorch's learning rate for the optimizer.
    lr = optim.default_lr(recipe.optimizer.name)
    return recipe.model_copy(update={"optimizer": recipe.optimizer.model_copy(update={"lr": lr})})


# --- checks: each finds pairs of a dotted key and what is wrong with its value -------------------------------------

Findings = Iterable[tuple[str, str]]


def _check_schema(values: dict[str, Any]) -> Findings:
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


def _check_keywords(values: dict[str, Any]) -> Findings:
    """Own keywords against the signature of what takes them: known, of the annotated type, and none missing."""
    for section, schema, find, ours in (
        ("model", ModelSection, find_builder, "num_classes"),
        ("optimizer", OptimizerSection, optim.OPTIMIZERS.__getitem__, "params"),
        ("schedule", ScheduleSection, optim.SCHEDULES.__getitem__, "span"),
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


def _check_combinations(recipe: Recipe) -> Findings:
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

    kind, parameter = optim.OPTIMIZERS[optimizer.name], torch.nn.Parameter(torch.zeros(2, 2))
    build: Callable[..., Any] = partial(optim.build_optimizer, [parameter], optimizer.name, lr=optimizer.lr or 0.1)
    yield from _attempt("optimizer", optimizer.keywords, build, f"; see torch.optim.{kind.__name__}")[1]
    build = partial(optim.build_schedule, schedule.name, lr=optimizer.lr, steps_per_epoch=10, total_steps=100)
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
