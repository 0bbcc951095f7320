"""Comparing an exported file with the network in PyTorch."""

from __future__ import annotations

import statistics
import timeit
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mnist_dist.data import Images, normalize
from mnist_dist.errors import Problem, RecipeError, RunError

Answer = Callable[[Tensor], Tensor]
"""uint8 (N, 1, 28, 28) -> probabilities, float32 (N, classes)."""


class Deployed(nn.Module):
    """A trained network with its normalisation before it and softmax behind it."""

    def __init__(self, network: nn.Module, mean: float, std: float) -> None:
        super().__init__()
        self.network, self.mean, self.std = network, mean, std

    def forward(self, images: Tensor) -> Tensor:
        return self.network(normalize(images, self.mean, self.std)).softmax(dim=1)


@dataclass(frozen=True)
class Form:
    """The network in one form, as it was measured; `size` in bytes, `accuracy` in percent, times in seconds."""

    name: str
    size: int
    accuracy: float
    predictions: Tensor
    probabilities: Tensor
    answer: Answer

    def seconds(self, images: Tensor) -> float:
        """Median time of answering uint8 (N, 1, 28, 28), of fifteen after one that does not count."""
        return statistics.median(timeit.repeat(lambda: self.answer(images), number=1, repeat=16)[1:])


# --- checks -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def refuse_what_depends_on_the_batch(deployed: Deployed, images: Tensor, name: str) -> None:
    inputs = normalize(images, deployed.mean, deployed.std)
    together = deployed.network(inputs)
    alone = torch.cat([deployed.network(each[None]) for each in inputs])
    if (together - alone).abs().max() <= 1e-3 * together.abs().max():
        return
    norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)
    parts = deployed.network.named_modules()
    guilty = [part for part, module in parts if isinstance(module, norms) and module.running_mean is None]
    why = f" ({guilty[0]} and others normalise by the batch, also in evaluation)" if guilty else ""
    what = f"{name}'s answer to an image depends on the other images of its batch, or on chance{why}"
    raise RecipeError([Problem("the network", "", f"{what}:\nno file could repeat its answers")])


@torch.no_grad()
def measure_form(name: str, size: int, answer: Answer, data: Images, batch_size: int) -> Form:
    probabilities = torch.cat([answer(images) for images in data.images.split(batch_size)])
    predictions = probabilities.argmax(dim=1)
    accuracy = 100 * int((predictions == data.labels).sum()) / len(data)
    return Form(name, size, accuracy, predictions, probabilities, answer)


def check_answers(network: Form, made: Form, classes: list[str]) -> None:
    """Raises RunError unless both give every image the same class; names those that differ."""
    differing = (network.predictions != made.predictions).nonzero().flatten().tolist()
    if not differing:
        return

    def says(form: Form, image: int) -> str:
        best = form.predictions[image]
        return f"{classes[best]} ({form.probabilities[image, best]:.6f})"

    lines = [f"  image {each}: {says(made, each)}, not {says(network, each)}" for each in differing[:8]]
    lines += [f"  and {len(differing) - 8} more"] if len(differing) > 8 else []
    count = f"{len(differing)} of {len(network.predictions):,} test images"
    raise RunError("\n".join([f"{made.name} answers {count} otherwise than PyTorch; nothing was written:", *lines]))
