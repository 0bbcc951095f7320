"""A network made for speed: for the recipes of configs/speed."""

import torch.nn.functional as F
from torch import Tensor, nn

from mnist_dist.models.layers import Dropout, require_positive


class PatchCNN(nn.Module):
    """3×3 convolutions over patches of 2×2 pixels, which stand as four channels of a 14×14 image.

    Float (N, 1, 28, 28) gives logits (N, num_classes). A convolution over one channel keeps few multipliers busy; over
    patches the first layer sees 6×6 pixels with a quarter of the positions (space to depth: Ridnik et al., "TResNet",
    arXiv 2003.13630). Each convolution is followed by batch norm and ReLU, some by max-pooling before those two.

    Args:
        num_classes: outputs.
        widths: channels of the convolutions.
        pooled: which of them, counted from 0, are pooled over 2×2.
        padding: pixels that each convolution adds at the border.
        dropout: rate before the linear layer.

    Raises:
        ValueError: a size is below 1, too little is left of the image, or dropout is outside [0, 1).
    """

    def __init__(
        self,
        *,
        num_classes: int = 10,
        widths: tuple[int, ...] = (32, 64),
        pooled: tuple[int, ...] = (0, 1),
        padding: int = 0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        require_positive(num_classes=num_classes, **{f"widths[{place}]": width for place, width in enumerate(widths)})
        self.pooled, side, channels = frozenset(pooled), 14, 4
        self.convolutions, self.norms = nn.ModuleList(), nn.ModuleList()
        for place, width in enumerate(widths):
            self.convolutions.append(nn.Conv2d(channels, width, 3, padding=padding, bias=False))
            self.norms.append(nn.BatchNorm2d(width))
            channels, side = width, (side + 2 * padding - 2) // (2 if place in self.pooled else 1)
            if side < 1:
                raise ValueError(f"widths: nothing is left of the image after {place + 1} convolutions")
        self.classifier = nn.Sequential(Dropout(dropout), nn.Linear(channels * side * side, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        features = F.pixel_unshuffle(images, 2)
        for place, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            features = convolution(features)
            if place in self.pooled:
                features = F.max_pool2d(features, 2)  # before the norm, which then has a quarter of the work
            features = F.relu(norm(features))
        return self.classifier(features.flatten(1))
