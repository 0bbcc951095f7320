"""Measures an exported file and compares it with the network in PyTorch."""

from __future__ import annotations

import statistics
import timeit
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mnist_dist.data import Images, normalize
from mnist_dist.errors import Problem, RecipeError, RunError

Predictor = Callable[[Tensor], Tensor]
"""From uint8 (N, C, H, W) to probabilities, float32 (N, classes)."""

NEAR_TIE = 1e-5
"""The file may predict another class than the network if their probabilities in the network differ by less."""


class Deployed(nn.Module):
    """A trained network that normalises its input itself and ends with a softmax."""

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.network, self.mean, self.std = network, mean, std

    def forward(self, images: Tensor) -> Tensor:
        return self.network(normalize(images, self.mean, self.std)).softmax(dim=1)


@dataclass(frozen=True)
class Form:
    """One form of the network, PyTorch or a file, as measured on the test set."""

    name: str
    size: int
    """Bytes."""
    accuracy: float
    """Percent."""
    predictions: Tensor
    """int64 (N,)."""
    probabilities: Tensor
    """float32 (N, classes)."""
    predict: Predictor

    def seconds(self, images: Tensor) -> float:
        """Returns the median time of 15 calls on uint8 images (N, C, H, W), in seconds, after one warm-up call."""
        return statistics.median(timeit.repeat(lambda: self.predict(images), number=1, repeat=16)[1:])


# --- checks -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def refuse_batch_dependence(deployed: Deployed, images: Tensor, name: str) -> None:
    """Checks that the result for an image depends neither on the other images of its batch nor on random numbers.

    Args:
        images: uint8 (N, C, H, W).
        name: the model, for the message.

    Raises:
        RecipeError: the result for an image alone differs from its result in the batch.
    """
    inputs = normalize(images, deployed.mean, deployed.std)
    batched = deployed.network(inputs)
    alone = torch.cat([deployed.network(each[None]) for each in inputs])
    if (batched - alone).abs().max() <= 1e-3 * batched.abs().max():
        return
    norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)
    layers = deployed.network.named_modules()
    found = [layer for layer, module in layers if isinstance(module, norms) and module.running_mean is None]
    cause = f" (layers with statistics of the batch in evaluation too: {', '.join(found[:3])})" if found else ""
    message = f"{name}'s result for an image depends on the other images of its batch, or on random numbers{cause};\n"
    message += "an exported file cannot reproduce such results"
    raise RecipeError([Problem("the network", "model.name", message, "model")])


@torch.no_grad()
def measure_form(name: str, size: int, predict: Predictor, data: Images, batch_size: int) -> Form:
    """Returns a form with its accuracy and its probabilities on a test set."""
    probabilities = torch.cat([predict(images) for images in data.images.split(batch_size)])
    predictions = probabilities.argmax(dim=1)
    accuracy = 100 * int((predictions == data.labels).sum()) / len(data)
    return Form(name, size, accuracy, predictions, probabilities, predict)


def disagreements(network: Form, made: Form) -> tuple[Tensor, int]:
    """Compares the predicted classes of a file with those of the network.

    A disagreement is a near-tie if the network's probability of the file's class is less than `NEAR_TIE` below its
    highest probability: rounding then decides between the two classes.

    Returns:
        The indices of the images whose predictions differ without a near-tie, int64 (K,), and the number of near-ties.
    """
    differs = network.predictions != made.predictions
    of_file = network.probabilities.gather(1, made.predictions[:, None])[:, 0]
    near = network.probabilities.amax(dim=1) - of_file < NEAR_TIE
    return (differs & ~near).nonzero().flatten(), int((differs & near).sum())


def check_agreement(network: Form, made: Form, classes: list[str]) -> None:
    """Compares the predicted class of every image; accepts near-ties, see `disagreements`.

    Raises:
        RunError: the predictions of at least one image differ; lists up to eight of them.
    """
    differing = disagreements(network, made)[0].tolist()
    if not differing:
        return

    def describe(form: Form, image: int) -> str:
        best = form.predictions[image]
        return f"{classes[best]} ({form.probabilities[image, best]:.6f})"

    lines = [f"  image {each}: {describe(made, each)}, not {describe(network, each)}" for each in differing[:8]]
    lines += [f"  and {len(differing) - 8} more"] if len(differing) > 8 else []
    count = f"{len(differing)} of {len(network.predictions):,} test images"
    message = f"the {made.name} file disagrees with PyTorch on {count}; nothing was written:"
    raise RunError("\n".join([message, *lines]))
