"""LeNet-5 with dropout and a slow training step, so that a run of few steps lasts as long as a test needs it."""

from __future__ import annotations

import os
import time
from pathlib import Path

from torch import Tensor, nn

from mnist_dist.models.lenet import lenet5

SECONDS = 0.05


class SlowLeNet(nn.Module):
    """Sleeps in each forward pass of the training while the file $SLOW_WHILE exists."""

    def __init__(self, num_classes: int = 10):
        super().__init__()
        self.layers = lenet5(num_classes=num_classes)
        self.dropout = nn.Dropout(0.1)

    def forward(self, images: Tensor) -> Tensor:
        if self.training and Path(os.environ.get("SLOW_WHILE", "/nonexistent")).exists():
            time.sleep(SECONDS)
        return self.layers(self.dropout(images))
