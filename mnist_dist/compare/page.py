"""Runs -> one HTML page that needs nothing else: table, curves, what the recipes differ in, pictures.

The page itself is compare.html beside this file; here its values are put together, as JSON inside it.
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

COLOURS = (style.BLUE, style.VERMILLION, style.GREEN, style.PURPLE, style.ORANGE, style.SKY)
DASHES = ("", "7 3", "2 3", "9 3 2 3", "14 4")
"""As many as have no common divisor with the colours: thirty looks until one comes again."""

CURVES = ("train/loss", "eval/loss", "train/accuracy", "eval/accuracy", "train/lr", "train/images_per_second")
POINTS = 300
"""Of a curve, at most; of a longer one each is the mean of as many lines as that takes."""

PICTURES = {"confusion_matrix.png": "Confusion matrix", "misclassified.png": "Worst images"}
PICTURE_WIDTH = 900


@dataclass(frozen=True)
class PageRun:
    """What the page shows of one run."""

    name: str
    label: str
    """What its family is called: the recipe, and the keys that set it apart."""
    family: Hashable
    """Equal for runs that share a colour: they differ only in the seed."""
    recipe: Mapping[str, Any]
    """Dotted keys and values, without the seed."""
    seed: Any
    status: str
    accuracy: float | None
    """Percent, of the last evaluation; the family's pictures are of the run where it is highest. None: not finished."""
    lines: Sequence[Mapping[str, Any]]
    """Of metrics.jsonl."""
    changes: int
    """Another number whenever the lines are others."""
    plots: Path


class Page:
    """Puts a page's values together, again and again for a live one: a family keeps its colour.

    Args:
        picture_url: the address of a PNG of a run folder; empty where it cannot be shown.
    """

    def __init__(self, picture_url: Callable[[Path], str]):
        self._picture_url = picture_url
        self._families: dict[Hashable, int] = {}
        self._curves: dict[str, tuple[int, dict[str, Any]]] = {}

    def data(self, runs: Sequence[PageRun], tables: Mapping[str, Any]) -> dict[str, Any]:
        """Everything that the page's script reads, as JSON can hold it.

        Args:
            tables: `columns`: names; `groups` and `single`: rows, each with `runs` (names) and `cells` (for each
                column its text and what to sort it by).
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
            "shared": "".join(
                f"{parts[0]}/" for parts in shared
            ),  # the folders that all lie in, and that need not be named
            "tables": tables,
            "keys": keys,
            "families": {self._families[key]: self._family(key, members, keys) for key, members in families.items()},
            "runs": {
                run.name: {
                    "family": self._families[run.family],
                    "seed": None if run.seed is None else str(run.seed),
                    "status": run.status,
                    "curves": self._curves[run.name][1],
                }
                for run in runs
            },
        }

    def _family(self, key: Hashable, members: list[PageRun], keys: list[str]) -> dict[str, Any]:
        place, recipe = self._families[key], members[0].recipe
        pictures: list[tuple[str, str]] = []
        finished = [run for run in members if run.accuracy is not None]
        best = max(finished, key=lambda run: run.accuracy or 0.0, default=None)
        if best:
            urls = [(title, self._picture_url(best.plots / name)) for name, title in PICTURES.items()]
            pictures = [(title, url) for title, url in urls if url]
        return {
            "label": members[0].label,
            "colour": COLOURS[place % len(COLOURS)],
            "dash": DASHES[place % len(DASHES)],
            "values": [say(recipe[key]) if key in recipe else "" for key in keys],
            "pictures": pictures,
            "of": best.name if best else "",
        }


def differing_keys(recipes: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys that not all recipes give the same value, in their order; the name and unreadable recipes aside."""
    recipes = [recipe for recipe in recipes if recipe]
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    return [key for key in keys if key != "name" and len({repr(recipe.get(key)) for recipe in recipes}) > 1]


def say(value: Any) -> str:
    """A recipe's value as one would write it."""
    return value if isinstance(value, str) else json.dumps(value)


def curves(lines: Sequence[Mapping[str, Any]]) -> dict[str, tuple[list[float], list[float | None]]]:
    """For each of `CURVES` that the lines hold: epochs, and values, None where one is not finite."""
    found = {}
    for name in CURVES:
        pairs = [(line.get("epoch"), line[name]) for line in lines if name in line]
        numbers = [(x, y) for x, y in pairs if isinstance(x, int | float) and isinstance(y, int | float)]
        points = [(x, y) for x, y in numbers if math.isfinite(x)]
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
    """A PNG as a data URL, made smaller; empty where there is none, or half of one."""
    with suppress(OSError, ValueError, SyntaxError), Image.open(path) as image:
        smaller = image.convert("RGB")
        smaller.thumbnail((PICTURE_WIDTH, 4 * PICTURE_WIDTH))
        file = io.BytesIO()
        smaller.save(file, "WEBP", quality=80)
        return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
    return ""


def render(data: Mapping[str, Any], *, live: bool = False) -> str:
    """The page; a live one asks where it came from for newer values."""
    template = Path(__file__).with_name("compare.html").read_text(encoding="utf-8")
    written = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    text = to_json({**data, "live": live, "written": written})
    before, _, after = template.partition("{{data}}")
    return before + text.replace("<", "\\u003c") + after  # no name of a run ends the script


def to_json(data: Mapping[str, Any]) -> str:
    """JSON in ASCII, without NaN, which is no JSON."""
    return json.dumps(data, allow_nan=False, separators=(",", ":"))
