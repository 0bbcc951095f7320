"""Sections of a recipe in general, and those that say how a run computes and reports, not what it computes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]

AboveZero = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """A section of a recipe.

    It is strict: 2.5 is not an int, "3" is not a number, and an unknown key is an error. It cannot be changed.
    """

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    def model_dump(self, **keywords: Any) -> dict[str, Any]:
        """Returns keys and values, with the keys as a recipe spells them (`from` is a reserved word in Python)."""
        return super().model_dump(**{"by_alias": True, **keywords})

    @classmethod
    def known_keys(cls) -> list[str]:
        """Returns the keys of this section as a recipe spells them."""
        return [field.alias or name for name, field in cls.model_fields.items()]


class OpenSection(Section):
    """A section that takes further keys: the keywords of the class or function that its `name` selects."""

    model_config = ConfigDict(extra="allow")

    @property
    def keywords(self) -> dict[str, Any]:
        """The keys that the schema does not list. Null means "not given", so an override can remove a key."""
        return {key: value for key, value in (self.model_extra or {}).items() if value is not None}


class EngineSection(Section):
    """How a step is computed. These keys change speed and rounding, not what is computed."""

    capture: Literal["auto", "off", "step", "epoch"] = "auto"
    """Replay training steps from a CUDA graph (GPU only). `step`: one step per replay; `epoch`: ten steps per replay,
    for networks without dropout; `auto`: one step per replay where the run allows it; `off`: never. Where capture
    is not possible, the steps run without it."""
    channels_last: bool = True
    """Store images and convolution weights in the memory layout channels-last, which most GPUs prefer. A network that
    cannot train in it trains in the contiguous layout, and the run says why."""
    tf32: Literal["off", "convolutions", "on"] = "convolutions"
    """Where a GPU may compute fp32 products in TF32 (10 bits of mantissa instead of 23): nowhere, in convolutions (the
    default of PyTorch), or in all matrix products."""
    cudnn_benchmark: bool = True
    """Let cuDNN time its kernels at the start and use the fastest (GPU only). No effect with `deterministic: true`."""
    hang_seconds: AboveZero = 60.0
    """Seconds without progress after which a run of several processes reports the hanging process and ends. Long steps
    raise the limit. Does not change the result."""


class DDPSection(Section):
    """How several processes exchange gradients."""

    comm_hook: Literal["none", "bf16", "fp16"] = "none"
    """Precision in which gradients are sent between processes. `none`: the precision of the gradients. No effect with
    `logical_shards` or FSDP."""
    find_unused_parameters: bool = False
    """Set to true for a network that does not use all its parameters in every step. In every step the processes then
    exchange which parameters were used. A GPU waits for it, and no step is captured."""


class CheckpointSection(Section):
    """When a run saves the state from which it can resume. Does not change the result."""

    every_steps: Positive | None = None
    """Steps between checkpoints. Null: only `every_minutes` counts."""
    every_minutes: AboveZero | None = 5.0
    """Minutes of training between checkpoints; a checkpoint is written at the next log line. Null: only `every_steps`
    counts."""
    elastic_seconds: AboveZero | None = 10.0
    """Seconds of training between checkpoints if the launcher restarts the processes (launch/elastic.sh): about what a
    lost machine costs. Longer if the saves would take more than a tenth of the time. Null: as in other runs."""
    keep: Positive = 2
    """Number of checkpoints kept in the run folder; older ones are deleted."""


class WandbSection(Section):
    """Weights & Biases. Does not change the result."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """`auto`: the environment variable WANDB_MODE, else online with credentials (`wandb login`) and offline without."""
    project: str | None = None
    """Project that the run belongs to. Null: the environment variable WANDB_PROJECT, else `mnist_dist`."""
    entity: str | None = None
    """User or team that owns the project. Null: WANDB_ENTITY, else the default of the account."""
    group: str | None = None
    """Group of the run. Null: WANDB_RUN_GROUP, else the recipe's `name`, so that runs with different seeds are
    grouped."""
    job_type: str | None = None
    """Job type of the run; a filter on the project page. Null: WANDB_JOB_TYPE, else `train`."""
    tags: list[str] = []
    """Tags of the run. Empty: those of WANDB_TAGS, separated by commas."""
    histograms: bool = False
    """Log histograms of all weights and of the last step's gradients at each evaluation."""


class TrackingSection(Section):
    """What is drawn and reported. Does not change the result."""

    plots: bool = True
    """Draw the pictures in the run folder's `plots/` when the run ends."""
    also: list[Literal["tensorboard", "mlflow", "trackio"]] = []
    """More trackers, which get the values of metrics.jsonl. Each writes into the run folder, in the folder of its name;
    MLflow to MLFLOW_TRACKING_URI, if it is set. Each is an extra: `pip install "mnist_dist[tensorboard]"`."""
    wandb: WandbSection = WandbSection()
    """Weights & Biases."""
