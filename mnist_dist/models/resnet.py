"""The ResNets of document 2: torchvision's networks for images of any number of channels.

He, Zhang, Ren, Sun, "Deep residual learning for image recognition", CVPR 2016.

Input: float (N, in_channels, H, W). Output: logits (N, num_classes). Each function raises ValueError if num_classes is
below 1. Their further arguments are those of `build_resnet`.
"""

from typing import Literal

from torch import nn

from mnist_dist.models.layers import require_positive
from mnist_dist.models.pretrained import accept_channels, load_pretrained

Stem = Literal["imagenet", "cifar"]


def resnet18(
    *, num_classes: int = 10, in_channels: int = 1, stem: Stem = "imagenet", pretrained: bool = False
) -> nn.Module:
    """Builds ResNet-18 with blocks [2, 2, 2, 2]: 11,175,370 parameters for one channel."""
    return build_resnet("resnet18", num_classes, in_channels, stem, pretrained)


def resnet34(
    *, num_classes: int = 10, in_channels: int = 1, stem: Stem = "imagenet", pretrained: bool = False
) -> nn.Module:
    """Builds ResNet-34 with blocks [3, 4, 6, 3]: 21,283,530 parameters for one channel."""
    return build_resnet("resnet34", num_classes, in_channels, stem, pretrained)


def resnet50(
    *, num_classes: int = 10, in_channels: int = 1, stem: Stem = "imagenet", pretrained: bool = False
) -> nn.Module:
    """Builds ResNet-50 with bottleneck blocks [3, 4, 6, 3]: 23,522,250 parameters for one channel."""
    return build_resnet("resnet50", num_classes, in_channels, stem, pretrained)


def resnet101(
    *, num_classes: int = 10, in_channels: int = 1, stem: Stem = "imagenet", pretrained: bool = False
) -> nn.Module:
    """Builds ResNet-101 with bottleneck blocks [3, 4, 23, 3]: 42,514,378 parameters for one channel."""
    return build_resnet("resnet101", num_classes, in_channels, stem, pretrained)


def resnet152(
    *, num_classes: int = 10, in_channels: int = 1, stem: Stem = "imagenet", pretrained: bool = False
) -> nn.Module:
    """Builds ResNet-152 with bottleneck blocks [3, 8, 36, 3]: 58,158,026 parameters for one channel."""
    return build_resnet("resnet152", num_classes, in_channels, stem, pretrained)


def build_resnet(name: str, num_classes: int, in_channels: int, stem: Stem, pretrained: bool) -> nn.Module:
    """Returns torchvision's ResNet of that name.

    Args:
        num_classes: number of classes.
        in_channels: channels of the images.
        stem: "imagenet" for the paper's 7×7 convolution of stride 2 and max-pooling; "cifar" for a 3×3 convolution of
            stride 1 and no pooling, for images of about 32×32 pixels (He et al., section 4.2).
        pretrained: start from torchvision's weights for ImageNet, except for the last layer and a replaced stem.

    Raises:
        ValueError: num_classes is below 1, the stem is unknown, or the pretrained weights cannot be loaded.
    """
    from torchvision import models  # imported late: the import takes seconds, and other networks do not need it

    require_positive(num_classes=num_classes)
    if stem not in ("imagenet", "cifar"):
        raise ValueError(f"stem must be imagenet or cifar, not {stem!r}")
    model = models.get_model(name, weights=None, num_classes=num_classes)
    if pretrained:
        load_pretrained(name, model)
    if stem == "cifar":
        model.conv1 = he_initialized(nn.Conv2d(in_channels, 64, 3, padding=1, bias=False))
        model.maxpool = nn.Identity()
    elif pretrained:
        accept_channels(model, in_channels)
    elif in_channels != 3:
        model.conv1 = he_initialized(nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False))
    return model


def he_initialized(convolution: nn.Conv2d) -> nn.Conv2d:
    """Gives a convolution He's initialisation: the document asks for it, and torchvision uses it for its others."""
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return convolution
