"""The steps and the data of a checkpoint, and what happens if the batch size, the data or the length changes."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

from mnist_dist.data import Images
from mnist_dist.engine.schedules import Schedule, build_schedule
from mnist_dist.errors import Problem, RecipeError
from mnist_dist.recipe.schema import Recipe
from mnist_dist.run.text_output import listed


@dataclass(frozen=True)
class Plan:
    """The sizes that determine the samples of each step and the length of the run. Every checkpoint holds them."""

    num_samples: int
    batch_size: int
    total_steps: int

    @classmethod
    def of(cls, recipe: Recipe, num_samples: int) -> Plan:
        """Returns the plan of a recipe with this number of training images."""
        steps = recipe.epochs * -(-num_samples // recipe.batch_size)
        return cls(num_samples, recipe.batch_size, min(steps, recipe.max_steps or steps))

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_samples // self.batch_size)

    def has_steps_of(self, other: Plan) -> bool:
        """Returns whether each step has the same samples in both plans."""
        return (self.num_samples, self.batch_size) == (other.num_samples, other.batch_size)

    def convert(self, step: int, old: Plan) -> int:
        """Returns the step of this plan that corresponds to a step of the old plan.

        Completed epochs stay completed. Within an epoch, the number of samples seen is rounded down to whole batches of
        this plan; the conversion never completes an epoch.
        """
        epochs, rest = divmod(step, old.steps_per_epoch)
        return epochs * self.steps_per_epoch + min(rest * old.batch_size // self.batch_size, self.steps_per_epoch - 1)


def plan_of(checkpoint: dict[str, Any], otherwise: Plan) -> Plan:
    """Returns the plan under which a checkpoint was made, or `otherwise`, because earlier versions stored no plan."""
    return Plan(**checkpoint["plan"]) if "plan" in checkpoint else otherwise


def converted(checkpoint: dict[str, Any], new: Plan) -> tuple[dict[str, Any], str]:
    """Returns the checkpoint with its steps converted to the new plan, and a message if that changes them."""
    old = plan_of(checkpoint, new)
    if new.has_steps_of(old):
        return checkpoint, ""
    progress = checkpoint["progress"]
    steps = {key: new.convert(progress[key], old) for key in ("step", "evaluated_at")}
    message = (
        f"the checkpoint was made with {old.num_samples:,} training images in batches of {old.batch_size}: "
        f"its step {progress['step']:,} is step {steps['step']:,} of this run"
    )
    return checkpoint | {"progress": progress | steps, "plan": asdict(new)}, message


def refuse_length(recipe: Recipe, num_samples: int, checkpoint: dict[str, Any], done_in: str = "") -> None:
    """Checks that a recipe can continue from a checkpoint: steps are left, and the steps so far keep their rates.

    Args:
        recipe: the resolved recipe of the run that resumes.
        num_samples: the number of training images.
        checkpoint: the state to continue from.
        done_in: the folder of the run, if that run has finished.

    Raises:
        RecipeError: the recipe cannot continue; the message names what to change.
    """
    new = Plan.of(recipe, num_samples)
    old = plan_of(checkpoint, new)
    step = new.convert(checkpoint["progress"]["step"], old)
    key = "epochs" if recipe.max_steps is None else "max_steps"
    made = f"{step:,} steps ({step / new.steps_per_epoch:.4g} epochs)"
    if done_in and step >= new.total_steps:
        message = f"the run in {done_in} is done after {made}; to train it longer, raise {key}"
        raise RecipeError([Problem("command line", "--run-dir", f"{message}; or name a new folder", "exists")])
    if step > new.total_steps:
        message = f"the checkpoint was made after {made}, but this recipe ends after {new.total_steps:,} steps"
        raise RecipeError([recipe.problem(key, f"{message}; raise {key}, or name a new folder", "conflict")])
    if done_in and _changes_past(recipe, new, new.convert(old.total_steps, old), step):
        message = (
            f"{recipe.schedule.name} depends on the length of the run: in a run of another length, the steps already "
            "made would have had other rates\nuse a schedule that does not depend on the length "
            f"(schedule={{name: constant}}), or start a new run from the weights (model.init_from={done_in})"
        )
        raise RecipeError([recipe.problem("schedule.name", message, "conflict")])


def _changes_past(recipe: Recipe, new: Plan, old_total: int, step: int) -> bool:
    """Returns whether the first `step` steps have other rates in the new plan than in a run of the old length."""

    def schedule(total_steps: int) -> Schedule:
        return build_schedule(
            recipe.schedule.name,
            lr=recipe.optimizer.lr,
            steps_per_epoch=new.steps_per_epoch,
            total_steps=total_steps,
            **recipe.schedule.keywords,
        )

    before, after = schedule(max(old_total, 1)), schedule(new.total_steps)
    steps = range(0, step, max(1, step // 1000))
    return any(before.lr_at(each) != after.lr_at(each) for each in steps) or (
        before.momentum_at is not None
        and after.momentum_at is not None
        and any(before.momentum_at(each) != after.momentum_at(each) for each in steps)
    )


# --- the data -----------------------------------------------------------------------------------------------------

SAMPLED = 64
"""Number of images, evenly spaced, that `identify_data` reads: a data set may be larger than the memory."""


def identify_data(data: Images) -> dict[str, Any]:
    """Returns the names of the classes, and a hash of the shape, of all labels and of `SAMPLED` images."""
    digest = hashlib.sha256(repr(tuple(data.images.shape)).encode())
    digest.update(data.labels.cpu().numpy().tobytes())
    rows = data.images[:: -(-len(data) // SAMPLED)]
    digest.update(rows.cpu().numpy().tobytes())
    return {"classes": list(data.classes), "digest": digest.hexdigest()}


def compare_data(recipe: Recipe, data: Images, checkpoint: dict[str, Any], allow_change: bool) -> list[str]:
    """Compares the training images with those that a checkpoint was made with; returns a note if they differ.

    Args:
        checkpoint: the state to continue from.
        allow_change: accept other classes, if their number is the same.

    Raises:
        RecipeError: the classes have changed, so the outputs of the network would get another meaning.
    """
    old, new = checkpoint.get("data"), identify_data(data)
    if old is None or old == new:  # earlier versions stored none
        return []
    step = f"the checkpoint at step {checkpoint['progress']['step']:,}"
    if old["classes"] == new["classes"]:
        return [f"the training images or their labels have changed since {step}; the run continues with the new ones"]
    before, now = (f"{len(each)} ({listed(each)})" for each in (old["classes"], data.classes))
    message = f"the classes have changed since {step}: it has {before}, the data now has {now}"
    if allow_change and len(old["classes"]) == len(data.classes):
        return [f"{message}; the run continues with the new ones"]
    advice = "restore the data, or start a new run from the weights: another --run-dir with model.init_from=THIS RUN"
    raise RecipeError([recipe.problem("data.dataset", f"{message}\n{advice}", "conflict")])
