"""Builds the networks of torchvision and timm."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from torch import nn

from mnist_dist.errors import did_you_mean, first_line
from mnist_dist.models.pretrained import accept_channels, load_pretrained

Builder = Callable[..., nn.Module]


def torchvision_builder(name: str) -> Builder:
    """Returns a function that builds torchvision's network of that name."""
    from torchvision import models  # imported late: the import takes seconds, and other networks do not need it

    known = models.list_models(module=models)
    if name not in known:
        raise ValueError(
            f"unknown model 'torchvision/{name}'{did_you_mean(name, known)}\nknown to torchvision: {', '.join(known)}"
        )

    def build(
        *,
        num_classes: int = 10,
        in_channels: int = 1,
        image_size: tuple[int, int] = (28, 28),
        pretrained: bool = False,
        **keywords: Any,
    ) -> nn.Module:
        if name.startswith("vit_"):
            keywords["image_size"] = _square_of_patches(name, image_size)
        if name.startswith("maxvit_"):
            keywords.setdefault("input_size", image_size)
        try:
            model = models.get_model(name, weights=None, num_classes=num_classes, **keywords)
        except (TypeError, AssertionError, ValueError) as error:
            raise ValueError(f"model 'torchvision/{name}': {' '.join(str(error).split())}") from error
        _check_patches(f"torchvision/{name}", model, image_size, takes_patch_size=False)
        if pretrained:
            load_pretrained(name, model)
        accept_channels(model, in_channels)
        return model

    return build


def timm_builder(name: str) -> Builder:
    """Returns a function that builds timm's network of that name."""
    try:
        import timm  # imported late: it is optional and slow to import
    except ImportError as error:
        raise ValueError(f"model 'timm/{name}' needs timm: pip install timm") from error
    if not timm.is_model(name):
        hint = did_you_mean(name, timm.list_models())
        raise ValueError(f"unknown model 'timm/{name}'{hint}\ntimm.list_models() in Python lists the known names")

    def build(
        *,
        num_classes: int = 10,
        in_channels: int = 1,
        image_size: tuple[int, int] = (28, 28),
        pretrained: bool = False,
        **keywords: Any,
    ) -> nn.Module:
        settings = {"in_chans": in_channels, "num_classes": num_classes, "pretrained": pretrained, **keywords}

        def checked(model: nn.Module) -> nn.Module:
            _check_patches(f"timm/{name}", model, image_size, takes_patch_size=True)
            return model

        side: Any = image_size[0] if image_size[0] == image_size[1] else image_size
        try:
            if "img_size" not in settings:
                # Only networks for one image size have this argument, and timm has no list of them.
                with suppress(TypeError):
                    return checked(timm.create_model(name, img_size=side, **settings))
            return checked(timm.create_model(name, **settings))
        except (TypeError, AssertionError) as error:
            raise ValueError(f"model 'timm/{name}': {error}") from error
        except (OSError, RuntimeError) as error:
            if not pretrained:
                raise
            reason = first_line(error)
            message = f"pretrained: the weights of {name} are not on this machine and cannot be downloaded ({reason})"
            raise ValueError(f"model 'timm/{name}': {message}") from error

    return build


def _check_patches(name: str, model: nn.Module, image_size: tuple[int, int], takes_patch_size: bool) -> None:
    """Raises ValueError if the network cuts images into patches that leave out the last rows or columns."""
    cut = next((layer for layer in model.modules() if isinstance(layer, nn.Conv2d)), None)
    if cut is None or cut.stride != cut.kernel_size or cut.padding not in ((0, 0), "valid"):
        return  # no patches
    (tall, wide), (height, width) = cut.kernel_size, image_size
    pads = getattr(getattr(model, "patch_embed", None), "dynamic_img_pad", False)
    if pads or (height % tall == 0 and width % wide == 0):
        return
    sizes = [str(size) for size in range(2, min(image_size)) if height % size == 0 and width % size == 0]
    fitting = f"model.patch_size to one of {', '.join(sizes)}, or " if sizes and takes_patch_size else ""
    raise ValueError(
        f"model {name!r}: patches of {tall}×{wide} pixels do not cover an image of {height}×{width}; "
        f"set {fitting}data.image_size to a multiple of {tall}"
    )


def _square_of_patches(name: str, image_size: tuple[int, int]) -> int:
    """Returns the side of the images for torchvision's vision transformer, whose name ends with the size of a patch."""
    height, width = image_size
    patch = int(name.split("_")[-1])
    if height != width:
        raise ValueError(f"model 'torchvision/{name}' takes square images, not {height}×{width}; set data.image_size")
    if height % patch:
        raise ValueError(
            f"model 'torchvision/{name}': patches of {patch}×{patch} pixels do not cover an image of {height}×{width}; "
            f"set data.image_size to a multiple of {patch}, or use timm/vit_tiny_patch16_224 with model.patch_size"
        )
    return height
