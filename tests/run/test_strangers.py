"""A run folder from a stranger is data: no command imports or calls what its files name."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import re
import resource
import shutil
import struct
import sys
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from mnist_dist import (
    ensemble,
    evaluate,
    explain,
    load_recipe,
    load_run,
    predict,
    predict_digit,
    train,
)
from mnist_dist.compare.__main__ import main as compare_main
from mnist_dist.data.geometry import Geometry
from mnist_dist.data.pictures import read_picture
from mnist_dist.data.sources.idx import read_idx
from mnist_dist.engine.checkpoint import MANIFEST, STATE, load_checkpoint, load_weights, save_weights
from mnist_dist.engine.files import fingerprint
from mnist_dist.errors import RecipeError
from mnist_dist.export.__main__ import main as export_main
from mnist_dist.export.page import build_page
from mnist_dist.models import CodeRefused, find_builder
from mnist_dist.run.text_output import markdown_table, printable

QUIET = ("tracking.plots=false", "tracking.wandb.mode=disabled")

HTML = "</script><script>alert(1)</script><img src=x onerror=alert(1)><!-- end of results -->|\n[a](javascript:b)"
"""A text that must never become part of a page's or a table's structure."""


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A module `my_nets` in the current directory; returns the names of the files that its import and calls leave."""
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "my_nets.py").write_text(
        "from pathlib import Path\n"
        "from subprocess import run\n"
        "from torch import nn\n"
        "from torch.nn import Linear\n"
        "Path('imported').touch()\n"
        "class Net(nn.Sequential):\n"
        "    def __init__(self, num_classes: int = 10):\n"
        "        Path('built').touch()\n"
        "        super().__init__(nn.Flatten(), nn.Linear(784, num_classes))\n"
        "def function(num_classes: int = 10):\n"
        "    return Net(num_classes)\n"
        "class NoNetwork:\n"
        "    def __init__(self):\n"
        "        Path('called').touch()\n"
    )
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "my_nets", raising=False)
    yield lambda: sorted(path.name for path in folder.iterdir() if path.suffix != ".py" and path.is_file())
    sys.modules.pop("my_nets", None)


def describe(run: Path, **values) -> Path:
    """Changes the description in the weights files of a run."""
    for name in ("last", "best"):
        tensors, about = load_weights(run / f"{name}.safetensors")
        save_weights(run / f"{name}.safetensors", tensors, about | values)
    return run


def rewrite(run: Path, key: str, value) -> Path:
    """Changes a key of a run's recipe.yaml."""
    values = yaml.safe_load((run / "recipe.yaml").read_text())
    *sections, last = key.split(".")
    target = values
    for section in sections:
        target = target[section]
    target[last] = value
    (run / "recipe.yaml").write_text(yaml.safe_dump(values))
    return run


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "digit.png"
    image = Image.new("L", (28, 28), 0)
    image.paste(255, (12, 4, 16, 24))
    image.save(path)
    return path


def commands(run: Path, picture: Path) -> dict[str, list]:
    """Returns name -> [main, arguments] of every command that loads the network of a run."""
    return {
        "predict": [predict.main, [str(run), str(picture)]],
        "evaluate": [evaluate.main, [str(run)]],
        "explain": [explain.main, [str(run), str(picture), "--output", f"{picture}.explained.png"]],
        "ensemble": [ensemble.main, [str(run), str(run)]],
        "export": [export_main, [str(run), "--format", "torch"]],
    }


COMMANDS = ("predict", "evaluate", "explain", "ensemble", "export")

# --- code ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_a_program_in_the_metadata_of_weights_does_not_run(command, debug_run, picture, trap, refused):
    describe(debug_run, model="subprocess:Popen", keywords={"args": ["touch", "ran"]})
    main, arguments = commands(debug_run, picture)[command]
    assert refused(lambda: main(arguments)) == [("--allow-code", "code")]
    assert trap() == []


@pytest.mark.parametrize("command", COMMANDS)
def test_a_module_that_weights_or_recipe_name_is_not_imported(command, debug_run, picture, trap, refused):
    rewrite(describe(debug_run, model="my_nets:Net", keywords={}), "model", {"name": "my_nets:Net"})
    main, arguments = commands(debug_run, picture)[command]
    with pytest.raises(RecipeError) as found:
        main(arguments)
    [problem] = found.value.problems
    assert "my_nets:Net" in problem.message and "--allow-code my_nets" in problem.message
    assert trap() == []


@pytest.mark.parametrize("command", ["predict", "evaluate", "export"])
def test_a_recipe_that_names_a_module_is_data(command, debug_run, picture, trap):
    rewrite(debug_run, "model", {"name": "my_nets:Net"})
    main, arguments = commands(debug_run, picture)[command]
    assert main(arguments) == 0
    assert trap() == []


def test_compare_reads_a_recipe_that_names_a_module(debug_run, trap):
    rewrite(debug_run, "model", {"name": "my_nets:Net"})
    assert compare_main([str(debug_run), "--no-html"]) == 0
    assert trap() == []


@pytest.fixture
def own_run(trap, tmp_path):
    """A run of the network my_nets:Net, trained from a recipe that the user named. `trap` is empty after it."""
    train(load_recipe("debug", *QUIET, "model={name: my_nets:Net}"), tmp_path / "own")
    for name in trap():
        Path(name).unlink()
    sys.modules.pop("my_nets", None)
    return tmp_path / "own"


def test_a_users_own_network_is_loaded_if_it_is_allowed(own_run, picture, trap):
    assert predict.main([str(own_run), str(picture), "--allow-code", "other", "--allow-code", "my_nets"]) == 0
    assert trap() == ["built", "imported"]
    assert load_run(own_run, allow_code=("my_nets",)).model(torch.zeros(1, 1, 28, 28)).shape == (1, 10)
    assert load_run(own_run, allow_code="my_nets:Net").model is not None
    assert predict_digit(picture, own_run, allow_code="my_nets")[0] in set("0123456789")
    for other in ((), ("my",), ("my_nets:Other",), ("my_nets.inner",), ("",)):
        with pytest.raises(CodeRefused):
            _ = load_run(own_run, allow_code=other).model


def test_a_package_allows_the_modules_in_it(debug_run):
    describe(debug_run, model="torch.nn.modules.linear:Identity", keywords={})
    for allowed in ("torch", "torch.nn", "torch.nn.modules.linear", "torch.nn.modules.linear:Identity"):
        with pytest.raises(ValueError, match="Identity") as found:
            _ = load_run(debug_run, allow_code=allowed).model
        assert not isinstance(found.value, CodeRefused), "it is built, and has other tensors than the file"


def test_a_run_of_the_users_own_network_resumes_and_teaches_without_permission(own_run, tmp_path, trap, refused):
    words = (*QUIET, "model={name: my_nets:Net}")
    recipe = load_recipe("debug", *words)
    (own_run / "STATUS").write_text("preempted\n")
    (own_run / "summary.json").unlink()
    assert train(recipe, own_run)["eval.last.accuracy"] > 0
    assert train(load_recipe("debug", *words, f"distill.from={own_run}"), tmp_path / "student")["seed"] == 0
    other = load_recipe("debug", *QUIET, f"distill.from={own_run}")
    assert refused(lambda: train(other, tmp_path / "other")) == [("distill.from", "code")]
    assert train(other, tmp_path / "allowed", allow_code=["my_nets"])["seed"] == 0


def test_resuming_and_initial_weights_import_nothing_that_the_run_names(checkpoint, tmp_path, trap, refused):
    source, debug_run = checkpoint, checkpoint.parents[1]
    rewrite(describe(debug_run, model="my_nets:Net", keywords={}), "model.name", "my_nets:Net")
    plain = load_recipe("debug", *QUIET)
    assert refused(lambda: train(plain, tmp_path / "new", resume=str(source))) == [("--resume", "conflict")]
    (debug_run / "STATUS").write_text("preempted\n")
    assert refused(lambda: train(plain, debug_run)) == [("--run-dir", "conflict")]
    train(load_recipe("debug", *QUIET, f"model.init_from={debug_run}"), tmp_path / "initialised")
    assert trap() == []


@pytest.mark.parametrize("name", ["my_nets:run", "my_nets:NoNetwork", "my_nets:Path", "builtins:exec", "os:system"])
def test_a_path_must_lead_to_a_network_or_to_a_function_of_its_module(name, trap):
    with pytest.raises(ValueError, match=name):
        find_builder(name)
    assert "called" not in trap()
    assert find_builder("my_nets:function") and find_builder("my_nets:Linear") is torch.nn.Linear


@pytest.mark.parametrize("key", ["checkpoint_path", "pretrained_cfg_overlay", "cache_dir"])
def test_keywords_of_timm_that_read_files_are_refused(key, debug_run):
    pytest.importorskip("timm")
    value = {"file": "evil.pth"} if key.endswith("overlay") else "evil.pth"
    describe(debug_run, model="timm/resnet18", keywords={key: value})
    with pytest.raises(ValueError, match=key):
        _ = load_run(debug_run).model


class Evil:
    def __reduce__(self):
        return os.system, ("touch ran",)


@pytest.fixture(scope="module")
def _run_with_checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("strangers") / "run"
    train(load_recipe("debug", *QUIET, "checkpoint.every_steps=2", "max_steps=4"), folder)
    return folder


@pytest.fixture
def checkpoint(_run_with_checkpoint, tmp_path):
    run = shutil.copytree(_run_with_checkpoint, tmp_path / "stranger")
    return sorted((run / "checkpoints").glob("step-*"))[-1]


def reseal(checkpoint: Path) -> None:
    """Writes the manifest that fits the state."""
    step = int(checkpoint.name.partition("-")[2])
    manifest = {"step": step, "files": {STATE: fingerprint((checkpoint / STATE).read_bytes())}}
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_a_pickle_in_a_checkpoint_does_not_run(how, checkpoint, tmp_path, trap, refused):
    if how == "pickle":
        (checkpoint / STATE).write_bytes(pickle.dumps(Evil()))
    else:
        torch.save({"progress": {"step": 1}, "evil": Evil()}, checkpoint / STATE)
    reseal(checkpoint)
    recipe = load_recipe("debug", *QUIET)
    assert refused(lambda: train(recipe, tmp_path / "new", resume=str(checkpoint))) == [("--resume", "damaged")]
    assert trap() == []


@pytest.mark.parametrize("step", ["1/../../../outside", -1, 1.5, None, [1]])
def test_a_step_in_a_checkpoint_is_not_used_as_a_path(step, checkpoint, tmp_path, refused):
    state = load_checkpoint(checkpoint)
    state["progress"]["step"] = step
    torch.save(state, checkpoint / STATE)
    reseal(checkpoint)
    recipe = load_recipe("debug", *QUIET)
    assert refused(lambda: train(recipe, tmp_path / "new", resume=str(checkpoint))) == [("--resume", "damaged")]


def test_a_compressed_checkpoint_is_refused(checkpoint):
    content = io.BytesIO()
    with zipfile.ZipFile(checkpoint / STATE) as stored, zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in stored.infolist():
            packed.writestr(entry.filename, stored.read(entry))
    (checkpoint / STATE).write_bytes(content.getvalue())
    reseal(checkpoint)
    with pytest.raises(ValueError, match="compressed"):
        load_checkpoint(checkpoint)


# --- sizes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "keywords"),
    [
        ("mnistnet", {"width": 10**15}),
        ("mnistnet", {"width": 100_000, "hidden": 1_000_000}),
        ("torchvision/resnet18", {"width_per_group": 10**6}),
        ("timm/vit_tiny_patch16_224", {"depth": 10**6, "patch_size": 4}),
        ("timm/vit_tiny_patch16_224", {"depth": 10**12}),
        ("timm/vit_tiny_patch16_224", {"embed_dim": 1e300}),
        ("lenet5", {"x": [[[[[[[[[[[[1]]]]]]]]]]]]}),
        ("lenet5", {"x": "x" * 100_000}),
        ("lenet5", {f"x{number}": 1 for number in range(20_000)}),
        ("resnet152", {}),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_sizes_in_the_metadata_are_refused_before_building(model, keywords, debug_run, picture, refused):
    if model.startswith("timm/"):
        pytest.importorskip("timm")
    describe(debug_run, model=model, keywords=keywords)
    assert refused(lambda: predict.main([str(debug_run), str(picture)])) == [(str(debug_run), "damaged")]


@pytest.mark.parametrize(
    "values",
    [
        {"classes": [str(number) for number in range(100_000)]},
        {"classes": 10**9},
        {"classes": ["a\x1b[2J", *"123456789"]},
        {"classes": ["0"] * 10},
        {"model": ["lenet5"]},
        {"keywords": ["lenet5"]},
        {"mean": float("nan")},
        {"std": "1"},
        {"mean": None},
        {"mean": [0.5, 0.5]},
        {"shape": [1, 28]},
        {"shape": [1, 28.0, 28]},
        {"shape": [1, 10**9, 10**9]},
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_description_of_other_types_is_damaged(values, debug_run, picture, refused):
    describe(debug_run, **values)
    assert refused(lambda: predict.main([str(debug_run), str(picture)])) == [(str(debug_run), "damaged")]


def test_a_description_that_is_not_an_object_is_damaged(debug_run, picture, refused):
    tensors, _ = load_weights(debug_run / "last.safetensors")
    save_weights(debug_run / "last.safetensors", tensors, ["a", "list"])
    assert refused(lambda: predict.main([str(debug_run), str(picture)])) == [(str(debug_run), "damaged")]


def test_weights_that_claim_terabytes_are_refused(debug_run, picture, refused):
    header = json.dumps({"w": {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}}).encode()
    with (debug_run / "last.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        try:
            file.truncate(8 + len(header) + 2**40)  # sparse: takes no space
        except OSError:
            pytest.skip("this file system has no sparse files of a terabyte")
    assert refused(lambda: predict.main([str(debug_run), str(picture)])) == [(str(debug_run), "damaged")]


def test_a_recipe_with_a_million_layers_is_read_as_data(debug_run):
    rewrite(debug_run, "model", {"name": "mnistnet", "width": 10**12, "hidden": 10**12})
    assert load_run(debug_run).recipe.model.name == "mnistnet"


@pytest.mark.parametrize(
    "text",
    [
        "a: " + "[" * 50_000,
        "a: " + "{b: " * 5_000 + "1" + "}" * 5_000,
        "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
        + "".join(f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 10)}]\n" for n in range(12)),
        "model: {name: !!python/object/apply:os.system ['touch ran']}",
        "model: {name: lenet5}\nepochs: " + "9" * 4_000,
        "model: {name: lenet5}\nepochs: " + "9" * 100_000,
        "model: {name: lenet5}\nname: ../../outside",
        "model: {name: lenet5}\nname: '" + "x" * 2_000_000 + "'",
        "model: {name: lenet5}\nname: \"\\e[2J\"",
        "\x00\x01\x02",
    ],
    ids=lambda text: text[:40],
)  # fmt: skip
def test_hostile_recipes_are_refused_and_compared(text, debug_run, trap):
    (debug_run / "recipe.yaml").write_text(text)
    with pytest.raises(RecipeError):
        _ = load_run(debug_run).recipe
    assert compare_main([str(debug_run), "--html", str(debug_run / "page.html")]) == 0
    assert trap() == []


@pytest.mark.parametrize(
    "text",
    [
        "[" * 200_000,
        '{"recipe": "x", "seed": 1, "epochs": 1e999, "eval.last.accuracy": NaN, "eval.best.accuracy": -1e999}',
        '{"recipe": "x", "seed": 1, "epochs": 1, "eval.last.accuracy": ' + "9" * 4_000 + ', "eval.best.accuracy": 1}',
        '{"recipe": "\\ud800", "seed": ' + "9" * 4_000 + ', "epochs": 1, "eval.last.accuracy": 1, '
        '"eval.best.accuracy": 1, "device": ["a"], "mixed_precision": {}, "world_size": [], "git_commit": 3}',
        "[]",
        "9" * 100_000,
    ],
    ids=lambda text: text[:60],
)  # fmt: skip
def test_hostile_numbers_in_summaries_and_metrics_are_compared(text, debug_run, tmp_path, capsys):
    (debug_run / "summary.json").write_text(text)
    lines = [text, '{"epoch": ' + "9" * 4_000 + ', "train/loss": 1}']
    lines += ['{"epoch": 1, "train/loss": ' + value + "}" for value in ("1e308", "1e308", "9" * 4_000, "NaN", "1e999")]
    (debug_run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert compare_main([str(debug_run), "--html", str(tmp_path / "page.html")]) == 0
    capsys.readouterr().out.encode()
    kept = tmp_path / "kept.jsonl"
    kept.write_text(text + "\n")
    try:
        assert compare_main([str(kept), "--markdown", str(tmp_path / "table.md")]) == 0
    except RecipeError as error:
        assert [(problem.key, problem.kind) for problem in error.problems] == [(str(kept), "damaged")]


# --- bombs --------------------------------------------------------------------------------------------------------


def bomb(path: Path, side: int) -> Path:
    """Writes a small PNG that claims side×side pixels."""
    Image.new("L", (8, 8)).save(path)
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", side, side)
    content[29:33] = struct.pack(">I", zlib.crc32(bytes(content[12:29])))
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("side", [11_000, 15_000, 60_000, 2**31 - 1])
def test_image_bombs_are_refused(side, debug_run, tmp_path):
    with pytest.raises(ValueError):
        read_picture(bomb(tmp_path / "bomb.png", side))
    (debug_run / "plots").mkdir(exist_ok=True)
    bomb(debug_run / "plots" / "confusion_matrix.png", side)
    assert compare_main([str(debug_run), "--html", str(tmp_path / "page.html")]) == 0
    assert "data:image" not in (tmp_path / "page.html").read_text().replace("img-src data:", "")


def test_a_picture_that_is_a_program_is_refused(tmp_path, monkeypatch):
    """Pillow hands PostScript to Ghostscript, a program."""
    path = tmp_path / "digit.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *args, **keywords: pytest.fail("it runs a program"))
    with pytest.raises(ValueError):
        read_picture(path)


def test_a_gzip_bomb_is_refused(tmp_path):
    path = tmp_path / "train-images-idx3-ubyte.gz"
    head = bytes([0, 0, 8, 3]) + struct.pack(">III", 10, 28, 28)
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(head)
        for _ in range(64):
            file.write(bytes(2**24))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError):
        read_idx(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000, "KB; the content has 1 GB"


# --- links, pipes and devices -------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["/etc/passwd", "/dev/zero", "secret", "pipe", "."])
@pytest.mark.parametrize("name", ["best.safetensors", "last.safetensors", "recipe.yaml", "summary.json"])
def test_links_out_of_the_folder_are_not_followed(name, target, debug_run, tmp_path, picture, refused):
    secret = tmp_path / "secret"
    secret.write_bytes((debug_run / name).read_bytes())
    os.mkfifo(tmp_path / "pipe")
    (debug_run / name).unlink()
    (debug_run / name).symlink_to(tmp_path / target if not target.startswith("/") else target)
    if name.endswith("safetensors"):
        weights = name.partition(".")[0]
        assert refused(lambda: predict.main([str(debug_run), str(picture), "--weights", weights])) != []
    assert refused(lambda: train(load_recipe("debug", *QUIET), debug_run)) != []
    if name != "recipe.yaml" or target in ("/etc/passwd", "secret"):
        assert compare_main([str(debug_run), "--html", str(tmp_path / "page.html")]) == 0
        assert "root:" not in (tmp_path / "page.html").read_text()


def test_pictures_that_are_links_are_not_shown(debug_run, tmp_path, picture):
    plots = debug_run / "plots"
    shutil.rmtree(plots, ignore_errors=True)
    plots.mkdir()
    page = tmp_path / "page.html"
    shutil.copy(picture, plots / "confusion_matrix.png")
    compare_main([str(debug_run), "--html", str(page)])
    assert "data:image/webp" in page.read_text(), "a picture that is no link is shown"
    (plots / "confusion_matrix.png").unlink()
    (plots / "confusion_matrix.png").symlink_to(picture)
    compare_main([str(debug_run), "--html", str(page)])
    assert "data:image/webp" not in page.read_text()
    shutil.rmtree(plots)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(picture, elsewhere / "confusion_matrix.png")
    plots.symlink_to(elsewhere)
    compare_main([str(debug_run), "--html", str(page)])
    assert "data:image/webp" not in page.read_text()
    assert refused_output(lambda: explain.main([str(debug_run), str(picture)]))
    assert [path.name for path in elsewhere.iterdir()] == ["confusion_matrix.png"]


def refused_output(action) -> bool:
    with pytest.raises(RecipeError) as found:
        action()
    return [problem.key for problem in found.value.problems] == ["--output"]


def test_a_folder_that_links_out_is_not_resumed(debug_run, tmp_path, refused):
    mine = tmp_path / "my_notes"
    mine.write_text("mine\n")
    (debug_run / "metrics.jsonl").unlink()
    (debug_run / "metrics.jsonl").symlink_to(mine)
    (debug_run / "STATUS").write_text("preempted\n")
    assert refused(lambda: train(load_recipe("debug", *QUIET), debug_run)) == [("--run-dir", "unsupported")]
    assert mine.read_text() == "mine\n"


@pytest.mark.parametrize("name", ["STATUS", "summary.json", "run.lock", "plots/history.png"])
def test_a_folder_with_a_pipe_is_not_resumed(name, debug_run, refused):
    (debug_run / "plots").mkdir(exist_ok=True)
    (debug_run / name).unlink(missing_ok=True)
    if name != "STATUS":
        (debug_run / "STATUS").write_text("preempted\n")
    os.mkfifo(debug_run / name)  # who reads or writes it waits for ever
    assert refused(lambda: train(load_recipe("debug", *QUIET), debug_run)) == [("--run-dir", "unsupported")]


def test_a_pipe_in_the_place_of_the_lock_is_refused_before_a_run(tmp_path, refused):
    os.mkfifo(tmp_path / "run.lock")
    assert refused(lambda: train(load_recipe("debug", *QUIET), tmp_path)) == [("--run-dir", "unsupported")]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("summary.json", "[" * 50_000),
        ("run.lock", "[" * 50_000),
        ("run.lock", '{"pid": "1; rm", "host": [], "silent_seconds": 1e308}'),
    ],
    ids=["deep summary", "deep lock", "endless lock"],
)
def test_a_damaged_summary_or_lock_does_not_stop_a_run(name, text, debug_run):
    (debug_run / "STATUS").write_text("done\n" if name == "summary.json" else "preempted\n")
    (debug_run / name).write_text(text)
    os.utime(debug_run / name, (0, 0))  # a lock that has not been renewed for long is taken over
    train(load_recipe("debug", *QUIET), debug_run)
    assert json.loads((debug_run / "summary.json").read_text())["steps"] > 0
    assert not (debug_run / "run.lock").exists()


def test_a_run_folder_may_itself_be_a_link(debug_run, tmp_path, picture):
    (tmp_path / "link").symlink_to(debug_run)
    assert predict.main([str(tmp_path / "link"), str(picture)]) == 0


# --- HTML, Markdown and terminals ---------------------------------------------------------------------------------


def test_no_text_of_a_run_is_html_markdown_or_a_terminal_code(debug_run, tmp_path, capsys):
    hostile = HTML + "\x1b[2J\u202e"
    for key in ("name", "data.root", "model.name"):
        rewrite(debug_run, key, hostile)
    summary = json.loads((debug_run / "summary.json").read_text())
    summary |= {"recipe": hostile, "device": hostile, "git_commit": hostile, "mixed_precision": hostile}
    (debug_run / "summary.json").write_text(json.dumps(summary))
    (debug_run / "STATUS").write_text("<b>\x1b[2J")
    twin = shutil.copytree(debug_run, tmp_path / "<script>alert(1)")
    rewrite(twin, "batch_size", HTML)
    page, table = tmp_path / "page.html", tmp_path / "table.md"
    arguments = [str(debug_run), str(twin), "--html", str(page), "--markdown", str(table)]
    assert compare_main(arguments) == 0
    assert compare_main(arguments) == 0, "the marks of the table are still found"
    assert page.read_text().count("<script") == 2 and "<img src=x" not in page.read_text()
    assert "<script" not in table.read_text() and "<img" not in table.read_text()
    assert not re.search(r"(?<!\\)\[a\]", table.read_text())
    rows = [line for line in table.read_text().splitlines() if line.startswith("|")]
    assert len(rows) == 4 and len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1
    assert "\x1b" not in capsys.readouterr().out + table.read_text()


def test_the_page_to_draw_on_shows_names_as_text():
    runtime = {"script": b"", "wasm": b""}
    page = build_page(b"", [HTML, "b"], HTML, runtime, Geometry())
    plain = build_page(b"", ["a", "b"], "c", runtime, Geometry())
    assert page.count("<script") == plain.count("<script") and "<img src=x" not in page


def test_class_names_are_not_read_as_markup_on_the_console(debug_run, capsys):
    describe(debug_run, classes=["[red]", "[/nothing]", "<b>", "$\\frac$", "[link=x]", *"56789"])
    assert evaluate.main([str(debug_run)]) == 0
    out = capsys.readouterr().out
    assert "[0]" not in out


def test_printable_text_holds_no_control_codes():
    assert printable("a\x1b[2J\r\n\u202eb\ud800 é ☃") == "a�[2J���b? é ☃"
    assert markdown_table([("a",), ("x|y",)]).splitlines()[2] == "| x\\|y |"
