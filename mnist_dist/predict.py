"""Pictures -> digits: `python -m mnist_dist.predict runs/mine photo.jpg folder/`.

A picture of any size, colour or transparency, dark on light or light on dark, is brought into the shape in which MNIST
was made (LeCun et al., "Gradient-based learning applied to document recognition", 1998): the ink scaled into 20×20
pixels, its centre of mass in the middle of 28×28.
"""

from __future__ import annotations

from mnist_dist.cli import FAILED, answer_early, parse, run_command

if __name__ == "__main__":
    answer_early("predict")  # before the imports below load torch

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from rich.console import Console
from torch import Tensor

from mnist_dist.data.augment import normalize
from mnist_dist.run.folder import Run, load_run, open_run
from mnist_dist.run.reader import find_runs
from mnist_dist.run.tables import printable

SIDE, INK_SIDE = 28, 20
FAINT = 0.2
"""Of the darkest ink: what is weaker is paper, shadow or noise, and no part of the figure's extent."""
LARGEST = 100_000_000
"""Pixels of a picture that is still opened."""


def read_picture(path: str | Path) -> Tensor:
    """A picture file as MNIST would have it: uint8 (1, 28, 28), ink bright on dark.

    Raises:
        ValueError: no picture, a damaged, a blank or a huge one; the message says which.
    """
    try:
        with Image.open(path) as file:
            if file.width * file.height > LARGEST:
                raise ValueError(f"{file.width:,}×{file.height:,} are too many pixels; at most {LARGEST:,}")
            picture = ImageOps.exif_transpose(file)
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise ValueError(error.strerror) from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"too many pixels; at most {LARGEST:,}") from error
    except ValueError:
        raise
    except Exception as error:  # Pillow raises a kind of its own for every sort of damage
        raise ValueError("not a picture, or a damaged one") from error
    return _as_mnist(_ink(picture))


def _ink(picture: Image.Image) -> np.ndarray:
    """float32 (height, width): how far each pixel is from the background, which is what most of the border shows."""
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        pixels = np.asarray(picture, dtype=np.float32)
        opacity = pixels[..., 3]
        if opacity.min() < 255:
            # Ink on nothing: put it on white if it is dark, on black if it is light.
            grey = np.asarray(picture.convert("RGB").convert("L"), dtype=np.float32)
            dark = (grey * opacity).sum() < 127.5 * opacity.sum()
            under = Image.new("RGBA", picture.size, "white" if dark else "black")
            picture = Image.alpha_composite(under, picture)
    if picture.mode.startswith("I"):  # 16 bits a pixel: Pillow would cut them off at 255
        grey = np.asarray(picture).astype(np.float32) / np.float32(257)
    else:
        grey = np.asarray(picture.convert("RGB").convert("L"), dtype=np.float32)
    border = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    background = float(np.median(border))
    # Ink is on one side of the background; what is beyond the other is glare or shadow.
    darker, lighter = np.clip(background - grey, 0, None), np.clip(grey - background, 0, None)
    return darker if darker.sum() > lighter.sum() else lighter


def _as_mnist(ink: np.ndarray) -> Tensor:
    strongest = float(ink.max())
    if strongest < 16:  # grey levels: less contrast than paper has with itself
        raise ValueError("no figure in it: the picture is blank")
    ink = np.clip(ink / strongest, 0, 1)
    rows, columns = np.nonzero(ink.max(axis=1) > FAINT)[0], np.nonzero(ink.max(axis=0) > FAINT)[0]
    figure = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = INK_SIDE / max(figure.shape)
    size = (max(1, round(figure.shape[1] * scale)), max(1, round(figure.shape[0] * scale)))
    small = Image.fromarray((255 * figure).astype(np.uint8)).resize(size, Image.Resampling.LANCZOS)
    values = np.asarray(small, dtype=np.float64)
    if not values.any():
        raise ValueError("no figure in it: only specks")
    weights = values / values.sum()
    centre = [(weights.sum(axis=1 - axis) * np.arange(values.shape[axis])).sum() for axis in (0, 1)]
    canvas = np.zeros((SIDE, SIDE), dtype=np.uint8)
    top, left = (int(np.clip(round((SIDE - 1) / 2 - centre[axis]), 0, SIDE - values.shape[axis])) for axis in (0, 1))
    canvas[top : top + values.shape[0], left : left + values.shape[1]] = values
    return torch.from_numpy(canvas)[None]


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


def predict_digit(path: str | Path, run: str | Path | None = None) -> tuple[str, float]:
    """The digit (or letter, or garment) in a picture file, and how sure the network is (0 to 1).

    Args:
        run: a run folder; None for the newest finished one in ./runs.

    Raises:
        FileNotFoundError: no run folder there. ValueError: no picture that can be read.
    """
    [found] = predict(load_run(_newest_run() if run is None else run, "last"), read_picture(path)[None])
    return found["digit"], found["confidence"]


def _newest_run() -> Path:
    runs = [run for run in find_runs(Path("runs")) if (run / "summary.json").is_file()]
    if not runs:
        raise FileNotFoundError("there is no finished run in ./runs; name a run folder")
    return max(runs, key=lambda run: (run / "summary.json").stat().st_mtime)


def main(argv: list[str] | None = None) -> int:
    """The door: exit code 0, 1 if any picture could not be read, 2 without a network or a picture."""
    arguments = parse("predict", argv)
    run = open_run(arguments.run, arguments.weights)
    paths = [path for given in arguments.pictures for path in _files(given)]
    found, failed = [], len(paths) == 0
    for path in paths:
        try:
            [each] = predict(run, read_picture(path)[None])
            found.append({"path": printable(path), **each})
        except ValueError as error:
            failed = True
            print(f"mnist_dist: {printable(path)}: {error}", file=sys.stderr)
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        console = Console(soft_wrap=True, highlight=False, markup=False)
        for each in found:
            others = ", ".join(f"{other['digit']} {100 * other['confidence']:.1f} %" for other in each["top3"][1:])
            console.print(f"{each['path']}: {each['digit']}  {100 * each['confidence']:.1f} %  (then {others})")
    return FAILED if failed else 0


def _files(path: Path) -> list[Path]:
    """The file itself, or a folder's files but for hidden ones, in order."""
    if not path.is_dir():
        return [path]
    files = sorted(each for each in path.rglob("*") if each.is_file() and not each.name.startswith("."))
    if not files:
        print(f"mnist_dist: {path}: no file in it", file=sys.stderr)
    return files


if __name__ == "__main__":
    sys.exit(run_command(main))
