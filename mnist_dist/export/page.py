"""Builds an HTML page to draw in. It contains the network and onnxruntime-web, so it needs no server and no network."""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import io
import json
import os
import re
import sys
import tarfile
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict
from http.client import HTTPException
from pathlib import Path

from mnist_dist.data.geometry import Geometry

VERSION = "1.30.0"
ARCHIVE = f"onnxruntime-web-{VERSION}.tgz"
URL = f"https://registry.npmjs.org/onnxruntime-web/-/{ARCHIVE}"
SHA512 = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
"""Base64, as in the registry and in npm's lock files."""
FILES = {"script": "ort.wasm.bundle.min.mjs", "wasm": "ort-wasm-simd-threaded.wasm"}
"""Placeholder in draw.html -> file in the archive."""


def load_runtime(archive: Path | None = None) -> dict[str, bytes]:
    """Returns the files of onnxruntime-web that the page contains, by their names in `FILES`.

    Args:
        archive: npm's archive of the package; None for the archive in the cache folder, which is downloaded once.

    Raises:
        ValueError: the file is not the archive of `VERSION`, byte for byte.
        OSError: the archive cannot be read, downloaded or cached.
    """
    if archive is not None:
        return _unpack(_checked(archive.read_bytes(), str(archive)))
    cache = cached_archive()
    try:
        return _unpack(_checked(cache.read_bytes(), str(cache)))
    except (FileNotFoundError, ValueError):
        print(f"mnist_dist: downloading {URL} (33 MB) into {cache.parent}", file=sys.stderr)
    try:
        with urllib.request.urlopen(URL, timeout=60) as response:
            data = _checked(response.read(), URL)
    except (OSError, HTTPException) as error:
        hint = f"download it on another machine and pass it as --onnxruntime-web {ARCHIVE}"
        raise OSError(f"{URL}: {error}\n{hint}") from error
    cache.parent.mkdir(parents=True, exist_ok=True)
    staged = cache.with_name(f"{cache.name}.{os.getpid()}")  # several exports may fill the cache at the same time
    staged.write_bytes(data)
    staged.replace(cache)
    return _unpack(data)


def cached_archive() -> Path:
    """Returns the path of the downloaded archive, in $XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mnist_dist" / ARCHIVE


def _checked(data: bytes, source: str) -> bytes:
    if base64.b64encode(hashlib.sha512(data).digest()).decode() != SHA512:
        raise ValueError(f"{source} is not the published {ARCHIVE}: its SHA-512 differs")
    return data


def _unpack(data: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        found = {name: archive.extractfile(f"package/dist/{file}") for name, file in FILES.items()}
        return {name: file.read() for name, file in found.items() if file is not None}  # None: a folder


def build_page(
    model: bytes, classes: Sequence[str], caption: str, runtime: dict[str, bytes], geometry: Geometry
) -> str:
    """Returns the HTML of the page.

    Args:
        model: an ONNX file from "images", uint8 (N, 1, 28, 28), to "probabilities", float32 (N, classes).
        classes: the names of the classes, in the order of the probabilities.
        caption: a line about the network.
        runtime: the result of `load_runtime`.
        geometry: how the training set places its figures.
    """
    parts = {name: _packed(data) for name, data in {**runtime, "model": model}.items()}
    parts["classes"] = json.dumps(list(classes)).replace("<", "\\u003c")
    parts["geometry"] = json.dumps(asdict(geometry))
    parts["caption"] = html.escape(caption)
    parts["version"] = VERSION
    template = Path(__file__).with_name("draw.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _packed(data: bytes) -> str:
    return base64.b64encode(gzip.compress(data, mtime=0)).decode()
