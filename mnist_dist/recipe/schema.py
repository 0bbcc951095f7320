"""The schema of a recipe: every key with its type, default, range and meaning.

The docstring below each key is its reference: `train --explain KEY`, configs/recipe.schema.json and the tables in
configs/README.md are generated from it. The packages below (data, models, engine, …) never import this module: they
take plain keywords.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, PrivateAttr, Strict, WithJsonSchema
from pydantic_core import PydanticCustomError

from mnist_dist.data import DATASETS, Augmentation, find_source
from mnist_dist.engine import optimizers, schedules
from mnist_dist.errors import Kind, Problem
from mnist_dist.models import MODELS, find_builder, is_code
from mnist_dist.recipe.file import Dumper, Origins
from mnist_dist.recipe.sections import (
    AboveZero,
    CheckpointSection,
    DDPSection,
    EngineSection,
    OpenSection,
    Positive,
    Section,
    TrackingSection,
)

# --- types of values ----------------------------------------------------------------------------------------------


_Side = Annotated[int, Field(ge=1, le=4096)]
_Size = _Side | Annotated[tuple[_Side, _Side], Strict(False)]  # YAML has lists, not tuples


def _whole(value: Any) -> Any:
    """Refuses true and 1.0, which are equal to 1 and would pass as a literal 1."""
    if isinstance(value, bool | float):
        raise PydanticCustomError("whole_number", "Input should be 1 or 3")
    return value


def _folder_name(name: str) -> str:
    if not re.fullmatch(r"\w[^/\\\x00-\x1f]{0,99}", name):
        raise ValueError(f"{name!r} cannot name a folder: a letter or digit first, no slash, at most 100 characters")
    return name


def _power_of_two(count: int) -> int:
    if count & (count - 1):
        raise ValueError(f"expected a power of two, got {count}; try {1 << (count.bit_length() - 1)}")
    return count


def _model_name(name: str) -> str:
    if not is_code(name):  # a dotted path is imported only if a person named it: see `load_recipe`
        find_builder(name)
    return name


def _dataset_name(name: str) -> str:
    find_source(name)  # a dotted path is imported only if a person named it: see `load_recipe`
    return name


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


# JSON Schemas of values that a validator changes or checks: pydantic cannot derive them.
_TEXT_OR_LIST = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}, {"type": "null"}]}
_TEXT_OR_NULL = {"anyOf": [{"type": "string"}, {"type": "null"}]}
_POWERS_OF_TWO = {"type": "integer", "enum": [2**exponent for exponent in range(11)]}
_OTHER_MODELS = {"type": "string", "pattern": "^(torchvision|timm)/.+$|^.+:.+$"}
_DATASET_NAMES = {
    "type": "string",
    "anyOf": [{"type": "string", "enum": list(DATASETS)}, {"type": "string", "pattern": "^.+:.+$"}],
}
_MODEL_NAMES = {"type": "string", "anyOf": [{"type": "string", "enum": list(MODELS)}, _OTHER_MODELS]}

Fraction = Annotated[float, Field(ge=0, le=1)]

_LEVEL = {"type": "number", "minimum": 0, "maximum": 255}

Levels = Annotated[
    float | list[float],  # the range is checked by `Augmentation`: pydantic would report both members of the union
    WithJsonSchema({"anyOf": [_LEVEL, {"type": "array", "items": _LEVEL, "minItems": 1}]}),
]

Alpha = Annotated[float, Field(ge=0, le=100)]

# --- sections -----------------------------------------------------------------------------------------------------


class ModelSection(OpenSection):
    """The network, and the weights it starts from."""

    name: Annotated[str, AfterValidator(_model_name), WithJsonSchema(_MODEL_NAMES)]
    """The network: a name of this package (`ms_ran`, `resnet18`, `simple_cnn`, …), `torchvision/<name>`,
    `timm/<name>`, or your own class or function as `package.module:Name`."""
    pretrained: bool = False
    """Start from the weights for ImageNet that torchvision or timm publishes for this network, except for its last
    layer. They are downloaded if they are not on this machine. False: random weights from `seed`, or `init_from`."""
    freeze: list[str] = []  # noqa: RUF012  # pydantic copies the default
    """Patterns of parameter names that are not trained, e.g. `layer1.*`. Batch norm layers whose parameters are all
    frozen also keep their running statistics."""
    init_from: str | None = None
    """Initial weights: a run folder (its last weights) or a .safetensors file, relative to the working directory.
    Null: random weights from `seed`."""


class OptimizerSection(OpenSection):
    """The optimizer, and its learning rate."""

    name: Literal[tuple(sorted(optimizers.OPTIMIZERS))] = "sgd"  # type: ignore[valid-type]  # made at run time for pydantic
    """A class of `torch.optim` in lower case, `lion`, or `muon`, which leaves biases, first and last layer to AdamW."""
    lr: AboveZero | None = None
    """Learning rate that the schedule scales; with the schedule `onecycle`, the rate of the first step. Null: the
    optimizer's default in PyTorch; with `onecycle`, `max_lr / div_factor`."""


class ScheduleSection(OpenSection):
    """The learning rate as a function of the step."""

    name: Literal[tuple(schedules.SCHEDULES)] = "constant"  # type: ignore[valid-type]  # made at run time for pydantic
    """The schedule. Its keywords have the names of PyTorch's scheduler; durations are in epochs. All but `onecycle` and
    `plateau` can start after a linear warm-up of `warmup_epochs`, from `warmup_start_factor` × `lr` to `lr`."""


class AugmentSection(Section):
    """Random changes of the training images, with new random numbers for every image in every epoch.

    They are made in this order: crop, flip, warp (rotation to elastic), brightness, contrast, saturation, RandAugment,
    cutout, mixing.
    """

    flip: bool = False
    """Mirror every second image, left to right."""
    crop_padding: Annotated[int, Field(ge=0)] = 0
    """Pixels by which an image is padded on every side, by its reflection, before a crop of the image's size at a
    random place. Less than the image's side."""
    rotation: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Largest rotation, in degrees; the angle is uniform in ±`rotation`."""
    translation: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Largest shift along x and along y, as a fraction of the image's side; uniform in ±`translation`, rounded to whole
    pixels."""
    scale: Annotated[tuple[AboveZero, AboveZero], Strict(False)] | None = None  # YAML has lists, not tuples
    """Zoom factor: uniform in [lowest, highest]. Null: no zoom."""
    shear: Annotated[float, Field(ge=0, lt=90)] = 0.0
    """Largest shear along x, in degrees; the angle is uniform in ±`shear`."""
    interpolation: Literal["nearest", "bilinear"] = "nearest"
    """How a warped image is sampled. Elastic displacements need `bilinear` to show movements below a pixel."""
    fill: Levels = 0.0
    """Level, 0 (black) to 255 (white), of pixels that come from outside the image and of the squares of `cutout`: one
    number, or a list with one number for each channel."""
    elastic: Annotated[float, Field(ge=0)] = 0.0
    """Elastic distortion: standard deviation of each pixel's displacement, in pixels. 0: none. 1.4 corresponds to
    Simard et al. 2003 (alpha 34, sigma 4)."""
    elastic_sigma: Annotated[float, Field(ge=3)] = 4.0
    """Distance, in pixels, over which neighbouring pixels move alike. Only with `elastic`."""
    brightness: Fraction = 0.0
    """Largest change of the brightness: the levels are multiplied by a factor uniform in 1 ± `brightness`."""
    contrast: Fraction = 0.0
    """Largest change of the contrast: the distances to the image's mean grey level are multiplied by a factor uniform
    in 1 ± `contrast`."""
    saturation: Fraction = 0.0
    """Largest change of the saturation: the distances to the grey image are multiplied by a factor uniform in
    1 ± `saturation`. No effect on images with one channel."""
    randaugment: (
        Annotated[tuple[Annotated[int, Field(ge=1, le=10)], Annotated[int, Field(ge=0, le=30)]], Strict(False)] | None
    ) = None
    """RandAugment (Cubuk et al. 2019): [operations, magnitude], the number of random operations on every image, 1 to
    10, and their strength, 0 to 30. [2, 9] is usual. Null: none."""
    cutout: Annotated[int, Field(ge=0)] = 0
    """Side, in pixels, of a square at a random place of every image that is filled with `fill` (DeVries, Taylor 2017).
    At most the image's side. 0: none."""
    mixup: Alpha = 0.0
    """Mixes every image and its label with another of the same global batch (Zhang et al. 2018). The shares are
    distributed as Beta(`mixup`, `mixup`); 0.2 gives mild mixtures. 0: none. With `cutmix` too, each image gets one of
    the two. The training accuracy then counts the predicted class with its share."""
    cutmix: Alpha = 0.0
    """Replaces a random rectangle of every image by that of another image of the same global batch, and mixes the
    labels by area (Yun et al. 2019). The areas are distributed as Beta(`cutmix`, `cutmix`); 1 is usual. 0: none."""

    def build(self) -> Augmentation:
        """Builds the augmentation that the data package computes with."""
        return Augmentation(**self.model_dump())


class DataSection(Section):
    """The data set, which of its images are used, and their augmentation."""

    dataset: Annotated[str, AfterValidator(_dataset_name), WithJsonSchema(_DATASET_NAMES)] = "mnist"
    """The data set. `folder`, `csv` and `npz` are your own images at `data.root`; `package.module:function` is your own
    function that returns (train, test), each a pair of arrays (images, labels); `hub:NAME` is a data set of Hugging
    Face's `datasets`. `digits` comes with scikit-learn and `synthetic` is generated: neither needs a download."""
    root: str | None = None
    """Folder that holds `MNIST/raw`; missing files are downloaded into it. For `folder`: the folder with train/CLASS/…
    and test/CLASS/… (or val/), or with CLASS/…, of which a fifth becomes the test set; for `csv`: a table with the
    columns path,label and perhaps split; for `npz`: an archive with train_images, train_labels, test_images and so on,
    or images and labels. Image files are decoded once, into the folder `.decoded` beside them, or ~/.cache/mnist_dist
    if that cannot be written; it may be deleted at any time. Null: the environment variable MNIST_DIST_DATA, else
    `./data`. `~` and `$VAR` are replaced."""
    place: Literal["auto", "device", "host", "disk"] = "auto"
    """Where the training images lie: `device` (memory of the GPU, or of the CPU that trains), `host` (memory of the
    host) or `disk` (a memory-mapped file, in a cache folder for a data set without a file). From `host` and `disk`, a
    thread loads the next batch. `auto`: the first that is large enough; the run prints it. No effect on the result."""
    split: Literal["balanced", "byclass", "bymerge", "letters", "digits", "mnist"] | None = None
    """Split of EMNIST; only for `dataset: emnist`. Null: `balanced`."""
    test: Literal["qmnist50k"] | None = None
    """Another test set; only for `dataset: mnist` and `qmnist`. `qmnist50k`: the 50,000 digits that QMNIST recovered.
    With them the standard error at 99.7 % is 0.024 points; with MNIST's 10,000, 0.055. Null: the usual set."""
    validation: Annotated[int, Field(ge=0)] = 0
    """Number of training images to hold out: the last ones of the training set; of your own images and of a set that is
    sorted by class, an equal share of every class by a fixed seed. Evaluations during training then use them, and the
    test set is evaluated once, at the end. 0: evaluations use the test set, or the data set's own validation images."""
    limit_train: Positive | None = None
    """Use only the first images of the training set, at most this many, counted without the `validation` images; of a
    set that is sorted by class, an equal share of every class by a fixed seed. Null: all."""
    limit_test: Positive | None = None
    """Use only the first images of the test set, at most this many; of a set that is sorted by class, an equal share
    of every class by a fixed seed. Null: all."""
    image_size: _Size | None = None
    """Height and width that all images get, in pixels: one number, or [height, width]. Null: the data set's own."""
    channels: Annotated[Literal[1, 3], BeforeValidator(_whole)] | None = None
    """1 for grey images, 3 for colour. Null: the data set's own; of files, 3 if any is in colour."""
    resize: Literal["crop", "stretch", "pad"] = "crop"
    """How an image gets another size: `crop` scales it until it covers the size and cuts off the rest; `stretch` scales
    height and width separately; `pad` puts it into the middle of a black image, reduced if it is larger."""
    on_bad_image: Literal["stop", "skip"] = "stop"
    """If image files cannot be read: `stop` names all of them and ends; `skip` leaves them out."""
    class_weights: Literal["none", "balanced"] | list[AboveZero] = "none"
    """Weight of each class in the training loss, which is the weighted mean over the batch. `balanced`: in inverse
    proportion to the number of its training images. A list: one weight for each class, in the order of the classes."""
    augment: AugmentSection = AugmentSection()
    """Random changes of the training images."""


class DistillSection(Section):
    """Learning from trained networks (Hinton et al. 2015)."""

    teachers: Annotated[
        list[str] | None, Field(alias="from"), BeforeValidator(_as_list), WithJsonSchema(_TEXT_OR_LIST)
    ] = None
    """A run folder, or a list of run folders: trained networks with the same classes. The loss then also compares
    the network's probabilities with their mean on the same augmented images. Null: no distillation."""
    weight: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Weight of the teachers in the loss; the labels have weight 1 - `weight`."""
    temperature: AboveZero = 1.0
    """Divisor of the logits of network and teachers. Above 1, unlikely classes count more."""


class EarlyStoppingSection(Section):
    """When a run ends before its last epoch."""

    patience: Positive | None = None
    """Number of evaluations in a row without a better accuracy after which the run ends. Null: the run never ends
    early."""


class Recipe(Section):
    """An experiment: everything that changes its result, and how it is saved and tracked.

    Number and kind of processes, devices and launchers are not part of a recipe.
    """

    name: Annotated[str, AfterValidator(_folder_name), WithJsonSchema(_TEXT_OR_NULL)]
    """Name of the recipe; run folders are `runs/<name>/…`. Null or absent: the name of the file."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of all random numbers: initial weights, order of the images, augmentation, dropout."""
    epochs: Positive = 1
    """Number of passes over the training set."""
    max_steps: Positive | None = None
    """Largest number of updates; the run ends here if the epochs are not over. Schedules then cover the shorter run.
    Null: no limit."""
    batch_size: Positive = 128
    """Images per update, summed over all processes."""
    micro_batch_size: Positive | Literal["auto"] | None = None
    """Images that a process computes at once; the gradients of an update are accumulated. `auto`: as many as fit into
    memory, found by halving. Null: the process's share of the batch. Changes the result only for networks with
    batch norm or dropout, apart from rounding."""
    sync_batchnorm: bool = False
    """Compute batch norm statistics over the global batch instead of each process's share."""
    logical_shards: (
        Annotated[int, Field(ge=1, le=1024), AfterValidator(_power_of_two), WithJsonSchema(_POWERS_OF_TWO)] | None
    ) = None
    """Cut the global batch into this many fixed pieces (a power of two), so that every number of processes up to it
    gives identical bytes. Null: one piece per process."""
    eval_batch_size: Positive = 500
    """Images per evaluation batch, the same at every number of processes. Changes the result only for networks that
    normalize by the evaluated batch (`simple_cnn`)."""
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    """`no`: fp32. `fp16` needs a GPU. `bf16` is slow on a CPU without AVX-512. Null: the launcher's, else `no`."""
    clip_grad_norm: AboveZero | None = None
    """Largest L2 norm of the gradient; a longer gradient is scaled down. Null: no clipping."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the label's probability that the training loss spreads evenly over all classes."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """If a gradient is not finite: `stop` ends the run before the update and names the cause; `skip` skips the
    update."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay per step of an exponential moving average of the weights, which is evaluated and saved instead of the
    trained weights. Null: no average."""
    compile: bool | Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = False
    """Compile the network with `torch.compile`: true, or one of its modes. Changes rounding and, on a GPU, the random
    numbers of dropout. The first steps take seconds to minutes."""
    deterministic: bool = True
    """Use deterministic kernels only. False allows faster kernels on a GPU; two runs then differ in rounding."""
    eval_every: Positive = 1
    """Epochs between evaluations; the last step is always evaluated."""
    log_every: Positive = 50
    """Steps between log lines."""
    early_stopping: EarlyStoppingSection = EarlyStoppingSection()
    """When the run ends before its last epoch."""
    model: ModelSection
    """The network."""
    data: DataSection = DataSection()
    """The data set, which of its images are used, and their augmentation."""
    distill: DistillSection = DistillSection()
    """Learning from trained networks."""
    optimizer: OptimizerSection = OptimizerSection()
    """The optimizer and its learning rate."""
    schedule: ScheduleSection = ScheduleSection()
    """The learning rate as a function of the step."""
    engine: EngineSection = EngineSection()
    """How a step is computed."""
    ddp: DDPSection = DDPSection()
    """How several processes exchange gradients."""
    checkpoint: CheckpointSection = CheckpointSection()
    """When the run saves the state from which it can resume."""
    tracking: TrackingSection = TrackingSection()
    """What is drawn and reported."""

    _origins: Origins = PrivateAttr(default_factory=lambda: Origins())

    def to_yaml(self) -> str:
        """Returns the resolved recipe as YAML, which loads as an equal recipe."""
        return yaml.dump(self.model_dump(), Dumper=Dumper, sort_keys=False)

    def may_import(self, key: str) -> bool:
        """Returns whether a person, not a file of a run, has named the code in the value of a dotted key."""
        return self._origins.are_trusted(key)

    def problem(self, key: str, message: str, kind: Kind) -> Problem:
        """Returns a problem with the value of a dotted key, located at the file and line that gave the value."""
        return self._origins.problem(key, message, kind)
