"""Combines the gradients of unequal shares in two ways: `torchrun --nproc_per_node 2 … uneven_shares.py`."""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from mnist_dist import build_model
from mnist_dist.data import load_dataset

accelerator = Accelerator()
train = load_dataset("synthetic").train
images, labels = train.normalize(train.images[:5]), train.labels[:5]
torch.manual_seed(0)  # the same weights in every process
model = build_model("small_cnn")


def loss_and_gradient(share: slice, divisor: int) -> Tensor:
    """Returns the summed loss of a share, divided by a number, and its gradient, as one vector."""
    model.zero_grad()
    loss = F.cross_entropy(model(images[share]), labels[share], reduction="sum") / divisor
    loss.backward()
    return torch.cat([loss.detach()[None], *(each.grad.flatten() for each in model.parameters())])


def show(name: str, result: Tensor) -> None:
    error = (result[1:] - exact[1:]).norm() / exact[1:].norm()
    accelerator.print(f"{name:32} loss {result[0]:.4f}, gradient wrong by {100 * error:.3f} %")


exact = loss_and_gradient(slice(0, 5), 5)
share = slice(0, 4) if accelerator.is_main_process else slice(4, 5)  # rank 0: four images, rank 1: one
count = share.stop - share.start
accelerator.print(f"one process                      loss {exact[0]:.4f}")
show("mean of the means of two ranks", accelerator.reduce(loss_and_gradient(share, count), "mean"))
show("sum of the sums, divided by 5", accelerator.reduce(loss_and_gradient(share, 5), "sum"))
accelerator.end_training()
