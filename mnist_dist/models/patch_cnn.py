"""PatchCNN: a network for the shortest training time, for the recipes of configs/speed."""

import torch.nn.functional as F
from torch import Tensor, nn

from mnist_dist.models.layers import Dropout, require_positive


class PatchCNN(nn.Module):
    """3×3 convolutions over patches of 2×2 pixels: 22,346 parameters with the default arguments.

    Input: float (N, in_channels, *image_size), of even sides. Output: logits (N, num_classes). The four pixels of a
    patch become four channels of an image of half the size ("space to depth", Ridnik et al., "TResNet",
    arXiv:2003.13630), because a convolution over one channel uses few of a processor's multipliers. The first
    convolution then covers 6×6 pixels, at a quarter of the positions. Batch norm and ReLU follow each convolution;
    max-pooling comes before both where `pooled` asks for it.

    Args:
        num_classes: number of classes.
        in_channels, image_size: channels, and height and width, of the images.
        widths: channels of each convolution.
        pooled: positions in `widths`, from 0, of the convolutions that are max-pooled over 2×2.
        padding: pixels that each convolution adds at the border.
        dropout: dropout rate before the linear layer.

    Raises:
        ValueError: a size is below 1, the convolutions leave nothing of the image, or dropout is outside [0, 1).
    """

    def __init__(
        self,
        *,
        num_classes: int = 10,
        in_channels: int = 1,
        image_size: tuple[int, int] = (28, 28),
        widths: tuple[int, ...] = (32, 64),
        pooled: tuple[int, ...] = (0, 1),
        padding: int = 0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        sizes = {f"widths[{position}]": width for position, width in enumerate(widths)}
        require_positive(num_classes=num_classes, **sizes)
        if image_size[0] % 2 or image_size[1] % 2:
            raise ValueError(f"patches of 2×2 pixels do not cover an image of {image_size[0]}×{image_size[1]}")
        self.pooled, channels = frozenset(pooled), 4 * in_channels
        height, wide = image_size[0] // 2, image_size[1] // 2
        self.convolutions, self.norms = nn.ModuleList(), nn.ModuleList()
        for position, width in enumerate(widths):
            self.convolutions.append(nn.Conv2d(channels, width, 3, padding=padding, bias=False))
            self.norms.append(nn.BatchNorm2d(width))
            step = 2 if position in self.pooled else 1
            channels, height, wide = width, (height + 2 * padding - 2) // step, (wide + 2 * padding - 2) // step
            if min(height, wide) < 1:
                raise ValueError(f"widths: {position + 1} convolutions leave nothing of the image")
        self.classifier = nn.Sequential(Dropout(dropout), nn.Linear(channels * height * wide, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        features = F.pixel_unshuffle(images, 2)
        for position, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            features = convolution(features)
            if position in self.pooled:
                features = F.max_pool2d(features, 2)  # before batch norm, which then has a quarter of the work
            features = F.relu(norm(features))
        return self.classifier(features.flatten(1))
