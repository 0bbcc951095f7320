"""Predictions of a run's network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mnist_dist.data.augment import normalize
from mnist_dist.run.reader import Run


@torch.no_grad()
def predict(run: Run, images: Tensor) -> list[dict[str, Any]]:
    """For each of the images, uint8 (N, 1, 28, 28): `digit`, its `confidence` (0 to 1), and `top3` as such pairs."""
    classes, about = run.about["classes"], run.about
    # One by one: a network may normalise by the batch, and a picture's answer is not to depend on its neighbours.
    logits = torch.cat([run.model(normalize(image[None], about["mean"], about["std"])) for image in images])
    confidences, places = logits.softmax(dim=1).topk(min(3, len(classes)))
    found = []
    for values, indices in zip(confidences.tolist(), places.tolist(), strict=True):
        top = [{"digit": classes[index], "confidence": value} for value, index in zip(values, indices, strict=True)]
        found.append({**top[0], "top3": top})
    return found
