"""LeNet-5, from the comparison table of document 2.

LeCun, Bottou, Bengio, Haffner, "Gradient-based learning applied to document recognition", Proc. of the IEEE, 1998.
"""

from collections import OrderedDict

from torch import nn

from mnist_dist.models.layers import require_positive, sides_after


def lenet5(*, num_classes: int = 10, in_channels: int = 1, image_size: tuple[int, int] = (28, 28)) -> nn.Sequential:
    """Builds LeNet-5 with ReLU and max-pooling: 61,706 parameters for 10 classes.

    Input: float (N, in_channels, *image_size), padded by 2 pixels: 28×28 to the paper's 32×32. Output: logits (N,
    num_classes).

    Raises:
        ValueError: num_classes is below 1, or the image is too small.
    """
    require_positive(num_classes=num_classes)
    height, width = sides_after(image_size, lambda side: (side // 2 - 4) // 2)
    features = nn.Sequential(
        nn.Conv2d(in_channels, 6, 5, padding=2),  # 28×28
        nn.ReLU(),
        nn.MaxPool2d(2),  # 14×14
        nn.Conv2d(6, 16, 5),  # 10×10
        nn.ReLU(),
        nn.MaxPool2d(2),  # 5×5
    )
    classifier = nn.Sequential(
        nn.Flatten(),
        nn.Linear(16 * height * width, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, num_classes),
    )
    return nn.Sequential(OrderedDict(features=features, classifier=classifier))
