"""One HTML file to draw in, with the network and onnxruntime-web to run it inside: no server, no internet."""

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
from http.client import HTTPException
from pathlib import Path

VERSION = "1.30.0"
ARCHIVE = f"onnxruntime-web-{VERSION}.tgz"
URL = f"https://registry.npmjs.org/onnxruntime-web/-/{ARCHIVE}"
SHA512 = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
"""As the registry and npm's lock files give it, in base64."""
FILES = {"script": "ort.wasm.bundle.min.mjs", "wasm": "ort-wasm-simd-threaded.wasm"}


def load_runtime(archive: Path | None = None) -> dict[str, bytes]:
    """The files of onnxruntime-web that the page carries, by their names in `FILES`.

    Args:
        archive: npm's tarball of the package; None to take it from the cache folder, or load it from the registry once.

    Raises:
        ValueError: not the archive of `VERSION`, byte for byte. OSError: it cannot be read, loaded or kept.
    """
    if archive is not None:
        return _unpack(_checked(archive.read_bytes(), str(archive)))
    cache = cached_archive()
    try:
        return _unpack(_checked(cache.read_bytes(), str(cache)))
    except (FileNotFoundError, ValueError):
        print(f"mnist_dist: downloading {URL} (33 MB) into {cache.parent}", file=sys.stderr)
    try:
        with urllib.request.urlopen(URL, timeout=60) as answer:
            data = _checked(answer.read(), URL)
    except (OSError, HTTPException) as error:
        hint = f"load it elsewhere and name the file with --onnxruntime-web {ARCHIVE}"
        raise OSError(f"{URL}: {error}\n{hint}") from error
    cache.parent.mkdir(parents=True, exist_ok=True)
    beside = cache.with_name(f"{cache.name}.{os.getpid()}")
    beside.write_bytes(data)
    beside.replace(cache)
    return _unpack(data)


def cached_archive() -> Path:
    """Where the archive is kept once it was downloaded: in $XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mnist_dist" / ARCHIVE


def _checked(data: bytes, source: str) -> bytes:
    if base64.b64encode(hashlib.sha512(data).digest()).decode() != SHA512:
        raise ValueError(f"{source} is not the archive that the registry published as {ARCHIVE}: its SHA-512 differs")
    return data


def _unpack(data: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        found = {name: archive.extractfile(f"package/dist/{file}") for name, file in FILES.items()}
        return {name: file.read() for name, file in found.items() if file is not None}  # None is for folders


def build_page(model: bytes, classes: Sequence[str], caption: str, runtime: dict[str, bytes]) -> str:
    """The page's HTML.

    Args:
        model: ONNX; takes "images", uint8 (N, 1, 28, 28), and gives "probabilities", float32 (N, classes).
        classes: their names, in the order of the probabilities.
        caption: a line about the network.
        runtime: what `load_runtime` gives.
    """
    parts = {name: _packed(data) for name, data in {**runtime, "model": model}.items()}
    parts["classes"] = json.dumps(list(classes)).replace("<", "\\u003c")
    parts["caption"] = html.escape(caption)
    parts["version"] = VERSION
    template = Path(__file__).with_name("draw.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _packed(data: bytes) -> str:
    return base64.b64encode(gzip.compress(data, mtime=0)).decode()
