"""Models V1, V2 and V3 of document 5: CNNs of about 8,000 parameters that end in log-softmax.

Input: float (N, in_channels, *image_size). Output: log-probabilities (N, num_classes). The document trains with the
negative log likelihood. Cross entropy of log-probabilities has the same value, so one loss serves all networks. Each
function raises ValueError if num_classes is below 1, the image is too small or dropout is outside [0, 1).
"""

from collections import OrderedDict

from torch import nn

from mnist_dist.models.layers import Dropout, require_positive, sides_after


def model_v1(
    *, num_classes: int = 10, in_channels: int = 1, image_size: tuple[int, int] = (28, 28), dropout: float = 0.01
) -> nn.Sequential:
    """Builds Model V1, whose last layer is a 1×1 convolution: 7,720 parameters."""
    require_positive(num_classes=num_classes)
    last = nn.Conv2d(10, num_classes, 1, bias=False)
    pool = nn.AvgPool2d(pooled_sides(image_size))
    return stages(in_channels, dropout, four_blocks(dropout), pool, last, nn.Flatten())


def model_v2(
    *, num_classes: int = 10, in_channels: int = 1, image_size: tuple[int, int] = (28, 28), dropout: float = 0.025
) -> nn.Sequential:
    """Builds Model V2, which is Model V1 with a linear last layer: 7,730 parameters."""
    require_positive(num_classes=num_classes)
    last = nn.Linear(10, num_classes)
    pool = nn.AvgPool2d(pooled_sides(image_size))
    return stages(in_channels, dropout, four_blocks(dropout), pool, nn.Flatten(), last)


def model_v3(
    *, num_classes: int = 10, in_channels: int = 1, image_size: tuple[int, int] = (28, 28), dropout: float = 0.025
) -> nn.Sequential:
    """Builds Model V3, which is Model V2 with one more convolution and adaptive pooling: 8,650 parameters."""
    require_positive(num_classes=num_classes)
    pooled_sides(image_size)
    five_blocks = nn.Sequential(
        block(10, 10, dropout),  # 10×10
        block(10, 16, dropout, padding=1),
        block(16, 16, dropout),  # 8×8
        block(16, 10, dropout),  # 6×6
        block(10, 10, dropout, padding=1),
    )
    last = nn.Linear(10, num_classes)
    return stages(in_channels, dropout, five_blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), last)


def pooled_sides(image_size: tuple[int, int]) -> tuple[int, int]:
    """Returns height and width of the features that the last pooling averages: 3×3 for an image of 28×28."""
    return sides_after(image_size, lambda side: ((side - 4) // 2 - 6) // 2)


def stages(in_channels: int, dropout: float, conv_block2: nn.Module, *output: nn.Module) -> nn.Sequential:
    """Returns a network of the layers that V1, V2 and V3 share and of the two parts in which they differ.

    Args:
        conv_block2: for an image of 28×28, (N, 10, 12, 12) to (N, 10, 6, 6).
        output: layers from, for this image, (N, 10, 3, 3) to (N, num_classes).
    """
    named = OrderedDict(
        input_block=block(in_channels, 8, dropout),  # 26×26
        conv_block1=block(8, 16, dropout),  # 24×24
        transition=nn.Sequential(nn.Conv2d(16, 10, 1, bias=False), nn.MaxPool2d(2)),  # 12×12
        conv_block2=conv_block2,  # 6×6
        output=nn.Sequential(nn.AvgPool2d(2), *output, nn.LogSoftmax(dim=1)),  # 3×3, then 1×1
    )
    return nn.Sequential(named)


def four_blocks(dropout: float) -> nn.Sequential:
    """Returns `conv_block2` of V1 and V2."""
    return nn.Sequential(
        block(10, 16, dropout),  # 10×10
        block(16, 16, dropout),  # 8×8
        block(16, 10, dropout),  # 6×6
        block(10, 10, dropout, padding=1),
    )


def block(in_channels: int, out_channels: int, dropout: float, *, padding: int = 0) -> nn.Sequential:
    """Returns a 3×3 convolution without bias, ReLU, batch norm, dropout."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=padding, bias=False),
        nn.ReLU(),
        nn.BatchNorm2d(out_channels),
        Dropout(dropout),
    )
