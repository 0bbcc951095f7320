"""Loads torchvision's weights for ImageNet, and adapts a first convolution to another number of channels."""

from __future__ import annotations

from torch import nn

from mnist_dist.errors import first_line


def accept_channels(model: nn.Module, channels: int) -> None:
    """Replaces the first convolution of three input channels, if there is one, by one for `channels`.

    For grey images the output is that of the original convolution for three equal channels.

    Raises:
        ValueError: `channels` is neither 1 nor 3.
    """
    if channels not in (1, 3):
        raise ValueError(f"expected images of 1 or 3 channels, not {channels}")
    colour = (layer for layer in model.modules() if isinstance(layer, nn.Conv2d) and layer.in_channels == 3)
    if channels == 1 and (convolution := next(colour, None)):
        convolution.in_channels = 1
        convolution.weight = nn.Parameter(convolution.weight.detach().sum(dim=1, keepdim=True))


def load_pretrained(name: str, model: nn.Module) -> None:
    """Loads torchvision's weights for ImageNet into its network of that name, except for a last layer of another shape.

    Args:
        name: of the network, in torchvision.

    Raises:
        ValueError: torchvision has no weights for the network; they are not on this machine and cannot be downloaded;
            or layers other than the last one have another shape than the weights.
    """
    from torchvision import models

    if next(model.parameters()).is_meta:  # the check of a recipe builds the network without memory
        return
    try:
        weights = models.get_model_weights(name)["DEFAULT"]
    except (ValueError, KeyError) as error:
        raise ValueError(f"pretrained: torchvision has no weights for {name}") from error
    try:
        given = weights.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError, ValueError) as error:
        reason = first_line(error)
        raise ValueError(
            f"pretrained: the weights of {name} are not on this machine and cannot be downloaded ({reason}); "
            f"put {weights.url} into {_cache_folder()}"
        ) from error
    own = model.state_dict()
    fitting = {key: value for key, value in given.items() if key in own and own[key].shape == value.shape}
    last = [key for key in own if key not in fitting]
    layers = {key.rpartition(".")[0] for key in last}
    if len(layers) > 1:
        raise ValueError(f"pretrained: the weights do not fit {name} for these images: {', '.join(last[:4])}")
    model.load_state_dict(fitting, strict=False)


def _cache_folder() -> str:
    from torch.hub import get_dir

    return f"{get_dir()}/checkpoints"
