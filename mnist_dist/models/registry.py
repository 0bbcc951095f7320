"""From a model's name to the model: the documents' networks, torchvision's, timm's, and a reader's own."""

import difflib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn

from mnist_dist.models.lenet import lenet5
from mnist_dist.models.mnistnet import MNISTNet
from mnist_dist.models.model_v import model_v1, model_v2, model_v3
from mnist_dist.models.ms_ran import MSRAN
from mnist_dist.models.patch_cnn import PatchCNN
from mnist_dist.models.resnet import resnet18, resnet34, resnet50, resnet101, resnet152
from mnist_dist.models.separable_cnn import SeparableCNN
from mnist_dist.models.simple_cnn import SimpleCNN
from mnist_dist.models.small_cnn import small_cnn

Builder = Callable[..., nn.Module]

MODELS: dict[str, Builder] = {
    "ms_ran": MSRAN,
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "resnet101": resnet101,
    "resnet152": resnet152,
    "simple_cnn": SimpleCNN,
    "mnistnet": MNISTNet,
    "model_v1": model_v1,
    "model_v2": model_v2,
    "model_v3": model_v3,
    "lenet5": lenet5,
    "small_cnn": small_cnn,
    "patch_cnn": PatchCNN,
    "separable_cnn": SeparableCNN,
}


def build_model(name: str, /, *, num_classes: int = 10, **keywords: Any) -> nn.Module:
    """Builds a model that takes float (N, 1, 28, 28) and gives (N, num_classes), freshly initialised.

    Args:
        name: as `find_builder` takes it.
        num_classes: outputs; a reader's own model gets it if its signature has it.
        keywords: the model's own.

    Raises:
        ValueError: the name, a keyword or a value is wrong; the message says what is known.
    """
    builder = find_builder(name)
    signature = inspect.signature(builder)
    if "num_classes" in signature.parameters:
        keywords["num_classes"] = num_classes
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values())
    unknown = [keyword for keyword in keywords if keyword not in signature.parameters]
    if unknown and not takes_any:
        known = [keyword for keyword in signature.parameters if keyword != "num_classes"]
        raise ValueError(
            f"model {name!r} has no keyword {unknown[0]!r}{did_you_mean(unknown[0], known)}; "
            f"its keywords: {', '.join(known) or 'none'}"
        )
    try:
        signature.bind(**keywords)
    except TypeError as error:
        raise ValueError(f"model {name!r}: {error}") from error
    model = builder(**keywords)
    if not isinstance(model, nn.Module):
        raise ValueError(f"model {name!r} gives a {type(model).__name__}, not a torch.nn.Module")
    return model


def find_builder(name: str) -> Builder:
    """The class or function that builds the named model.

    Args:
        name: a key of MODELS, `torchvision/<name>`, `timm/<name>`, or `my_package.nets:MyNet`, which is imported from
            the current directory or an installed package.

    Raises:
        ValueError: there is no such model; the message names the nearest.
    """
    if name in MODELS:
        return MODELS[name]
    if name.startswith("torchvision/"):
        return torchvision_builder(name.removeprefix("torchvision/"))
    if name.startswith("timm/"):
        return timm_builder(name.removeprefix("timm/"))
    if ":" in name:
        return imported_builder(name)
    raise ValueError(
        f"unknown model {name!r}{did_you_mean(name, MODELS)}; known: {', '.join(MODELS)}; "
        "also torchvision/<name>, timm/<name>, and my_package.nets:MyNet for your own"
    )


def count_parameters(model: nn.Module) -> int:
    """The number of parameters, frozen ones included, buffers not."""
    return sum(parameter.numel() for parameter in model.parameters())


def torchvision_builder(name: str) -> Builder:
    from torchvision import models  # its import takes seconds, which the other networks need not pay

    known = models.list_models(module=models)
    if name not in known:
        raise ValueError(
            f"torchvision has no classifier {name!r}{did_you_mean(name, known)}; it has: {', '.join(known)}"
        )

    def build(*, num_classes: int = 10, **keywords: Any) -> nn.Module:
        try:
            model = models.get_model(name, weights=None, num_classes=num_classes, **keywords)
        except TypeError as error:
            raise ValueError(f"model 'torchvision/{name}': {error}") from error
        take_grey_images(model)
        return model

    return build


def take_grey_images(model: nn.Module) -> None:
    """Lets the first colour convolution, if there is one, see a grey image as three equal channels."""
    colour = (layer for layer in model.modules() if isinstance(layer, nn.Conv2d) and layer.in_channels == 3)
    if convolution := next(colour, None):
        convolution.in_channels = 1
        convolution.weight = nn.Parameter(convolution.weight.detach().sum(dim=1, keepdim=True))


def timm_builder(name: str) -> Builder:
    try:
        import timm  # optional, and slow to import
    except ImportError as error:
        raise ValueError(f"model 'timm/{name}' needs timm: pip install timm") from error
    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name!r}{did_you_mean(name, timm.list_models())}; see timm.list_models()")

    def build(*, num_classes: int = 10, **keywords: Any) -> nn.Module:
        settings = {"in_chans": 1, "num_classes": num_classes, **keywords}
        if "img_size" not in settings:
            # Only models made for one image size take the keyword, and no listing says which.
            with suppress(TypeError):
                return timm.create_model(name, img_size=28, **settings)
        try:
            return timm.create_model(name, **settings)
        except TypeError as error:
            raise ValueError(f"model 'timm/{name}': {error}") from error

    return build


def imported_builder(path: str) -> Builder:
    module_name, _, attribute = path.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a reader's own module may fail in any way
        raise ValueError(
            f"model {path!r}: cannot import {module_name!r} ({error}); "
            f"start from the folder that holds it, not {here}, or install its package"
        ) from error
    builder = getattr(module, attribute, None)
    if not callable(builder):
        known = [word for word, value in vars(module).items() if inspect.isclass(value) or inspect.isfunction(value)]
        raise ValueError(
            f"model {path!r}: {module_name!r} has no class or function {attribute!r}{did_you_mean(attribute, known)}"
        )
    return builder


def did_you_mean(word: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.4)
    return f" (did you mean {found[0]!r}?)" if found else ""
