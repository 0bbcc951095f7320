"""Rebuilds the network that a weights file describes, without running code that the user has not allowed."""

from __future__ import annotations

import itertools
import json
import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.overrides import TorchFunctionMode

from mnist_dist.errors import CONTROLS
from mnist_dist.models.registry import build_model, find_builder

LARGEST_NUMBER = 1_000_000
LONGEST_TEXT = 1_000
MOST_VALUES = 1_000
DEEPEST_NESTING = 8
MOST_CHANNELS = 64
LARGEST_SIDE = 4096
"""Limits of a network's keywords in a weights file. Real networks need a small fraction of each."""

BUILD_SECONDS = 120.0
"""Time limit for building a network. A network of this package, torchvision or timm takes about a second."""

FILE_KEYWORDS = ("checkpoint_path", "cache_dir", "feature_cfg", "model_cfg")
"""Keywords with which timm reads files, which may be pickles, or looks up classes. So do the keywords `pretrained…`."""


class CodeRefused(ValueError):
    """Raised if a file names Python code that the person who runs the command has not allowed."""


class TooLarge(ValueError):
    """Raised if the network that a file describes is larger than the file, or takes too long to build."""


def is_code(name: Any) -> bool:
    """Returns whether a model name is a dotted path, `package.module:Name`, and not a name of the registry."""
    return isinstance(name, str) and ":" in name


def refuse_code(name: str, allowed: Sequence[str], what: str = "network") -> None:
    """Checks that a dotted path is allowed; accepts every other model name.

    Args:
        allowed: modules, which include the modules below them, or whole dotted paths `package.module:Name`.
        what: what the path names, for the message.

    Raises:
        CodeRefused: the path is not allowed. Nothing was imported.
    """
    module = name.partition(":")[0]
    if is_code(name) and not any(each in (name, module) or module.startswith(f"{each}.") for each in allowed if each):
        raise CodeRefused(
            f"the {what} {name[:LONGEST_TEXT]!r} is Python code, which is not imported without your permission\n"
            f"if you trust this module and the run: --allow-code {module[:LONGEST_TEXT]}"
            f" (from Python: allow_code=({module[:LONGEST_TEXT]!r},))"
        )


def check_description(about: Mapping[str, Any]) -> None:
    """Checks types and sizes of the values from which a network is rebuilt.

    Args:
        about: the description in a weights file: `model`, `keywords`, `classes`, `shape`, `mean`, `std`.

    Raises:
        ValueError: a value is missing, of the wrong type or too large; the message names its key.
    """

    def require(holds: bool, key: str, expected: str) -> None:
        if not holds:
            raise ValueError(f"the description of the network is damaged: {key!r} is not {expected}")

    name, keywords, classes = about.get("model"), about.get("keywords"), about.get("classes")
    require(isinstance(name, str) and _is_text(name), "model", "a model's name")
    require(isinstance(classes, list) and 0 < len(classes) <= MOST_VALUES, "classes", "a list of up to 1,000 names")
    require(all(map(_is_text, classes or [])), "classes", "a list of printable names")
    require(len(set(classes or [])) == len(classes or []), "classes", "a list of different names")
    for key in ("mean", "std"):
        values: list[Any] = about[key] if isinstance(about.get(key), list) else [about.get(key)]
        finite = all(type(each) in (int, float) and abs(each) < LARGEST_NUMBER for each in values)
        require(finite and 0 < len(values) <= MOST_VALUES, key, "a finite number or a list of finite numbers")
    shape = about.get("shape", [1, 28, 28])
    whole = isinstance(shape, list) and len(shape) == 3 and all(type(each) is int and each > 0 for each in shape)
    require(whole and shape[0] <= MOST_CHANNELS and max(shape) <= LARGEST_SIDE, "shape", "channels, height and width")
    numbers = {len(about[key]) if isinstance(about[key], list) else 1 for key in ("mean", "std")}
    require(numbers <= {1, shape[0]}, "mean", f"one number or {shape[0]}, one for each channel")
    require(isinstance(keywords, dict), "keywords", "a section of keywords")
    require(len(json.dumps(keywords)) <= MOST_VALUES * 20, "keywords", "short")
    _check_values("keywords", keywords)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= LONGEST_TEXT and not CONTROLS.search(value)


def _check_values(key: str, value: Any, depth: int = 0) -> None:
    if depth > DEEPEST_NESTING:
        raise ValueError(f"{key} in the description of the network is nested too deeply")
    if isinstance(value, dict | list):
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        for name, each in inner:
            _check_values(f"{key}.{name}"[:LONGEST_TEXT], each, depth + 1)
    elif isinstance(value, int | float) and not abs(value) <= LARGEST_NUMBER:
        raise TooLarge(f"{key} in the description of the network is larger than {LARGEST_NUMBER:,}")
    elif isinstance(value, str) and len(value) > LONGEST_TEXT:
        raise TooLarge(f"{key} in the description of the network is longer than {LONGEST_TEXT:,} letters")


def rebuild_model(about: Mapping[str, Any], tensors: Mapping[str, Tensor], allowed: Sequence[str] = ()) -> nn.Module:
    """Builds the network that a weights file describes, with the tensors of the file.

    A network of the registry is first built without memory for its tensors. It is built with memory only if its tensors
    are exactly those of the file. A user's own network, whose construction may have side effects, is built once.

    Args:
        about: the description in the file, checked by `check_description`.
        tensors: the content of the file, by name.
        allowed: see `refuse_code`.

    Raises:
        CodeRefused: the network is code that is not allowed. Nothing was imported.
        ValueError: the description does not fit the tensors, or names a network that does not exist.
    """
    name, keywords = about["model"], dict(about["keywords"])
    channels, *sides = about.get("shape", [1, 28, 28])
    described: dict[str, Any] = {"num_classes": len(about["classes"]), "in_channels": channels, "image_size": (*sides,)}
    refuse_code(name, allowed)
    if not is_code(name):
        find_builder(name)  # imports torchvision or timm, which takes seconds, outside the time limit
        keywords.pop("pretrained", None)  # the weights are in the file
        if given := [key for key in keywords if key in FILE_KEYWORDS or key.startswith("pretrained")]:
            raise ValueError(f"{given[0]!r} makes {name} read files: not allowed in the description of a network")
        with torch.random.fork_rng(devices=[]):
            _compare(name, described | keywords, tensors)
        with _limits(tensors):
            module = build_model(name, **described, **keywords)
    else:
        module = build_model(name, **described, **keywords)
    module.load_state_dict(dict(tensors))
    return module


def _compare(name: str, keywords: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Builds the network without memory for its tensors, and compares their names and shapes with the file's."""
    try:
        with _limits(tensors), torch.device("meta"):
            module = build_model(name, **keywords)
    except TooLarge:
        raise
    except Exception as error:
        if "meta " in str(error):  # it reads the values of weights, which do not exist here; only `_limits` protects
            return
        raise
    own = {key: value.shape for key, value in module.state_dict().items()}
    given = {key: value.shape for key, value in tensors.items()}
    if own != given:
        differing = sorted(key for key in own.keys() | given.keys() if own.get(key) != given.get(key))
        more = f" and {len(differing) - 6} more" if len(differing) > 6 else ""
        raise ValueError(f"the network has other tensors than the file: {', '.join(differing[:6])}{more}")


@contextmanager
def _limits(tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Limits size and time in its context: a network must not become much larger than the tensors of its file.

    A network may register a tensor and replace it later, so four times the size of the file is allowed.

    Raises:
        TooLarge: a limit is exceeded.
    """
    elements = 4 * sum(value.numel() for value in tensors.values()) + 2**24
    parts = 20 * len(tensors) + 10_000
    owner, end, counts = threading.get_ident(), time.monotonic() + BUILD_SECONDS, {"elements": 0, "parts": 0}

    def count(module: nn.Module, name: str, part: Any) -> None:
        if threading.get_ident() != owner:
            return
        counts["parts"] += 1
        if isinstance(part, Tensor):
            counts["elements"] += math.prod(part.shape)
        if counts["elements"] > elements or counts["parts"] > parts:
            raise TooLarge("the description makes a network that is larger than the tensors of the file")
        if time.monotonic() > end:
            raise TooLarge("building the network takes too long")

    registrations = (
        hooks.register_module_parameter_registration_hook,
        hooks.register_module_buffer_registration_hook,
        hooks.register_module_module_registration_hook,
    )
    handles = [register(count) for register in registrations]
    try:
        with _Deadline(end):
            yield
    finally:
        for handle in handles:
            handle.remove()


class _Deadline(TorchFunctionMode):
    """Raises TooLarge at a call of PyTorch after `end`, a time of `time.monotonic`. It checks every 100th call."""

    def __init__(self, end: float):
        super().__init__()
        self._end, self._calls = end, itertools.count()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if next(self._calls) % 100 == 0 and time.monotonic() > self._end:
            raise TooLarge("building the network takes too long")
        return func(*args, **(kwargs or {}))
