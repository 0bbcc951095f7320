"""Builds a network by its name: a network of this package, of torchvision or of timm, or a user's own class."""

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
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


_RANDOM_WEIGHTS = "a network starts with random weights; for others use model.init_from"

SET_BY_TRAINER: dict[str, dict[str, str]] = {
    "": {"num_classes": "the number of classes of the data"},
    "torchvision/": {"weights": _RANDOM_WEIGHTS},
    "timm/": {
        "in_chans": "the images have one channel",
        "pretrained": _RANDOM_WEIGHTS,
        "checkpoint_path": _RANDOM_WEIGHTS,
    },
}
"""Beginning of a network's name -> the keywords that the trainer gives it, and why."""


def set_by_trainer(name: str) -> dict[str, str]:
    """Returns the keywords of a network that a recipe cannot set, each with a message of one line."""
    reasons = {
        keyword: reason
        for beginning, keywords in SET_BY_TRAINER.items()
        if name.startswith(beginning)
        for keyword, reason in keywords.items()
    }
    return {keyword: f"{keyword} is set by the trainer ({reason}); remove it" for keyword, reason in reasons.items()}


def build_model(name: str, /, *, num_classes: int = 10, **keywords: Any) -> nn.Module:
    """Builds a network with random weights. Input: float (N, 1, 28, 28). Output: (N, num_classes).

    Args:
        name: see `find_builder`.
        num_classes: number of classes. A user's own class receives it only if its signature has this argument. Such a
            class may return a mapping or an object with `logits` instead of the logits; the network returned here then
            returns its logits.
        keywords: further arguments of the network.

    Raises:
        ValueError: the name, a keyword or a value is wrong; the message lists the known names or keywords.
    """
    builder = find_builder(name)
    for keyword, message in set_by_trainer(name).items():
        if keyword in keywords:
            raise ValueError(f"model {name!r}: {message}")
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
    if ":" in name and not isinstance(model, torch.jit.ScriptModule):  # TorchScript returns tensors, and has no hooks
        model.register_forward_hook(_take_logits)  # a wrapper would change the names in the state_dict
    return model


def _take_logits(module: nn.Module, inputs: Any, output: Any) -> Any:
    """Returns the logits of an output that holds them, as those of Hugging Face's networks do; None for any other.

    A tuple is left as it is, with or without names: it may hold further outputs that a loss should use.
    """
    if isinstance(output, torch.Tensor | tuple):
        return None
    fields = output if isinstance(output, Mapping) else getattr(output, "__dict__", {})
    if any(str(name).startswith("aux") and isinstance(value, torch.Tensor) for name, value in fields.items()):
        return None  # an auxiliary classifier trains by a loss of its own, which this trainer does not compute
    return output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)


def find_builder(name: str) -> Builder:
    """Returns the class or function that builds the named network.

    Args:
        name: a key of `MODELS`, `torchvision/<name>`, `timm/<name>`, or `my_package.nets:MyNet`, which is imported from
            the current directory or an installed package. Only a person may give such a path, never a file that a
            command reads: see `mnist_dist.models.foreign`.

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
                return _with_whole_patches(name, timm.create_model(name, img_size=28, **settings))
        try:
            return _with_whole_patches(name, timm.create_model(name, **settings))
        except TypeError as error:
            raise ValueError(f"model 'timm/{name}': {error}") from error

    return build


def _with_whole_patches(name: str, model: nn.Module, side: int = 28) -> nn.Module:
    """Returns the network, unless it cuts images into patches that leave out the last rows and columns.

    Raises:
        ValueError: the patch size does not divide the side of the images.
    """
    embedding = getattr(model, "patch_embed", None)
    cut = getattr(embedding, "proj", None)
    if not isinstance(cut, nn.Conv2d) or cut.stride != cut.kernel_size or getattr(embedding, "dynamic_img_pad", False):
        return model
    if any(side % size for size in cut.kernel_size) and cut.padding == (0, 0):
        height, width = cut.kernel_size
        fitting = ", ".join(str(size) for size in range(2, side) if side % size == 0)
        raise ValueError(
            f"model 'timm/{name}': patches of {height}×{width} pixels do not cover an image of {side}×{side}; "
            f"set model.patch_size to one of {fitting}"
        )
    return model


def imported_builder(path: str) -> Builder:
    """Returns the network class at `package.module:Name`, or the function that this module defines.

    Raises:
        ValueError: the module cannot be imported, or has neither.
    """
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
    is_network = inspect.isclass(builder) and issubclass(builder, nn.Module)
    if not is_network and not (inspect.isfunction(builder) and builder.__module__ == module_name):
        # The name may be any callable that the module imports, e.g. a function that runs a program.
        message = "expected a subclass of torch.nn.Module, or a function that the module itself defines"
        raise ValueError(f"model {path!r}: {message}, got {attribute}") from TypeError(attribute)
    return builder
