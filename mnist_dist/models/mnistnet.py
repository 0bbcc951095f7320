"""MNISTNet of document 4: ten convolution blocks and global average pooling."""

from torch import Tensor, nn

from mnist_dist.models.layers import Dropout, require_positive, sides_after


class MNISTNet(nn.Module):
    """The layer table of document 4, with the numbers of channels as arguments.

    Input: float (N, in_channels, *image_size). Output: logits (N, num_classes). The document's table (width 32, hidden
    16) has 108,864 parameters. Its text states about 24,500 and 13,000; width 15 with hidden 8 has 24,331, width 11
    with hidden 6 has 13,223.

    Args:
        num_classes: number of classes.
        in_channels, image_size: channels, and height and width, of the images.
        width: channels of most blocks; blocks 8 and 9 have twice as many.
        hidden: channels of block 4, a 1×1 convolution.
        dropout: dropout rate after each block.

    Raises:
        ValueError: a size is below 1, the image is too small, or dropout is outside [0, 1).
    """

    def __init__(
        self,
        *,
        num_classes: int = 10,
        in_channels: int = 1,
        image_size: tuple[int, int] = (28, 28),
        width: int = 32,
        hidden: int = 16,
        dropout: float = 0.05,
    ) -> None:
        super().__init__()
        require_positive(num_classes=num_classes, width=width, hidden=hidden)
        self.convblock1 = block(in_channels, width, dropout)  # 28×28
        self.convblock2 = block(width, width, dropout)
        self.convblock3 = block(width, width, dropout)
        self.pool1 = nn.MaxPool2d(2)  # 14×14
        self.convblock4 = block(width, hidden, dropout, kernel_size=1)
        self.convblock5 = block(hidden, width, dropout)
        self.convblock6 = block(width, width, dropout)
        self.pool2 = nn.MaxPool2d(2)  # 7×7
        self.convblock7 = block(width, width, dropout, kernel_size=1)
        self.convblock8 = block(width, 2 * width, dropout)
        self.convblock9 = block(2 * width, 2 * width, dropout)
        self.convblock10 = block(2 * width, width, dropout)
        self.convblock11 = nn.Conv2d(width, num_classes, 1, bias=False)
        self.gap = nn.AvgPool2d(sides_after(image_size, lambda side: side // 2 // 2))  # 1×1

    def forward(self, images: Tensor) -> Tensor:
        features = self.convblock3(self.convblock2(self.convblock1(images)))
        features = self.convblock6(self.convblock5(self.convblock4(self.pool1(features))))
        features = self.convblock9(self.convblock8(self.convblock7(self.pool2(features))))
        return self.gap(self.convblock11(self.convblock10(features))).flatten(1)


def block(in_channels: int, out_channels: int, dropout: float, *, kernel_size: int = 3) -> nn.Sequential:
    """Returns a convolution without bias that keeps height and width, batch norm, ReLU, dropout."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
        Dropout(dropout),
    )
