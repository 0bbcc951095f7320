"""Why a network says what it says of a picture, as one PNG: `python -m mnist_dist.explain runs/mine photo.jpg`.

It shows the picture as the network sees it, the three likeliest classes, where more ink and where less would speak for
the likeliest, and what chosen layers make of the picture.
"""

from __future__ import annotations

from mnist_dist.cli import answer_early, parse, run_command

if __name__ == "__main__":
    answer_early("explain")  # before the imports below load torch

import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from mnist_dist.data.augment import normalize
from mnist_dist.data.pictures import read_picture
from mnist_dist.engine.evaluation import evaluating
from mnist_dist.errors import Problem, RecipeError, did_you_mean
from mnist_dist.run.prediction import predict
from mnist_dist.run.reader import Run, open_run
from mnist_dist.run.tables import printable

MOST_LAYERS = 6
"""Without --layers: so many convolutions, spread evenly from the first to the last."""

CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)


def get_feature_maps(model: nn.Module, images: Tensor, layers: Iterable[str] | None = None) -> dict[str, Tensor]:
    """What layers of any network give for images, in evaluation mode.

    Args:
        images: as the network takes them: float (N, 1, 28, 28), normalised, on its device.
        layers: names as in `model.named_modules()`; None for every convolution.

    Returns:
        For each layer, in the order given, float32 (N, C, H, W), detached; the output of a linear layer as
        (N, C, 1, 1). Of a layer that is used more than once: what it gave last.

    Raises:
        ValueError: there is no such layer (the message names the nearest), no convolution, or a layer takes no part
            or gives no maps.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    if layers is None:
        layers = [name for name, module in modules.items() if isinstance(module, CONVOLUTIONS)]
        if not layers:
            raise ValueError(
                f"{type(model).__name__} has no convolution; name layers, e.g. {', '.join([*modules][:3])}"
            )
    names = [layers] if isinstance(layers, str) else list(layers)
    if unknown := [name for name in names if name not in modules]:
        hint = did_you_mean(unknown[0], modules) or f"; the first ones are {', '.join([*modules][:6])}"
        raise ValueError(f"{type(model).__name__} has no layer {unknown[0]!r}{hint}")
    maps: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, inputs: object, output: object) -> None:
        if not isinstance(output, Tensor) or output.dim() not in (2, 4):
            found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"layer {name!r} gives {found}; expected (N, C, H, W) or (N, C)")
        # A copy: the next layer may work in place.
        maps[name] = output.detach().to(torch.float32, copy=True).reshape(*output.shape, *(1,) * (4 - output.dim()))

    hooks = [modules[name].register_forward_hook(partial(keep, name)) for name in names]
    try:
        with torch.no_grad(), evaluating(model):
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    if unused := [name for name in names if name not in maps]:
        raise ValueError(f"layer {unused[0]!r} takes no part when {type(model).__name__} is called")
    return {name: maps[name] for name in names}


def smooth_gradient(model: nn.Module, image: Tensor, target: int, samples: int = 50, noise: float = 0.15) -> Tensor:
    """How the logit of a class would change with each pixel, as the mean gradient over noisy copies of the image.

    Smilkov, Thorat, Kim, Viégas, Wattenberg, "SmoothGrad: removing noise by adding noise", 2017 (arXiv:1706.03825).
    The sign is kept: above zero more ink speaks for the class, below zero less ink.

    Args:
        image: float32 (1, 1, H, W), normalised.
        target: position of the class.
        samples: copies, always the same; one by one, for a network may normalise by the batch.
        noise: its standard deviation, as a fraction of the image's range.

    Returns:
        float32 (1, 1, H, W).
    """
    generator = torch.Generator().manual_seed(0)
    deviation, total = noise * (image.max() - image.min()), torch.zeros_like(image)
    for _ in range(samples):
        copy = (image + deviation * torch.randn(image.shape, generator=generator)).requires_grad_()
        total += torch.autograd.grad(model(copy)[0, target], copy)[0]
    return total / samples


def explain(run: Run, picture: Tensor, path: Path, layers: list[str] | None = None, title: str = "") -> Path:
    """Writes the PNG for `picture`, uint8 (1, 28, 28); returns its path.

    Raises:
        ValueError: as `get_feature_maps`.
    """
    from mnist_dist.plots.explanation import plot_explanation

    [found] = predict(run, picture[None])
    image = normalize(picture[None], run.about["mean"], run.about["std"])
    maps, target = get_feature_maps(run.model, image, layers), run.about["classes"].index(found["digit"])
    names = list(maps)
    if layers is None and len(names) > MOST_LAYERS:
        names = [names[round(place * (len(names) - 1) / (MOST_LAYERS - 1))] for place in range(MOST_LAYERS)]
    return plot_explanation(
        picture[0],
        smooth_gradient(run.model, image, target)[0, 0],
        [(each["digit"], each["confidence"]) for each in found["top3"]],
        {name: maps[name][0] for name in names},
        path,
        title=title or run.about["model"],
    )


def main(argv: list[str] | None = None) -> int:
    """The door: exit code 0, or 2 without a network, a picture or such layers."""
    arguments = parse("explain", argv)
    output = arguments.output or Path(arguments.run, "plots", f"explain_{arguments.picture.stem}.png")

    def refuse(where: object, error: Exception) -> RecipeError:
        return RecipeError([Problem(str(where), "", str(error))])

    run = open_run(arguments.run, arguments.weights)
    try:
        picture = read_picture(arguments.picture)
    except ValueError as error:
        raise refuse(arguments.picture, error) from error
    title = f"{run.about['model']} on {printable(Path(arguments.picture.name))}"
    try:
        print(printable(explain(run, picture, output, arguments.layers, title)))
    except ValueError as error:
        raise refuse("command line: --layers", error) from error
    except OSError as error:
        raise refuse(f"command line: --output {output}", error) from error
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
