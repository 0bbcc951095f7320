"""SimpleCNN of document 3: bottlenecks and grouped convolutions, below 25,000 parameters."""

from torch import Tensor, nn

from mnist_dist.models.layers import require_positive, sides_after


class SimpleCNN(nn.Module):
    """Two residual blocks with scaled identity paths: 21,614 parameters for 10 classes.

    Input: float (N, in_channels, *image_size). Output: logits (N, num_classes). Batch norm has no running statistics,
    as the document asks, so an image's logits depend on the other images of its batch, in evaluation too.

    Raises:
        ValueError: num_classes is below 1, or the image is too small.
    """

    def __init__(self, *, num_classes: int = 10, in_channels: int = 1, image_size: tuple[int, int] = (28, 28)) -> None:
        super().__init__()
        require_positive(num_classes=num_classes)
        height, width = sides_after(image_size, lambda side: side // 2 // 2)
        self.initial = nn.Sequential(
            *convolution(in_channels, 8, kernel_size=5),
            nn.LeakyReLU(0.1),
            *convolution(8, 8, kernel_size=3),
            nn.LeakyReLU(0.1),
            nn.MaxPool2d(2),  # 14×14
        )
        self.residual1 = ScaledResidual(
            *convolution(8, 6, kernel_size=1),
            nn.LeakyReLU(0.1),
            *convolution(6, 6, kernel_size=3),
            nn.LeakyReLU(0.1),
            *convolution(6, 8, kernel_size=1),
            scale=2.5,
        )
        self.transition = nn.Sequential(
            nn.LeakyReLU(0.1),
            nn.MaxPool2d(2),  # 7×7
            *convolution(8, 12, kernel_size=1),
            nn.LeakyReLU(0.1),
        )
        self.residual2 = ScaledResidual(
            *convolution(12, 12, kernel_size=3, groups=3),
            nn.LeakyReLU(0.1),
            *convolution(12, 12, kernel_size=3, groups=3),
            scale=2.0,
        )
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(12 * height * width, 32),
            # The document has InstanceNorm1d(32), which PyTorch rejects for (N, 32). LayerNorm has the same 64
            # parameters and also normalises each sample over its features.
            nn.LayerNorm(32),
            nn.LeakyReLU(0.1),
            nn.Linear(32, num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        features = self.residual1(self.initial(images))
        return self.classifier(self.residual2(self.transition(features)))

    def parameter_breakdown(self) -> dict[str, int]:
        """Returns the number of parameters of each stage, in the order of the document's table."""
        return {name: sum(weight.numel() for weight in stage.parameters()) for name, stage in self.named_children()}


class ScaledResidual(nn.Module):
    """Computes layers(x) + scale × x."""

    def __init__(self, *layers: nn.Module, scale: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.scale = scale

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features) + self.scale * features


def convolution(
    in_channels: int, out_channels: int, *, kernel_size: int, groups: int = 1
) -> tuple[nn.Module, nn.Module]:
    """Returns a convolution with bias that keeps height and width, and batch norm without running statistics."""
    return (
        nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, groups=groups),
        nn.BatchNorm2d(out_channels, track_running_stats=False),
    )
