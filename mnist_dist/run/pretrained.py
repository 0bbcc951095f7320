"""What a run takes from runs before it: weights to begin with, and teachers to learn from."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from mnist_dist.data import Images
from mnist_dist.engine.checkpoint import load_weights
from mnist_dist.errors import RecipeError
from mnist_dist.recipe.schema import Recipe
from mnist_dist.run.folder import RunFolder
from mnist_dist.run.reader import Run, load_run


def load_initial_weights(recipe: Recipe, module: nn.Module) -> list[str]:
    """Gives the network what fits it, by name and shape, of the weights in `model.init_from`; notes on what does not.

    Raises:
        RecipeError: the weights cannot be read, or fit nothing, or lack something that is frozen.
    """
    if recipe.model.init_from is None:
        return []

    def refuse(message: str) -> RecipeError:
        return RecipeError([recipe.problem("model.init_from", message)])

    path = Path(recipe.model.init_from)
    path = RunFolder(path).last if path.is_dir() else path
    try:
        given, about = load_weights(path, foreign=True)
    except FileNotFoundError as error:
        raise refuse(f"there is no {path}; name a finished run's folder or a .safetensors file") from error
    except (OSError, ValueError) as error:
        raise refuse(str(error)) from error
    origin, own = about.get("model", "a network that it does not name"), module.state_dict()
    fitting = {name for name, value in own.items() if name in given and given[name].shape == value.shape}
    parameters = dict(module.named_parameters())
    if not fitting & parameters.keys():
        raise refuse(f"{path} is of {origin}: not one of its tensors fits {recipe.model.name} by name and shape")
    left, unused = ([name for name in names if name not in fitting] for names in (own, given))
    random = [name for name in left if name in parameters and not parameters[name].requires_grad]
    if random:
        raise refuse(f"{path} ({origin}) does not bring {_listed(random)}, which model.freeze would leave as it is")
    module.load_state_dict({name: given[name] for name in fitting}, strict=False)
    notes = [f"{len(fitting)} of {len(own)} tensors begin as in {path} ({origin})"]
    notes += [f"begins anew: {_listed(left)}"] if left else []
    notes += [f"not used: {_listed(unused)}"] if unused else []
    return ["; ".join(notes)]


def load_teachers(recipe: Recipe, data: Images) -> list[Run]:
    """The trained networks that the recipe's is to learn from.

    Raises:
        RecipeError: a run or its weights are not there, or it knows other classes.
    """
    teachers = []
    for folder in recipe.distill.teachers or []:
        try:
            teacher = load_run(folder, "last")
            _, known = teacher.model, tuple(teacher.about["classes"])
        except (OSError, ValueError) as error:
            what = f"{error}\ntrain it first"
            what += f"; launch/reproduce.sh {recipe.name} does" if "runs/reproduce/" in f"{folder}" else ""
            raise RecipeError([recipe.problem("distill.from", what)]) from error
        if known != data.classes:
            what = f"{folder} knows {len(known)} classes ({_listed(list(known), 10)}), {recipe.data.dataset} has "
            what += f"{len(data.classes)} ({_listed(list(data.classes), 10)})"
            raise RecipeError([recipe.problem("distill.from", what)])
        teachers.append(teacher)
    return teachers


def _listed(names: list[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if names[most:] else "")
