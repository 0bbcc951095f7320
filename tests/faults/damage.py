"""Kinds of damage to the newest checkpoint and to other files of a run folder."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mnist_dist.engine.checkpoint import MANIFEST, STATE, list_checkpoints
from mnist_dist.run.folder import RunFolder


@dataclass
class Scene:
    """A run folder with at least three checkpoints, and the expected result of the damage."""

    run_dir: Path
    chance: random.Random
    named: list[str] = field(default_factory=list)
    """Names that the console must mention. A checkpoint among them must be renamed."""

    def __post_init__(self) -> None:
        self.newest, self.before, self.oldest = reversed(list_checkpoints(RunFolder(self.run_dir).checkpoints)[-3:])
        self.state, self.manifest = self.newest / STATE, self.newest / MANIFEST
        self.named = [self.newest.name]

    @property
    def used(self) -> Path | None:
        """The checkpoint that the run must resume from; None if it must start again."""
        return next((each for each in (self.newest, self.before, self.oldest) if each.name not in self.named), None)

    @property
    def harm(self) -> Path:
        """A folder that the code in the harmful pickle creates."""
        return self.run_dir / "harm"

    def change(self, path: Path, change: Callable[[bytearray], object]) -> None:
        """Changes the content of a file with a function."""
        content = bytearray(path.read_bytes())
        change(content)
        path.write_bytes(content)

    def write_manifest(self, files: dict[str, list[object]] | None = None) -> None:
        """Writes a manifest with these entries; without them, one that fits the current state."""
        content = self.state.read_bytes()
        fitting: dict[str, list[object]] = {STATE: [len(content), hashlib.sha256(content).hexdigest()]}
        step = int(self.newest.name.removeprefix("step-"))
        self.manifest.write_text(json.dumps({"step": step, "files": fitting if files is None else files}))


KINDS: dict[str, Callable[[Scene], None]] = {}
"""`<what is damaged>: <how>` -> the function that does it. Only a run can detect damage of kind "run folder"."""


def kind(what: str, how: str) -> Callable[[Callable[[Scene], None]], Callable[[Scene], None]]:
    """Registers a function in `KINDS`."""

    def register(function: Callable[[Scene], None]) -> Callable[[Scene], None]:
        KINDS[f"{what}: {how}"] = function
        return function

    return register


# --- the state ----------------------------------------------------------------------------------------------------


@kind("state", "truncated")
def _(scene: Scene) -> None:
    os.truncate(scene.state, scene.chance.randrange(1, scene.state.stat().st_size))


@kind("state", "one bit flipped")
def flip_a_bit(scene: Scene) -> None:
    offset, bit = scene.chance.randrange(scene.state.stat().st_size), scene.chance.randrange(8)
    scene.change(scene.state, lambda content: content.__setitem__(offset, content[offset] ^ (1 << bit)))


@kind("state", "empty")
def _(scene: Scene) -> None:
    scene.state.write_bytes(b"")


@kind("state", "missing")
def _(scene: Scene) -> None:
    scene.state.unlink()


@kind("state", "a folder")
def _(scene: Scene) -> None:
    scene.state.unlink()
    scene.state.mkdir()


@kind("state", "a block of zeros")
def _(scene: Scene) -> None:
    block = min(4096, scene.state.stat().st_size // 2)
    start = scene.chance.randrange(scene.state.stat().st_size - block)
    scene.change(scene.state, lambda content: content.__setitem__(slice(start, start + block), bytes(block)))


@kind("state", "bytes appended")
def _(scene: Scene) -> None:
    scene.change(scene.state, lambda content: content.extend(scene.chance.randbytes(scene.chance.randrange(1, 5000))))


@kind("state", "of another step")
def _(scene: Scene) -> None:
    shutil.copy(scene.before / STATE, scene.state)


@kind("state", "a pickle with code")
def put_code_in_it(scene: Scene) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (os.mkdir, (str(scene.harm),))

    torch.save({"progress": Harmful()}, scene.state)


@kind("state", "a pickle with code, fitting manifest")
def _(scene: Scene) -> None:
    put_code_in_it(scene)
    scene.write_manifest()


@kind("state", "truncated, fitting manifest")
def _(scene: Scene) -> None:
    os.truncate(scene.state, scene.chance.randrange(1, scene.state.stat().st_size))
    scene.write_manifest()


@kind("state", "random bytes, fitting manifest")
def _(scene: Scene) -> None:
    scene.state.write_bytes(scene.chance.randbytes(scene.chance.randrange(1, 5000)))
    scene.write_manifest()


# --- the manifest -------------------------------------------------------------------------------------------------


@kind("manifest", "missing")
def _(scene: Scene) -> None:
    scene.manifest.unlink()


@kind("manifest", "empty")
def _(scene: Scene) -> None:
    scene.manifest.write_bytes(b"")


@kind("manifest", "a folder")
def _(scene: Scene) -> None:
    scene.manifest.unlink()
    scene.manifest.mkdir()


@kind("manifest", "truncated")
def _(scene: Scene) -> None:
    os.truncate(scene.manifest, scene.chance.randrange(1, scene.manifest.stat().st_size - 1))


@kind("manifest", "random bytes")
def _(scene: Scene) -> None:
    scene.manifest.write_bytes(scene.chance.randbytes(200))


@kind("manifest", "JSON of another kind")
def _(scene: Scene) -> None:
    scene.manifest.write_text(scene.chance.choice(["[]", "null", "1", '{"files": 1}', '{"files": {"state.pt": null}}']))


@kind("manifest", "wrong size")
def _(scene: Scene) -> None:
    found = json.loads(scene.manifest.read_text())["files"][STATE]
    scene.write_manifest({STATE: [found[0] + 1, found[1]]})


@kind("manifest", "wrong hash")
def _(scene: Scene) -> None:
    found = json.loads(scene.manifest.read_text())["files"][STATE]
    scene.write_manifest({STATE: [found[0], hashlib.sha256(scene.chance.randbytes(8)).hexdigest()]})


@kind("manifest", "names no file, and one bit of the state flipped")
def _(scene: Scene) -> None:
    flip_a_bit(scene)
    scene.write_manifest({})


# --- the folder ---------------------------------------------------------------------------------------------------


@kind("folder", "empty")
def _(scene: Scene) -> None:
    shutil.rmtree(scene.newest)
    scene.newest.mkdir()


@kind("folder", "a file")
def _(scene: Scene) -> None:
    shutil.rmtree(scene.newest)
    scene.newest.write_bytes(scene.chance.randbytes(100))


@kind("folder", "a link to nowhere")
def _(scene: Scene) -> None:
    shutil.rmtree(scene.newest)
    scene.newest.symlink_to("nowhere")


@kind("folder", "another step's")
def _(scene: Scene) -> None:
    shutil.rmtree(scene.newest)
    shutil.copytree(scene.before, scene.newest)


@kind("several", "the two newest damaged")
def _(scene: Scene) -> None:
    flip_a_bit(scene)
    (scene.before / MANIFEST).unlink()
    scene.named = [scene.newest.name, scene.before.name]


@kind("several", "all truncated, so from the beginning")
def _(scene: Scene) -> None:
    for each in (scene.newest, scene.before, scene.oldest):
        os.truncate(each / STATE, scene.chance.randrange(each.joinpath(STATE).stat().st_size))
    scene.named = [each.name for each in (scene.newest, scene.before, scene.oldest)]


@kind("several", "an older one is a file")
def _(scene: Scene) -> None:
    shutil.rmtree(scene.oldest)
    scene.oldest.write_bytes(b"")
    scene.named = []  # no run needs it, and it must not prevent the next checkpoint


@kind("several", "strange names next to it")
def _(scene: Scene) -> None:
    for name in ("step-", "step-x", "step-9.5", "step-²", "step--1", ".step-9", "step-9.tmp", ".DS_Store"):
        scene.newest.with_name(name).mkdir()
    scene.named = []


@kind("several", "staged folders left over")
def _(scene: Scene) -> None:
    step = int(scene.newest.name.removeprefix("step-"))
    for each in (step, step + 1, step + 7):
        shutil.copytree(scene.newest, scene.newest.with_name(f".step-{each}.staged"))
    scene.named = []


# --- the run folder -----------------------------------------------------------------------------------------------


@kind("run folder", "best.safetensors truncated")
def _(scene: Scene) -> None:
    best = RunFolder(scene.run_dir).best
    os.truncate(best, scene.chance.randrange(best.stat().st_size))
    scene.named = [best.name]


@kind("run folder", "best.safetensors missing")
def _(scene: Scene) -> None:
    best = RunFolder(scene.run_dir).best
    best.unlink()
    scene.named = [best.name]


@kind("run folder", "best.safetensors with one bit flipped")
def _(scene: Scene) -> None:
    best = RunFolder(scene.run_dir).best
    size = best.stat().st_size
    offset = scene.chance.randrange(size - 100, size)  # in the last tensor, so that the file can be read
    scene.change(best, lambda content: content.__setitem__(offset, content[offset] ^ 1))
    scene.named = []


@kind("run folder", "half-written files left over")
def _(scene: Scene) -> None:
    folder = RunFolder(scene.run_dir)
    for path in (folder.last, folder.best, folder.status, folder.summary, folder.recipe):
        path.with_name(path.name + ".tmp").write_bytes(scene.chance.randbytes(100))
    folder.last.write_bytes(scene.chance.randbytes(100))
    scene.named = []


@kind("run folder", "metrics.jsonl too long")
def _(scene: Scene) -> None:
    with RunFolder(scene.run_dir).metrics.open("ab") as file:
        file.write(b'{"step": 1000, "epoch": 62.5}\n{"step": 10' + scene.chance.randbytes(10))
    scene.named = []


@kind("run folder", "STATUS empty")
def _(scene: Scene) -> None:
    RunFolder(scene.run_dir).status.write_bytes(b"")
    scene.named = []
