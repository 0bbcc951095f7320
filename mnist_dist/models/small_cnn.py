"""The "Simple CNN" of document 2's comparison table, which states its size (about 60,000) but not its layers."""

from collections import OrderedDict

from torch import nn

from mnist_dist.models.layers import require_positive


def small_cnn(*, num_classes: int = 10) -> nn.Sequential:
    """Builds two 5×5 convolutions (20 and 40 channels) and two linear layers (640→60→classes): 59,630 parameters.

    Input: float (N, 1, 28, 28). Output: logits (N, num_classes).

    Raises:
        ValueError: num_classes is below 1.
    """
    require_positive(num_classes=num_classes)
    features = nn.Sequential(
        nn.Conv2d(1, 20, 5),  # 24×24
        nn.ReLU(),
        nn.MaxPool2d(2),  # 12×12
        nn.Conv2d(20, 40, 5),  # 8×8
        nn.ReLU(),
        nn.MaxPool2d(2),  # 4×4
    )
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(40 * 4 * 4, 60), nn.ReLU(), nn.Linear(60, num_classes))
    return nn.Sequential(OrderedDict(features=features, classifier=classifier))
