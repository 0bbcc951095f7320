"""Builds a network by its name: a network of this package, of torchvision or of timm, or a user's own class."""

import importlib
import inspect
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn

from mnist_dist.errors import did_you_mean
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
    """Builds a network with random weights. Input: float (N, 1, 28, 28). Output: (N, num_classes).

    Args:
        name: see `find_builder`.
        num_classes: number of classes. A user's own class receives it only if its signature has this argument.
        keywords: further arguments of the network.

    Raises:
        ValueError: the name, a keyword or a value is wrong; the message lists the known names or keywords.
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
            f"model {name!r} has no keyword {unknown[0]!r}{did_you_mean(unknown[0], known)}\n"
            f"known keywords: {', '.join(known) or 'none'}"
        )
    try:
        signature.bind(**keywords)
    except TypeError as error:
        raise ValueError(f"model {name!r}: {error}") from error
    model = builder(**keywords)
    if not isinstance(model, nn.Module):
        raise ValueError(f"model {name!r}: expected a torch.nn.Module, got {type(model).__name__}")
    return model


def find_builder(name: str) -> Builder:
    """Returns the class or function that builds the named network.

    Args:
        name: a key of `MODELS`, `torchvision/<name>`, `timm/<name>`, or `my_package.nets:MyNet`, which is imported from
            the current directory or an installed package.

    Raises:
        ValueError: there is no such network; the message names similar ones.
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
        f"unknown model {name!r}{did_you_mean(name, MODELS)}\n"
        f"known: {', '.join(MODELS)}; torchvision/<name>; timm/<name>; your own class as my_package.nets:MyNet"
    )


def count_parameters(model: nn.Module) -> int:
    """Returns the number of parameters. Frozen parameters count, buffers do not."""
    return sum(parameter.numel() for parameter in model.parameters())


def torchvision_builder(name: str) -> Builder:
    """Returns a function that builds torchvision's network of that name for images of one channel."""
    from torchvision import models  # imported late: the import takes seconds, and other networks do not need it

    known = models.list_models(module=models)
    if name not in known:
        raise ValueError(
            f"unknown model 'torchvision/{name}'{did_you_mean(name, known)}\nknown to torchvision: {', '.join(known)}"
        )

    def build(*, num_classes: int = 10, **keywords: Any) -> nn.Module:
        try:
            model = models.get_model(name, weights=None, num_classes=num_classes, **keywords)
        except TypeError as error:
            raise ValueError(f"model 'torchvision/{name}': {error}") from error
        accept_one_channel(model)
        return model

    return build


def accept_one_channel(model: nn.Module) -> None:
    """Replaces the first convolution of three input channels, if there is one, by an equivalent one for grey images.

    The output for a grey image is that of the original convolution for three equal channels.
    """
    colour = (layer for layer in model.modules() if isinstance(layer, nn.Conv2d) and layer.in_channels == 3)
    if convolution := next(colour, None):
        convolution.in_channels = 1
        convolution.weight = nn.Parameter(convolution.weight.detach().sum(dim=1, keepdim=True))


def timm_builder(name: str) -> Builder:
    """Returns a function that builds timm's network of that name for images of one channel."""
    try:
        import timm  # imported late: it is optional and slow to import
    except ImportError as error:
        raise ValueError(f"model 'timm/{name}' needs timm: pip install timm") from error
    if not timm.is_model(name):
        hint = did_you_mean(name, timm.list_models())
        raise ValueError(f"unknown model 'timm/{name}'{hint}\ntimm.list_models() in Python lists the known names")

    def build(*, num_classes: int = 10, **keywords: Any) -> nn.Module:
        settings = {"in_chans": 1, "num_classes": num_classes, **keywords}
        if "img_size" not in settings:
            # Only networks for one image size have this argument, and timm has no list of them.
            with suppress(TypeError):
                return timm.create_model(name, img_size=28, **settings)
        try:
            return timm.create_model(name, **settings)
        except TypeError as error:
            raise ValueError(f"model 'timm/{name}': {error}") from error

    return build


def imported_builder(path: str) -> Builder:
    """Returns the class or function at `package.module:Name`."""
    module_name, _, attribute = path.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's own module may raise any exception
        raise ValueError(
            f"model {path!r}: cannot import {module_name!r} ({error})\n"
            f"run the command in the folder that holds the module (this folder is {here}), or install its package"
        ) from error
    builder = getattr(module, attribute, None)
    if not callable(builder):
        known = [word for word, value in vars(module).items() if inspect.isclass(value) or inspect.isfunction(value)]
        raise ValueError(
            f"model {path!r}: {module_name!r} has no class or function {attribute!r}{did_you_mean(attribute, known)}"
        )
    return builder
