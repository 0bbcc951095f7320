"""The values of the HTML page: table, curves, differing recipe keys, pictures.

The page is one file without external resources. Its layout and script are in compare.html; this module puts the values
into it as JSON.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import takewhile
from pathlib import Path
from typing import Any

from PIL import Image

from mnist_dist.plots import style
from mnist_dist.run.folder import RunFolder
from mnist_dist.run.reader import LARGEST

COLOURS = (style.BLUE, style.VERMILLION, style.GREEN, style.PURPLE, style.ORANGE, style.SKY)
DASHES = ("", "7 3", "2 3", "9 3 2 3", "14 4")
"""Dash patterns of SVG lines. Six colours and five patterns have no common divisor, so 30 families look different."""

CURVES = (
    "train/loss", "eval/loss", "train/accuracy", "eval/accuracy", "train/lr",
    "train/images_per_second", "train/waiting_percent",
)  # fmt: skip
POINTS = 300
"""Maximum number of points of a curve. Each point of a longer curve is the mean of several lines."""

PICTURES = {"confusion_matrix.png": "Confusion matrix", "misclassified.png": "Most confident mistakes"}
PICTURE_WIDTH = 900
MOST_PIXELS = 50_000_000
"""A picture with more pixels is left out: a small file can claim very many."""


@dataclass(frozen=True)
class PageRun:
    """What the page shows of one run."""

    name: str
    label: str
    """The name of its family: the recipe, and the keys in which it differs from other runs of that recipe."""
    family: Hashable
    """Equal for runs that differ only in the seed; they share a colour."""
    recipe: Mapping[str, Any]
    """Dotted keys and values, without the seed."""
    seed: Any
    status: str
    accuracy: float | None
    """Of the last evaluation, in percent; None for an unfinished run. The best run of a family gives its pictures."""
    lines: Sequence[Mapping[str, Any]]
    """The lines of metrics.jsonl."""
    changes: int
    """A number that changes whenever `lines` change."""
    plots: Path
    """The folder of the run's pictures."""
    world: Sequence[Mapping[str, Any]] = ()
    """The starts of the run's processes; see `mnist_dist.run.world_history`."""
    watch: Mapping[str, Any] | None = None
    """What a live page shows in detail; see `mnist_dist.compare.watch`."""


class Page:
    """Builds the values of a page. A live page builds them repeatedly; each family keeps its colour.

    Args:
        picture_url: returns the URL of a PNG in a run folder, or an empty text if the PNG cannot be shown.
    """

    def __init__(self, picture_url: Callable[[Path], str]):
        self._picture_url = picture_url
        self._families: dict[Hashable, int] = {}
        self._curves: dict[str, tuple[int, dict[str, Any]]] = {}

    def data(self, runs: Sequence[PageRun], tables: Mapping[str, Any]) -> dict[str, Any]:
        """Returns all values that the page's script reads, as types of JSON.

        Args:
            tables: `groups` (a row per recipe) and `single` (a row per run). A row has `runs`, their names, and
                `cells`, text and sort key of each column.
        """
        families: dict[Hashable, list[PageRun]] = {}
        for run in runs:
            families.setdefault(run.family, []).append(run)
            self._families.setdefault(run.family, len(self._families))
            if self._curves.get(run.name, (-1,))[0] != run.changes:
                self._curves[run.name] = run.changes, curves(run.lines)
        keys = differing_keys([members[0].recipe for members in families.values()])
        folders = zip(*(run.name.split("/")[:-1] for run in runs), strict=False)
        shared = takewhile(lambda parts: len(set(parts)) == 1, folders)
        return {
            "shared": "".join(f"{parts[0]}/" for parts in shared),  # the page omits the folders that all runs share
            "tables": tables,
            "keys": keys,
            "families": {self._families[key]: self._family(key, members, keys) for key, members in families.items()},
            "runs": {
                run.name: {
                    "family": self._families[run.family],
                    "seed": None if run.seed is None else str(run.seed),
                    "status": run.status,
                    "world": list(run.world) if len(run.world) > 1 and not run.watch else [],
                    "watch": run.watch,
                    "curves": self._curves[run.name][1],
                }
                for run in runs
            },
        }

    def _family(self, key: Hashable, members: list[PageRun], keys: list[str]) -> dict[str, Any]:
        """Returns the page's values of runs that differ only in the seed."""
        number, recipe = self._families[key], members[0].recipe
        pictures: list[tuple[str, str]] = []
        finished = [run for run in members if run.accuracy is not None]
        best = max(finished, key=lambda run: run.accuracy or 0.0, default=None)
        if best:
            folder = RunFolder(best.plots.parent)
            paths = {title: best.plots / name for name, title in PICTURES.items()}
            urls = [(title, "" if folder.leaves(path) else self._picture_url(path)) for title, path in paths.items()]
            pictures = [(title, url) for title, url in urls if url]
        return {
            "label": members[0].label,
            "colour": COLOURS[number % len(COLOURS)],
            "dash": DASHES[number % len(DASHES)],
            "values": [as_written(recipe[key]) if key in recipe else "" for key in keys],
            "pictures": pictures,
            "of": best.name if best else "",
        }


def differing_keys(recipes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the keys whose values differ between the recipes, without `name`; ignores unreadable (empty) recipes."""
    recipes = [recipe for recipe in recipes if recipe]
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    return [key for key in keys if key != "name" and len({repr(recipe.get(key)) for recipe in recipes}) > 1]


def as_written(value: Any) -> str:
    """Returns a value as it is written in a recipe."""
    return value if isinstance(value, str) else json.dumps(value)


def curves(lines: Sequence[Mapping[str, Any]]) -> dict[str, tuple[list[float], list[float | None]]]:
    """Returns the epochs and the values of each of `CURVES` that the lines hold. A value that is not finite is None."""
    found = {}
    for name in CURVES:
        pairs = [(line.get("epoch"), line[name]) for line in lines if name in line]
        numbers = [(x, y) for x, y in pairs if isinstance(x, int | float) and isinstance(y, int | float)]
        # JSON can hold whole numbers that no float can hold, and floats whose sum is none.
        points = [(x, y if y != y or abs(y) < LARGEST else math.inf) for x, y in numbers if abs(x) < LARGEST]
        size = math.ceil(len(points) / POINTS) or 1
        pieces = [points[start : start + size] for start in range(0, len(points), size)]
        means = [math.fsum(y for _, y in piece) / len(piece) for piece in pieces]
        if points:
            epochs = [_short(piece[-1][0]) for piece in pieces]
            found[name] = epochs, [_short(mean) if math.isfinite(mean) else None for mean in means]
    return found


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def embedded(path: Path) -> str:
    """Returns a PNG as a data URL, scaled down; an empty text if the file is missing, damaged or too large."""
    with suppress(Exception), Image.open(path, formats=["PNG"]) as image:  # Pillow's exceptions are of many types
        if image.width * image.height > MOST_PIXELS:
            return ""
        smaller = image.convert("RGB")
        smaller.thumbnail((PICTURE_WIDTH, 4 * PICTURE_WIDTH))
        file = io.BytesIO()
        smaller.save(file, "WEBP", quality=80)
        return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
    return ""


def render(data: Mapping[str, Any], *, live: bool = False) -> str:
    """Returns the HTML of the page. A live page asks its server for newer values."""
    template = Path(__file__).with_name("compare.html").read_text(encoding="utf-8")
    written = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    text = to_json({**data, "live": live, "written": written})
    before, _, after = template.partition("{{data}}")
    return before + text.replace("<", "\\u003c") + after  # a run's name may contain </script>


def to_json(data: Mapping[str, Any]) -> str:
    """Returns ASCII JSON.

    Raises:
        ValueError: a number is NaN or infinite; the JSON standard has no text for it.
    """
    return json.dumps(data, allow_nan=False, separators=(",", ":"))
