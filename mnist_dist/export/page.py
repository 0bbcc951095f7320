"""Builds an HTML page for trying a network. The page contains the network and onnxruntime-web, and works offline.

A network of figures on a common ground, such as digits, gets a page to draw in; any other network gets a page into
which pictures are dropped.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

from mnist_dist.data.cache import user_cache
from mnist_dist.data.geometry import Geometry
from mnist_dist.engine.files import fsync_path, rename_flushed

PACKAGE = "onnxruntime-web"
VERSION = "1.30.0"
ARCHIVE = f"{PACKAGE}-{VERSION}.tgz"
SHA512 = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
"""The SHA-512 of the archive in base64, as in the `integrity` fields of npm's lock files."""
FILES = {"script": "ort.wasm.bundle.min.mjs", "wasm": "ort-wasm-simd-threaded.wasm"}
"""Placeholder in page.html -> file in the archive."""

INPUTS = {
    "draw": {
        "title": "Draw and classify",
        "how": "Use a mouse, a pen or a finger.",
        "board": """\
      <div class="sheet">
        <canvas id="paper" width="420" height="420" role="img"></canvas>
        <div id="hint" aria-hidden="true">draw here</div>
      </div>""",
        "buttons": "",
    },
    "picture": {
        "title": "Classify a picture",
        "how": "Drop a picture, paste it, or choose a file.",
        "board": """\
      <label id="drop" class="sheet drop">
        <canvas id="picture" width="1" height="1" role="img" aria-label="No picture"></canvas>
        <span id="hint">drop a picture here, or click to choose one</span>
        <input id="file" class="hidden" type="file" accept="image/*" aria-label="Choose a picture">
      </label>""",
        "buttons": """\
        <label class="button touch">Photograph
          <input id="photo" class="hidden" type="file" accept="image/*" capture="environment">
        </label>""",
    },
}
"""How a page gets its input -> the parts of page.html; the script is in the file of that name."""

PACK_COMMAND = f"npm pack {PACKAGE}@{VERSION}"
PACK_SECONDS = 900
"""The npm client gets this time for 33 MB; a site's mirror may be slow."""


def load_runtime(archive: Path | None = None) -> dict[str, bytes]:
    """Returns the files of onnxruntime-web that the page contains, by their names in `FILES`.

    Args:
        archive: npm's archive of the package. None: the archive in the cache folder, which the npm client fetches once.

    Raises:
        ValueError: the file is not the archive of `VERSION`, byte for byte.
        OSError: the archive cannot be read, fetched or cached.
    """
    if archive is not None:
        return _unpack(_checked(archive.read_bytes(), str(archive)))
    cache = cached_archive()
    try:
        return _unpack(_checked(cache.read_bytes(), str(cache)))
    except (FileNotFoundError, ValueError):
        return _unpack(_fetch(cache))


def cached_archive() -> Path:
    """Returns the path of the fetched archive, in $XDG_CACHE_HOME or ~/.cache."""
    return user_cache() / ARCHIVE


def _fetch(cache: Path) -> bytes:
    """Fetches the archive with the npm client, which knows the site's mirror and proxy. Writes it to the cache.

    Raises:
        ValueError: the client gave another file.
        OSError: npm is not installed, or failed; the message says how to get the archive.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise OSError(f"the npm client is not installed\n{_ways('install npm (part of Node.js) and try again')}")
    print(f"mnist_dist: npm fetches {PACKAGE} {VERSION} (33 MB) into {cache.parent}", file=sys.stderr)
    cache.parent.mkdir(parents=True, exist_ok=True)
    # A temporary folder for each export: several exports may fill the cache at the same time.
    with TemporaryDirectory(dir=cache.parent, prefix=".npm-") as folder:
        command = [npm, "pack", f"{PACKAGE}@{VERSION}", "--silent", "--ignore-scripts"]
        packed = Path(folder) / ARCHIVE
        try:
            subprocess.run(
                command,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                check=True,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=PACK_SECONDS,
            )
            data = packed.read_bytes()
        except (OSError, subprocess.SubprocessError) as error:
            reason = "\n".join((getattr(error, "stderr", None) or str(error)).strip().splitlines()[:3])
            raise OSError(f"`{PACK_COMMAND}` failed: {reason}\n{_ways('check the configuration of npm')}") from error
        _checked(data, f"the file that `{PACK_COMMAND}` gave")
        fsync_path(packed)
        rename_flushed(packed, cache)
    return data


def _ways(first: str) -> str:
    return f"{first}, or run `{PACK_COMMAND}` on another machine and add --onnxruntime-web {ARCHIVE}"


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
        model: an ONNX file from "images", uint8 (N, C, H, W), to "probabilities", float32 (N, classes).
        classes: the names of the classes, in the order of the probabilities.
        caption: a line about the network.
        runtime: the result of `load_runtime`.
        geometry: of the training set. It decides whether the page is for drawing or for pictures.
    """
    parts = {name: _packed(data) for name, data in {**runtime, "model": model}.items()}
    parts["classes"] = json.dumps(list(classes)).replace("<", "\\u003c")
    parts["geometry"] = json.dumps(asdict(geometry))
    parts["caption"] = html.escape(caption)
    parts["version"] = VERSION
    kind = "picture" if geometry.ground == "none" else "draw"
    parts |= INPUTS[kind] | {"kind": kind, "input": _read(f"{kind}.js")}
    template = _read("page.html")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _read(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8").rstrip("\n")


def _packed(data: bytes) -> str:
    return base64.b64encode(gzip.compress(data, mtime=0)).decode()
