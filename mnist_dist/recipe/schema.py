"""What a recipe may say: the schema, its checks, and how a recipe is put together from file and overrides.

A value travels: schema default < file < `key=value` on the command line -> typed and checked, every problem in one
message -> the resolved recipe. The packages below (data, models, engine, …) never import this module: they take plain
keywords.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, Strict

from mnist_dist.data import DATASETS, Augmentation
from mnist_dist.engine import optimizers, schedules
from mnist_dist.errors import Kind, Problem
from mnist_dist.models import find_builder
from mnist_dist.recipe.file import Dumper, Origins

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
    name: Literal[tuple(sorted(optimizers.OPTIMIZERS))] = "sgd"  # type: ignore[valid-type]  # made while running; pydantic reads it
    """The lower-case name of a `torch.optim` class; its own keywords stand beside it."""
    lr: AboveZero | None = None
    """Null: PyTorch's default; with schedule onecycle: `max_lr / div_factor`."""


class ScheduleSection(OpenSection):
    name: Literal[tuple(schedules.SCHEDULES)] = "constant"  # type: ignore[valid-type]  # made while running; pydantic reads it
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
    plots: bool = True
    """Draw the pictures of the run folder's `plots/` when the run ends."""
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

    def problem(self, key: str, message: str, kind: Kind = "usage") -> Problem:
        """A problem with the value of a dotted key, placed at the file and line that gave it."""
        return self._origins.problem(key, message, kind)
