"""The ResNets of document 2: torchvision's networks with one input channel.

He, Zhang, Ren, Sun, "Deep residual learning for image recognition", CVPR 2016.

Input: float (N, 1, 28, 28). Output: logits (N, num_classes). Each function raises ValueError if num_classes is below 1.
"""

from torch import nn

from mnist_dist.models.layers import require_positive


def resnet18(*, num_classes: int = 10) -> nn.Module:
    """Builds ResNet-18 with blocks [2, 2, 2, 2]: 11,175,370 parameters."""
    return one_channel("resnet18", num_classes)


def resnet34(*, num_classes: int = 10) -> nn.Module:
    """Builds ResNet-34 with blocks [3, 4, 6, 3]: 21,283,530 parameters."""
    return one_channel("resnet34", num_classes)


def resnet50(*, num_classes: int = 10) -> nn.Module:
    """Builds ResNet-50 with bottleneck blocks [3, 4, 6, 3]: 23,522,250 parameters."""
    return one_channel("resnet50", num_classes)


def resnet101(*, num_classes: int = 10) -> nn.Module:
    """Builds ResNet-101 with bottleneck blocks [3, 4, 23, 3]: 42,514,378 parameters."""
    return one_channel("resnet101", num_classes)


def resnet152(*, num_classes: int = 10) -> nn.Module:
    """Builds ResNet-152 with bottleneck blocks [3, 8, 36, 3]: 58,158,026 parameters."""
    return one_channel("resnet152", num_classes)


def one_channel(name: str, num_classes: int) -> nn.Module:
    """Returns torchvision's ResNet with random weights and a first convolution of one input channel."""
    from torchvision import models  # imported late: the import takes seconds, and other networks do not need it

    require_positive(num_classes=num_classes)
    model = models.get_model(name, weights=None, num_classes=num_classes)
    model.conv1 = nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)
    # He initialisation, which the document asks for and torchvision uses for its other convolutions.
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    return model
