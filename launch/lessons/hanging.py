"""A network that hangs on rank 1 in a training step, as a dead disk or a broken driver makes a process hang."""

import time

import torch.distributed as dist
from torch import Tensor, nn

from mnist_dist import build_model


class Hanging(nn.Module):
    """`small_cnn`, which waits for ever in its sixth training step on rank 1."""

    def __init__(self) -> None:
        super().__init__()
        self.network, self.steps = build_model("small_cnn"), 0

    def forward(self, images: Tensor) -> Tensor:
        # Before a run the trainer tries a copy of the network with two images: not counted.
        if self.training and len(images) > 2 and dist.is_initialized() and dist.get_rank() == 1:
            self.steps += 1
            if self.steps > 5:
                self.read_from_a_dead_disk()
        return self.network(images)

    def read_from_a_dead_disk(self) -> None:
        time.sleep(1_000_000)
