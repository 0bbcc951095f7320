"""The plan of a run's steps, and what a checkpoint means under another plan: other batch size, data or length."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mnist_dist.engine.schedules import Schedule, build_schedule
from mnist_dist.errors import Problem, RecipeError
from mnist_dist.recipe.schema import Recipe


@dataclass(frozen=True)
class Plan:
    """The sizes that give a step its meaning. Every checkpoint holds them."""

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
        """Returns whether a step is the same samples in both plans."""
        return (self.num_samples, self.batch_size) == (other.num_samples, other.batch_size)

    def convert(self, step: int, old: Plan) -> int:
        """Returns the step of this plan that stands for a step of the old one.

        Whole epochs stay done. Within an epoch the samples seen are rounded down to whole batches, and the epoch does
        not end by the conversion.
        """
        epochs, rest = divmod(step, old.steps_per_epoch)
        return epochs * self.steps_per_epoch + min(rest * old.batch_size // self.batch_size, self.steps_per_epoch - 1)


def plan_of(checkpoint: dict[str, Any], otherwise: Plan) -> Plan:
    """Returns the plan that a checkpoint was made under; a checkpoint of an earlier version holds none."""
    return Plan(**checkpoint["plan"]) if "plan" in checkpoint else otherwise


def converted(checkpoint: dict[str, Any], new: Plan) -> tuple[dict[str, Any], str]:
    """Returns a checkpoint whose steps are those of the new plan, and a message if they were others."""
    old = plan_of(checkpoint, new)
    if new.has_steps_of(old):
        return checkpoint, ""
    progress = checkpoint["progress"]
    steps = {key: new.convert(progress[key], old) for key in ("step", "evaluated_at")}
    message = (
        f"the checkpoint is of {old.num_samples:,} training images in batches of {old.batch_size}: "
        f"its step {progress['step']:,} is step {steps['step']:,} of this run"
    )
    return checkpoint | {"progress": progress | steps, "plan": asdict(new)}, message


def refuse_length(recipe: Recipe, num_samples: int, checkpoint: dict[str, Any], done_in: str = "") -> None:
    """Checks that a recipe can continue from a checkpoint: steps are left, and the rates so far stay what they were.

    Args:
        recipe: the resolved recipe of the run that resumes.
        num_samples: the number of training images.
        checkpoint: the state to continue from.
        done_in: the folder of the run, if that run has finished.

    Raises:
        RecipeError: it cannot; says what to do.
    """
    new = Plan.of(recipe, num_samples)
    old = plan_of(checkpoint, new)
    step = new.convert(checkpoint["progress"]["step"], old)
    key = "epochs" if recipe.max_steps is None else "max_steps"
    made = f"{step:,} steps ({step / new.steps_per_epoch:g} epochs)"
    if done_in and step >= new.total_steps:
        message = f"the run in {done_in} is done after {made}; to train it longer, give more {key}"
        raise RecipeError([Problem("command line", "--run-dir", f"{message}; or name a new folder", "exists")])
    if step > new.total_steps:
        message = f"the checkpoint has made {made}, and this recipe ends after {new.total_steps:,} steps"
        raise RecipeError([recipe.problem(key, f"{message}; give more, or name a new folder", "conflict")])
    if done_in and _changes_past(recipe, new, new.convert(old.total_steps, old), step):
        message = (
            f"{recipe.schedule.name} spans the whole run: over another length, the steps already made would have had "
            "other rates\nadd a schedule that does not depend on the length (schedule={name: constant}), or start a "
            f"new run from the weights (model.init_from={done_in})"
        )
        raise RecipeError([recipe.problem("schedule.name", message, "conflict")])


def _changes_past(recipe: Recipe, new: Plan, old_total: int, step: int) -> bool:
    """Returns whether the schedule gives the first `step` steps other rates in the new plan than in the old length."""

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
