"""Loads what a run takes from earlier runs: initial weights and teacher networks."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mnist_dist.data import Images, describe_shape
from mnist_dist.engine.checkpoint import load_weights
from mnist_dist.engine.files import expand_path
from mnist_dist.errors import Kind, RecipeError
from mnist_dist.models import CodeRefused
from mnist_dist.recipe.schema import Recipe
from mnist_dist.run.folder import RunFolder
from mnist_dist.run.reader import Run, load_run
from mnist_dist.run.text_output import listed, printable

# --- initial weights ----------------------------------------------------------------------------------------------


def load_initial_weights(recipe: Recipe, module: nn.Module) -> list[str]:
    """Copies the tensors of `model.init_from` into the network where name and shape are equal.

    Returns:
        One note that names the tensors that were copied, and those that were not; empty without `model.init_from`.

    Raises:
        RecipeError: the weights cannot be read, or fit no parameter, or lack a frozen parameter.
    """
    if recipe.model.init_from is None:
        return []
    path = expand_path(recipe.model.init_from, partial(recipe.problem, "model.init_from"))
    path = RunFolder(path).last if path.is_dir() else path
    given, about = _read_weights(recipe, path)
    origin, own = printable(about.get("model", "an unnamed network"))[:100], module.state_dict()
    fitting = {name for name, value in own.items() if name in given and given[name].shape == value.shape}
    parameters = dict(module.named_parameters())
    if not fitting & parameters.keys():
        message = f"{path} holds weights of {origin}: no tensor fits {recipe.model.name} in name and shape"
        raise _refusal(recipe, message, "conflict")
    left, unused = ([name for name in names if name not in fitting] for names in (own, given))
    frozen = [name for name in left if name in parameters and not parameters[name].requires_grad]
    if frozen:
        message = f"{path} ({origin}) lacks {listed(frozen, 6)}; model.freeze would keep their random values"
        raise _refusal(recipe, message, "conflict")
    module.load_state_dict({name: given[name] for name in fitting}, strict=False)
    notes = [f"{len(fitting)} of {len(own)} tensors were copied from {path} ({origin})"]
    notes += [f"randomly initialized: {listed(left, 6)}"] if left else []
    notes += [f"not used: {listed(unused, 6)}"] if unused else []
    return ["; ".join(notes)]


def _read_weights(recipe: Recipe, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        return load_weights(path, foreign=True)
    except FileNotFoundError as error:
        message = f"{path} does not exist; name the folder of a finished run or a .safetensors file"
        raise _refusal(recipe, message, "missing") from error
    except (OSError, ValueError) as error:
        raise _refusal(recipe, str(error), "damaged") from error


def _refusal(recipe: Recipe, message: str, kind: Kind) -> RecipeError:
    return RecipeError([recipe.problem("model.init_from", message, kind)])


# --- teachers -----------------------------------------------------------------------------------------------------


def load_teachers(recipe: Recipe, data: Images, allow_code: Iterable[str] = ()) -> list[Run]:
    """Loads the trained networks of `distill.from`, with their last weights.

    Args:
        recipe: the recipe of the student.
        data: the training images; each teacher must know the same classes and take images of their shape.
        allow_code: see `load_run`. The student's own network is allowed too.

    Raises:
        RecipeError: a run or its weights are missing or damaged, its classes differ, or it names code that is not
            allowed.
    """
    teachers = []
    for written in recipe.distill.teachers or []:
        folder = expand_path(written, partial(recipe.problem, "distill.from"))
        try:
            teacher = load_run(folder, "last", (*allow_code, recipe.model.name))
            _, known = teacher.model, tuple(teacher.about["classes"])
        except CodeRefused as error:
            raise RecipeError([recipe.problem("distill.from", f"{folder}: {error}", "code")]) from error
        except (OSError, ValueError) as error:
            kind: Kind = "missing" if isinstance(error, FileNotFoundError) else "damaged"
            advice = "train it first" if kind == "missing" else "train it again in another folder"
            if kind == "missing" and "runs/reproduce/" in f"{folder}":
                advice += f": launch/reproduce.sh {recipe.name}"
            raise RecipeError([recipe.problem("distill.from", f"{error}\n{advice}", kind)]) from error
        if known != data.classes:
            message = f"{folder} knows {len(known)} classes ({listed(list(known), 10)}), {recipe.data.dataset} has "
            message += f"{len(data.classes)} ({listed(list(data.classes), 10)})"
            raise RecipeError([recipe.problem("distill.from", message, "conflict")])
        if teacher.shape != data.shape:
            message = f"{folder} takes images of {describe_shape(teacher.shape)}, {recipe.data.dataset} has "
            message += describe_shape(data.shape)
            raise RecipeError([recipe.problem("distill.from", message, "conflict")])
        teachers.append(teacher)
    return teachers
