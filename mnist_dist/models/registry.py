"""Builds a network by its name: a network of this package, of torchvision or of timm, or a user's own class."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from mnist_dist.errors import did_you_mean
from mnist_dist.machine.user_code import as_dotted, import_user_module
from mnist_dist.models.catalogues import timm_builder, torchvision_builder
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


SET_BY_TRAINER: dict[str, dict[str, str]] = {
    "": {
        "num_classes": "the number of classes of the data",
        "in_channels": "the channels of the images; see data.channels",
        "image_size": "the size of the images; see data.image_size",
    },
    "torchvision/": {"weights": "random, or those of model.pretrained or model.init_from"},
    "timm/": {
        "in_chans": "the channels of the images; see data.channels",
        "checkpoint_path": "random weights, or those of model.pretrained or model.init_from",
    },
}
"""Beginning of a network's name -> the keywords that the trainer gives it, and why."""


FILLED_IN = tuple(SET_BY_TRAINER[""])
"""Arguments of any network that the trainer fills in."""


def set_by_trainer(name: str) -> dict[str, str]:
    """Returns the keywords of a network that a recipe cannot set, each with a message of one line."""
    reasons = {
        keyword: reason
        for beginning, keywords in SET_BY_TRAINER.items()
        if name.startswith(beginning)
        for keyword, reason in keywords.items()
    }
    return {keyword: f"{keyword} is set by the trainer ({reason}); remove it" for keyword, reason in reasons.items()}


def build_model(
    name: str,
    /,
    *,
    num_classes: int = 10,
    in_channels: int = 1,
    image_size: tuple[int, int] = (28, 28),
    pretrained: bool = False,
    **keywords: Any,
) -> nn.Module:
    """Builds a network. Input: float (N, in_channels, *image_size). Output: (N, num_classes).

    Args:
        name: see `find_builder`.
        num_classes: number of classes. A user's own class receives it only if its signature has this argument. Such a
            class may return a mapping or an object with `logits` instead of the logits; the network returned here then
            returns its logits.
        in_channels, image_size: channels, and height and width, of the images. A network receives them only if its
            signature has these arguments; an argument `image_size: int` receives the side of a square.
        pretrained: start from weights for ImageNet, which the network's signature must offer; else random weights.
        keywords: further arguments of the network.

    Raises:
        ValueError: the name, a keyword or a value is wrong, or there are no pretrained weights; the message lists the
            known names or keywords.
    """
    builder = find_builder(name)
    for keyword, message in set_by_trainer(name).items():
        if keyword in keywords:
            raise ValueError(f"model {name!r}: {message}")
    signature = inspect.signature(builder)
    given = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size}
    keywords |= {key: value for key, value in given.items() if key in signature.parameters}
    if "image_size" in keywords and signature.parameters["image_size"].annotation in (int, "int"):
        keywords["image_size"] = _square(name, image_size)
    if pretrained and "pretrained" not in signature.parameters:
        raise ValueError(f"model {name!r}: pretrained: there are no pretrained weights of this network")
    if pretrained:
        keywords["pretrained"] = True
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values())
    unknown = [keyword for keyword in keywords if keyword not in signature.parameters]
    if unknown and not takes_any:
        known = [keyword for keyword in signature.parameters if keyword not in (*FILLED_IN, "pretrained")]
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


def _square(name: str, image_size: tuple[int, int]) -> int:
    """Returns the side of a square image."""
    height, width = image_size
    if height != width:
        raise ValueError(f"model {name!r} takes square images, not {height}×{width}; set data.image_size")
    return height


def _take_logits(module: nn.Module, inputs: Any, output: Any) -> Any:
    """Returns the logits of an output that holds them, as those of Hugging Face's networks do; None for any other.

    A tuple is left unchanged, with or without names: it may hold further outputs that a loss should use.
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
            command reads: see `mnist_dist.models.rebuilding`.

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
    own = "my_package.nets:MyNet"
    if "." in name:  # mynets.py or mynets.MyNet
        own = as_dotted(name) if name.endswith(".py") else ":".join(name.rsplit(".", 1))
    raise ValueError(
        f"unknown model {name!r}{did_you_mean(name, MODELS)}\n"
        f"known: {', '.join(MODELS)}; torchvision/<name>; timm/<name>; your own class as {own}"
    )


def count_parameters(model: nn.Module) -> int:
    """Returns the number of parameters. Frozen parameters count, buffers do not."""
    return sum(parameter.numel() for parameter in model.parameters())


def imported_builder(path: str) -> Builder:
    """Returns the network class at `package.module:Name`, or the function that this module defines.

    Raises:
        ValueError: the module cannot be imported, or has neither.
    """
    try:
        module, attribute = import_user_module(path)
    except ImportError as error:
        raise ValueError(f"model {error}") from error.__cause__
    builder, module_name = getattr(module, attribute, None), module.__name__
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
