"""A network made for few parameters: for the recipes of configs/plus."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from mnist_dist.models.layers import require_positive

ACTIVATIONS = {"relu": F.relu, "hardswish": F.hardswish}


class SeparableCNN(nn.Module):
    """A 3×3 convolution, then separable ones, and one value a channel for the linear layer.

    Float (N, 1, 28, 28) gives logits (N, num_classes). A separable convolution is a 3×3 one of each channel by itself
    and a 1×1 one of all (Chollet, "Xception", arXiv 1610.02357): at 36 channels a seventh of a full one's parameters.
    It is followed by batch norm, a shortcut around both where the width stays, and the activation.

    Args:
        num_classes: outputs.
        stem: channels of the first convolution, which leaves 26×26.
        widths: channels of the separable ones.
        pooled: before which of them, counted from 0, the image is max-pooled over 2×2.
        activation: "hardswish" is that of MobileNetV3 (Howard et al., arXiv 1905.02244).
        head: what becomes of a channel at the end: its mean, or a learned weight for every place, which knows where
            something was (the global depthwise convolution of MobileFaceNets, Chen et al., arXiv 1804.07573).

    Raises:
        ValueError: a size is below 1, too little is left of the image, or there is no such activation or head.
    """

    def __init__(
        self,
        *,
        num_classes: int = 10,
        stem: int = 16,
        widths: tuple[int, ...] = (36, 36, 36, 36, 32),
        pooled: tuple[int, ...] = (0, 3),
        activation: Literal["relu", "hardswish"] = "relu",
        head: Literal["mean", "weighted"] = "mean",
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {activation}")
        if head not in ("mean", "weighted"):
            raise ValueError(f"head must be mean or weighted, not {head}")
        sizes = {f"widths[{place}]": width for place, width in enumerate(widths)}
        require_positive(num_classes=num_classes, stem=stem, **sizes)
        self.stem = nn.Sequential(nn.Conv2d(1, stem, 3, bias=False), nn.BatchNorm2d(stem))
        self.activation = ACTIVATIONS[activation]
        self.pooled, side, channels, blocks = frozenset(pooled), 26, stem, []
        for place, width in enumerate(widths):
            blocks.append(separable(channels, width))
            channels, side = width, side // (2 if place in self.pooled else 1)
            if side < 1:
                raise ValueError(f"pooled: nothing is left of the image before convolution {place}")
        self.blocks = nn.ModuleList(blocks)
        self.head = depthwise(channels, side) if head == "weighted" else None
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        features = self.activation(self.stem(images))
        for place, block in enumerate(self.blocks):
            if place in self.pooled:
                features = F.max_pool2d(features, 2)
            mixed = block(features)
            features = self.activation(mixed + features if mixed.shape == features.shape else mixed)
        return self.classifier(self.head(features).flatten(1) if self.head else features.mean(dim=(2, 3)))


def separable(in_channels: int, out_channels: int) -> nn.Sequential:
    """Keeps height and width; batch norm at the end, no biases."""
    return nn.Sequential(
        nn.Conv2d(in_channels, in_channels, 3, padding=1, groups=in_channels, bias=False),
        nn.Conv2d(in_channels, out_channels, 1, bias=False),
        nn.BatchNorm2d(out_channels),
    )


def depthwise(channels: int, side: int) -> nn.Sequential:
    """One value a channel, (N, channels, 1, 1), from an image of that side."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, side, groups=channels, bias=False),
        nn.BatchNorm2d(channels),
    )
