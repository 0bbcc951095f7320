"""Adds the gradients of parts of a batch in three ways: `python launch/lessons/accumulation.py`."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mnist_dist import build_model
from mnist_dist.data import load_dataset

train = load_dataset("synthetic").train
images, labels = train.normalize(train.images[:64]), train.labels[:64]
torch.manual_seed(0)
model = build_model("small_cnn")
parts = [(images[:30], labels[:30]), (images[30:60], labels[30:60]), (images[60:], labels[60:])]


def gradient() -> Tensor:
    """Returns the accumulated gradient as one vector, and sets it to zero for the next way."""
    result = torch.cat([each.grad.flatten() for each in model.parameters()])
    model.zero_grad()
    return result


def show(name: str, result: Tensor) -> None:
    length, error = result.norm() / exact.norm(), (result - exact).norm() / exact.norm()
    print(f"{name:36} {length:.2f} times as long, wrong by {100 * error:.3f} %")


F.cross_entropy(model(images), labels).backward()  # the whole batch at once
exact = gradient()
for x, y in parts:
    F.cross_entropy(model(x), y).backward()
show("means, added up", gradient())
for x, y in parts:
    (F.cross_entropy(model(x), y) / len(parts)).backward()
show("means, divided by the parts", gradient())
for x, y in parts:
    (F.cross_entropy(model(x), y, reduction="sum") / len(labels)).backward()
show("sums, divided by the images", gradient())
