"""Classifies images with the network of a run, on the CPU in fp32, also if the run was trained in another precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mnist_dist.data import normalize
from mnist_dist.data.pictures import prepare_picture
from mnist_dist.run.reader import Run

LEAST_CONFIDENCE = 0.7
"""A prediction with less confidence is marked as unsure."""


def predict_picture(run: Run, path: Path) -> dict[str, Any]:
    """Prepares the picture in a file like the images that the network was trained with, and classifies it.

    Returns:
        The dictionary that `predict` returns for one image, and `unsure`: the reasons why the prediction may be wrong,
        such as "two figures", or None.

    Raises:
        ValueError: see `mnist_dist.data.pictures.prepare_picture`.
    """
    prepared = prepare_picture(path, run.geometry)
    [found] = predict(run, prepared.image[None])
    reasons = [*prepared.doubts, *["low confidence"] * (found["confidence"] < LEAST_CONFIDENCE)]
    return {**found, "unsure": ", ".join(reasons) or None}


@torch.no_grad()
def predict(run: Run, images: Tensor) -> list[dict[str, Any]]:
    """Classifies images one at a time.

    Args:
        images: uint8 (N, C, H, W).

    Returns:
        For each image the likeliest `class`, its probability as `confidence` (0 to 1), and the three likeliest classes
        as `top3`, a list of {class, confidence}. Where all classes are digits, the class is also under `digit`.
    """
    classes, about = run.about["classes"], run.about
    keys = ("class", "digit") if all(len(name) == 1 and name in "0123456789" for name in classes) else ("class",)
    # One at a time: a network may normalise by the batch, and a prediction must not depend on the other images.
    logits = torch.cat([run.model(normalize(image[None], about["mean"], about["std"])) for image in images])
    confidences, positions = logits.softmax(dim=1).topk(min(3, len(classes)))
    predictions = []
    for values, indices in zip(confidences.tolist(), positions.tolist(), strict=True):
        found = zip(values, indices, strict=True)
        top = [{**dict.fromkeys(keys, classes[index]), "confidence": value} for value, index in found]
        predictions.append({**top[0], "top3": top})
    return predictions
