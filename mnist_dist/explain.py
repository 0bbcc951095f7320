"""Draws what a network's prediction depends on, as one PNG: `python -m mnist_dist.explain runs/mine photo.jpg`.

The PNG shows the picture as the network sees it, the three likeliest classes, the pixels on which the logit of the
likeliest class depends, and the feature maps of chosen layers. For a figure on a ground, colours show where more and
where less ink would raise the logit. All of it is computed in fp32, also if the network was trained in another
precision.
"""

from __future__ import annotations

from mnist_dist.cli import answer_early, parse, run_command

if __name__ == "__main__":
    answer_early("explain")  # before the imports below load torch

import itertools
import os
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from mnist_dist.data import normalize
from mnist_dist.data.pictures import prepare_picture
from mnist_dist.engine.evaluation import evaluating
from mnist_dist.errors import Kind, Problem, RecipeError, did_you_mean
from mnist_dist.run.prediction import predict
from mnist_dist.run.reader import Run, open_run
from mnist_dist.run.text_output import printable

MOST_LAYERS = 6
"""Without `--layers`, at most this many convolutions are drawn, evenly spaced from the first to the last."""

CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)


def get_feature_maps(model: nn.Module, images: Tensor, layers: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Returns the outputs of layers of any network, computed in evaluation mode.

    Args:
        images: the network's input: normalised floating-point (N, C, H, W) on the network's device.
        layers: names as in `model.named_modules()`; None for every convolution.

    Returns:
        For each layer, in the order given: float32 (N, C, H, W), detached. A linear layer gives (N, C, 1, 1). A layer
        that is used several times gives its last output.

    Raises:
        ValueError: a layer does not exist (the message names similar ones), is not used, or has an output of another
            shape; or `layers` is None and the network has no convolution.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    names = _layer_names(type(model).__name__, modules, layers)
    maps: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, inputs: object, output: object) -> None:
        if not isinstance(output, Tensor) or output.dim() not in (2, 4):
            found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"layer {name!r}: expected an output of shape (N, C, H, W) or (N, C), got {found}")
        # A copy, because the next layer may change the tensor in place.
        maps[name] = output.detach().to(torch.float32, copy=True).reshape(*output.shape, *(1,) * (4 - output.dim()))

    hooks = [modules[name].register_forward_hook(partial(keep, name)) for name in names]
    try:
        with torch.no_grad(), evaluating(model):
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    if unused := [name for name in names if name not in maps]:
        raise ValueError(f"layer {unused[0]!r} is not used in the forward pass of {type(model).__name__}")
    return {name: maps[name] for name in names}


def _layer_names(network: str, modules: dict[str, nn.Module], layers: Iterable[str] | None) -> list[str]:
    """Returns the names of the chosen layers after checking that they exist."""
    if layers is None:
        names = [name for name, module in modules.items() if isinstance(module, CONVOLUTIONS)]
        if not names:
            raise ValueError(f"{network} has no convolution; name layers, e.g. {', '.join([*modules][:3])}")
        return names
    names = [layers] if isinstance(layers, str) else list(layers)
    if unknown := [name for name in names if name not in modules]:
        hint = did_you_mean(unknown[0], modules) or f"; the first layers are {', '.join([*modules][:6])}"
        raise ValueError(f"{network} has no layer {unknown[0]!r}{hint}")
    return names


def smooth_gradient(model: nn.Module, image: Tensor, target: int, samples: int = 50, noise: float = 0.15) -> Tensor:
    """Returns the gradient of a class's logit with respect to the pixels, averaged over noisy copies of the image.

    Smilkov, Thorat, Kim, Viégas, Wattenberg, "SmoothGrad: removing noise by adding noise", 2017 (arXiv:1706.03825). The
    sign is kept: where the gradient is positive, a higher level raises the logit; where it is negative, a lower one.

    Args:
        image: float32 (1, C, H, W), normalised.
        target: position of the class.
        samples: number of noisy copies. Their noise is the same in every call. They are evaluated one at a time,
            because a network may normalise by the batch.
        noise: standard deviation of the noise, as a fraction of the image's range.

    Returns:
        float32 (1, C, H, W).
    """
    generator = torch.Generator().manual_seed(0)
    deviation, total = noise * (image.max() - image.min()), torch.zeros_like(image)
    for _ in range(samples):
        copy = (image + deviation * torch.randn(image.shape, generator=generator)).requires_grad_()
        total += torch.autograd.grad(model(copy)[0, target], copy)[0]
    return total / samples


def explain(run: Run, picture: Tensor, path: Path, layers: list[str] | None = None, title: str = "") -> Path:
    """Writes the PNG for a picture.

    Args:
        picture: uint8 (C, H, W).
        path: of the PNG; missing folders are created.
        layers: names of the layers to draw; None for up to `MOST_LAYERS` convolutions.
        title: heading of the PNG; the model's name if empty.

    Returns:
        `path`.

    Raises:
        ValueError: see `get_feature_maps`.
        OSError: the PNG cannot be written.
    """
    from mnist_dist.plots.explanation import plot_explanation  # loads matplotlib

    [found] = predict(run, picture[None])
    image = normalize(picture[None], run.about["mean"], run.about["std"])
    maps, target = get_feature_maps(run.model, image, layers), run.about["classes"].index(found["class"])
    names = list(maps)
    if layers is None and len(names) > MOST_LAYERS:
        names = [names[round(each * (len(names) - 1) / (MOST_LAYERS - 1))] for each in range(MOST_LAYERS)]
    return plot_explanation(
        picture,
        smooth_gradient(run.model, image, target)[0],
        [(each["class"], each["confidence"]) for each in found["top3"]],
        {name: maps[name][0] for name in names},
        path,
        title=title or run.about["model"],
        ground=run.geometry.ground,
    )


def _new_path(folder: Path, stem: str) -> Path:
    """Returns a path that no file has: pictures in several folders may have the same name."""
    paths = (folder / f"explain_{stem}{f'-{number}' * (number > 1)}.png" for number in itertools.count(1))
    return next(path for path in paths if not os.path.lexists(path))


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns exit code 0. Exit code 2 means: no such run, weights, picture or layers."""
    arguments = parse("explain", argv)
    output = arguments.output or _new_path(Path(arguments.run, "plots"), arguments.picture.stem)
    run = open_run(arguments.run, arguments.weights, arguments.allow_code)
    if arguments.output is None:
        run.folder.refuse_output(output)
    try:
        picture = prepare_picture(arguments.picture, run.geometry)
    except ValueError as error:
        kind: Kind = "damaged" if arguments.picture.is_file() else "missing"
        raise RecipeError([Problem("command line", printable(arguments.picture), str(error), kind)]) from error
    title = f"{run.about['model']} on {printable(Path(arguments.picture.name))}"
    if picture.doubts:
        title += f" (unsure: {', '.join(picture.doubts)})"
    try:
        print(printable(explain(run, picture.image, output, arguments.layers, title)))
    except ValueError as error:
        known = {name for name, _ in run.model.named_modules()}
        kind = "model" if known.issuperset(arguments.layers or ()) else "unknown"
        raise RecipeError([Problem("command line", "--layers", str(error), kind)]) from error
    except OSError as error:
        message = f"{printable(output)} cannot be written: {error.strerror}"
        raise RecipeError([Problem("command line", "--output", message, "unwritable")]) from error
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
