"""SeparableCNN: a network for the fewest parameters, for the recipes of configs/plus."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from mnist_dist.models.layers import require_positive, sides_after

ACTIVATIONS = {"relu": F.relu, "hardswish": F.hardswish}


class SeparableCNN(nn.Module):
    """A 3×3 convolution, then depthwise separable convolutions: 7,914 parameters with the default arguments.

    Input: float (N, in_channels, *image_size). Output: logits (N, num_classes). A separable convolution is a 3×3
    convolution of each channel alone, then a 1×1 convolution of all channels (Chollet, "Xception", arXiv:1610.02357).
    With 36 channels it has a seventh of the parameters of a full 3×3 convolution. Batch norm follows, then the sum with
    the block's input if the number of channels stays the same, then the activation. The linear layer receives one value
    per channel.

    Args:
        num_classes: number of classes.
        in_channels, image_size: channels, and height and width, of the images.
        stem: channels of the first convolution, whose output is 26×26 for an image of 28×28.
        widths: channels of each separable convolution.
        pooled: positions in `widths`, from 0, of the convolutions whose input is max-pooled over 2×2.
        activation: "relu", or "hardswish" of MobileNetV3 (Howard et al., arXiv:1905.02244).
        head: how a channel becomes one value. "mean" averages it. "weighted" sums it with a learned weight for every
            pixel, which keeps where a feature was (the global depthwise convolution of MobileFaceNets, Chen et al.,
            arXiv:1804.07573).

    Raises:
        ValueError: a size is below 1, pooling leaves nothing of the image, or the activation or head is unknown.
    """

    def __init__(
        self,
        *,
        num_classes: int = 10,
        in_channels: int = 1,
        image_size: tuple[int, int] = (28, 28),
        stem: int = 16,
        widths: tuple[int, ...] = (36, 36, 36, 36, 32),
        pooled: tuple[int, ...] = (0, 3),
        activation: Literal["relu", "hardswish"] = "relu",
        head: Literal["mean", "weighted"] = "mean",
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be {' or '.join(ACTIVATIONS)}, not {activation!r}")
        if head not in ("mean", "weighted"):
            raise ValueError(f"head must be mean or weighted, not {head!r}")
        sizes = {f"widths[{position}]": width for position, width in enumerate(widths)}
        require_positive(num_classes=num_classes, stem=stem, **sizes)
        self.stem = nn.Sequential(nn.Conv2d(in_channels, stem, 3, bias=False), nn.BatchNorm2d(stem))
        self.activation = ACTIVATIONS[activation]
        self.pooled, channels, blocks = frozenset(pooled), stem, []
        height, wide = sides_after(image_size, lambda side: side - 2)
        for position, width in enumerate(widths):
            blocks.append(separable(channels, width))
            step = 2 if position in self.pooled else 1
            channels, height, wide = width, height // step, wide // step
            if min(height, wide) < 1:
                raise ValueError(f"pooled: pooling leaves nothing of the image before convolution {position}")
        self.blocks = nn.ModuleList(blocks)
        self.head = depthwise(channels, (height, wide)) if head == "weighted" else None
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        features = self.activation(self.stem(images))
        for position, block in enumerate(self.blocks):
            if position in self.pooled:
                features = F.max_pool2d(features, 2)
            mixed = block(features)
            features = self.activation(mixed + features if mixed.shape == features.shape else mixed)
        return self.classifier(self.head(features).flatten(1) if self.head else features.mean(dim=(2, 3)))


def separable(in_channels: int, out_channels: int) -> nn.Sequential:
    """Returns a separable 3×3 convolution without biases that keeps height and width, and batch norm."""
    return nn.Sequential(
        nn.Conv2d(in_channels, in_channels, 3, padding=1, groups=in_channels, bias=False),
        nn.Conv2d(in_channels, out_channels, 1, bias=False),
        nn.BatchNorm2d(out_channels),
    )


def depthwise(channels: int, size: tuple[int, int]) -> nn.Sequential:
    """Returns a convolution from (N, channels, *size) to (N, channels, 1, 1), one filter per channel."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, size, groups=channels, bias=False),
        nn.BatchNorm2d(channels),
    )
