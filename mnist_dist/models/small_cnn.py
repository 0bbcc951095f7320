"""The "Simple CNN" of document 2's comparison table, which states its size (about 60,000) but not its layers."""

from collections import OrderedDict

from torch import nn

from mnist_dist.models.layers import require_positive, sides_after


def small_cnn(*, num_classes: int = 10, in_channels: int = 1, image_size: tuple[int, int] = (28, 28)) -> nn.Sequential:
    """Builds two 5×5 convolutions (20 and 40 channels) and two linear layers (640→60→classes): 59,630 parameters.

    Input: float (N, in_channels, *image_size). Output: logits (N, num_classes).

    Raises:
        ValueError: num_classes is below 1, or the image is too small.
    """
    require_positive(num_classes=num_classes)
    height, width = sides_after(image_size, lambda side: ((side - 4) // 2 - 4) // 2)
    features = nn.Sequential(
        nn.Conv2d(in_channels, 20, 5),  # 24×24
        nn.ReLU(),
        nn.MaxPool2d(2),  # 12×12
        nn.Conv2d(20, 40, 5),  # 8×8
        nn.ReLU(),
        nn.MaxPool2d(2),  # 4×4
    )
    hidden = nn.Linear(40 * height * width, 60)
    classifier = nn.Sequential(nn.Flatten(), hidden, nn.ReLU(), nn.Linear(60, num_classes))
    return nn.Sequential(OrderedDict(features=features, classifier=classifier))
