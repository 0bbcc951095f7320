"""LeNet-5, a comparison row of document 2; LeCun et al. 1998, Gradient-based learning applied to document recognition."""

from torch import Tensor, nn

from mnist_dist.models.layers import require_positive


class LeNet5(nn.Module):
    """LeNet-5 with ReLU and max-pooling; 61,706 parameters for 10 classes.

    The 28×28 image is padded by 2 to the 32×32 of the paper. Float (N, 1, 28, 28) gives logits (N, num_classes).

    Raises:
        ValueError: num_classes is below 1.
    """

    def __init__(self, *, num_classes: int = 10) -> None:
        super().__init__()
        require_positive(num_classes=num_classes)
        self.features = nn.Sequential(
            nn.Conv2d(1, 6, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),  # 14×14
            nn.Conv2d(6, 16, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),  # 5×5
        )
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(16 * 5 * 5, 120),
            nn.ReLU(),
            nn.Linear(120, 84),
            nn.ReLU(),
            nn.Linear(84, num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images))
