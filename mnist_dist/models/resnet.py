"""Document 2: torchvision's ResNets with one channel in; He et al. 2016, Deep residual learning for image recognition.

Each takes float (N, 1, 28, 28), gives logits (N, num_classes), and raises ValueError if num_classes is below 1.
"""

from torch import nn

from mnist_dist.models.layers import require_positive


def resnet18(*, num_classes: int = 10) -> nn.Module:
    """18 layers, blocks [2, 2, 2, 2]; 11,175,370 parameters."""
    return one_channel("resnet18", num_classes)


def resnet34(*, num_classes: int = 10) -> nn.Module:
    """34 layers, blocks [3, 4, 6, 3]; 21,283,530 parameters."""
    return one_channel("resnet34", num_classes)


def resnet50(*, num_classes: int = 10) -> nn.Module:
    """50 layers, bottleneck blocks [3, 4, 6, 3]; 23,522,250 parameters."""
    return one_channel("resnet50", num_classes)


def resnet101(*, num_classes: int = 10) -> nn.Module:
    """101 layers, bottleneck blocks [3, 4, 23, 3]; 42,514,378 parameters."""
    return one_channel("resnet101", num_classes)


def resnet152(*, num_classes: int = 10) -> nn.Module:
    """152 layers, bottleneck blocks [3, 8, 36, 3]; 58,158,026 parameters."""
    return one_channel("resnet152", num_classes)


def one_channel(name: str, num_classes: int) -> nn.Module:
    from torchvision import models  # its import takes seconds, which the other networks need not pay

    require_positive(num_classes=num_classes)
    model = models.get_model(name, weights=None, num_classes=num_classes)
    model.conv1 = nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)
    # He initialisation, as torchvision gives every other convolution and as the document asks.
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    return model
