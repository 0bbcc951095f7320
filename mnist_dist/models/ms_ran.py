"""The Multi-Scale Residual Attention Network (MS-RAN) of document 1."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnist_dist.models.layers import Dropout, require_positive


class MSRAN(nn.Module):
    """Residual blocks, an inception module and channel attention: 443,994 parameters with the document's numbers.

    Input: float (N, in_channels, H, W). Output: logits (N, num_classes).

    Args:
        num_classes: number of classes.
        in_channels: channels of the images.
        width: channels of the stem; the later stages have 2, 4 and 8 times as many.
        bottleneck: hidden units of the channel attention.
        dropout: dropout rate before the last layer.

    Raises:
        ValueError: a size is below 1, or dropout is outside [0, 1).
    """

    def __init__(
        self,
        *,
        num_classes: int = 10,
        in_channels: int = 1,
        width: int = 32,
        bottleneck: int = 16,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        require_positive(num_classes=num_classes, width=width, bottleneck=bottleneck)
        self.stem = convolution(in_channels, width, kernel_size=3)  # 28×28
        self.residual1 = ResidualBlock(width, 2 * width)  # 14×14
        self.residual2 = ResidualBlock(2 * width, 4 * width)  # 7×7
        self.inception = InceptionModule(4 * width, 8 * width)  # 7×7
        self.attention = ChannelAttention(8 * width, bottleneck)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Flatten(), Dropout(dropout), nn.Linear(8 * width, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        features = self.residual2(self.residual1(self.stem(images)))
        return self.classifier(self.pool(self.attention(self.inception(features))))


def convolution(in_channels: int, out_channels: int, *, kernel_size: int) -> nn.Sequential:
    """Returns a convolution with bias that keeps height and width, batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions plus a 1×1 projection of the input; halves height and width.

    He et al., "Deep residual learning for image recognition", CVPR 2016.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        self.shortcut = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 1, stride=2, bias=False), nn.BatchNorm2d(out_channels)
        )

    def forward(self, features: Tensor) -> Tensor:
        return F.relu(self.body(features) + self.shortcut(features))


class InceptionModule(nn.Module):
    """Four parallel paths, each of a quarter of the output channels; the 5×5 path is two 3×3 convolutions.

    Szegedy et al., "Going deeper with convolutions", CVPR 2015.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        path = out_channels // 4
        self.path1x1 = convolution(in_channels, path, kernel_size=1)
        self.path3x3 = nn.Sequential(
            convolution(in_channels, path, kernel_size=1), convolution(path, path, kernel_size=3)
        )
        self.path5x5 = nn.Sequential(
            convolution(in_channels, path, kernel_size=1),
            convolution(path, path, kernel_size=3),
            convolution(path, path, kernel_size=3),
        )
        self.path_pool = nn.Sequential(
            nn.MaxPool2d(3, stride=1, padding=1), convolution(in_channels, path, kernel_size=1)
        )

    def forward(self, features: Tensor) -> Tensor:
        paths = (self.path1x1, self.path3x3, self.path5x5, self.path_pool)
        return torch.cat([path(features) for path in paths], dim=1)


class ChannelAttention(nn.Module):
    """Multiplies each channel by a weight in (0, 1), which a small network computes from the means of all channels.

    Hu et al., "Squeeze-and-excitation networks", CVPR 2018.
    """

    def __init__(self, channels: int, bottleneck: int) -> None:
        super().__init__()
        self.weights = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(channels, bottleneck),
            nn.ReLU(),
            nn.Linear(bottleneck, channels),
            nn.Sigmoid(),
        )

    def forward(self, features: Tensor) -> Tensor:
        return features * self.weights(features)[:, :, None, None]
