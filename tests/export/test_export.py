"""Exported files: they agree with the network, or no file is written; and the page to draw in."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import os
import shutil
import sys
import tarfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

from mnist_dist import build_model, load_recipe, load_run, train
from mnist_dist.data import load_dataset, normalize
from mnist_dist.data.geometry import Geometry
from mnist_dist.data.pictures import prepare_picture, read_picture
from mnist_dist.engine.checkpoint import save_weights
from mnist_dist.errors import RecipeError, RunError
from mnist_dist.export import __main__ as export
from mnist_dist.export import exporter, quantize, verify
from mnist_dist.export import page as draw_page
from mnist_dist.run.prediction import predict_picture
from tests.colour import CLASSES

pytest_plugins = ["tests.browser"]

QUIET = ["tracking.wandb.mode=disabled", "tracking.plots=false", "engine.channels_last=false"]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "run"
    words = ["data.dataset=synthetic", "epochs=3", "optimizer.lr=0.003", "data.augment.rotation=0", *QUIET]
    train(load_recipe("lenet5", *words, "data.limit_test=203"), folder)
    return folder


@pytest.fixture(scope="module")
def fp32(run_dir):
    """The run as an ONNX file, at the default path."""
    assert export.main([str(run_dir), "--format", "onnx"]) == 0
    return run_dir / "export" / "last.onnx"


@pytest.fixture
def known_onnx(fp32, monkeypatch):
    """Has an export of the same run copy its ONNX file: writing it again takes most of the time."""
    monkeypatch.setattr(exporter, "write_onnx", lambda program, path, *about: shutil.copy(fp32, path))


@pytest.fixture(scope="module")
def expected(run_dir):
    run, test = load_run(run_dir, "last"), load_dataset("synthetic").test
    with torch.no_grad():
        logits = run.model(normalize(test.images, run.about["mean"], run.about["std"]))
    return test, logits.softmax(dim=1)


def untrained(folder, name):
    """Writes a run folder as training leaves it, with the initial weights of a network."""
    folder.mkdir()
    recipe = load_recipe("lenet5", "data.dataset=synthetic", f"model.name={name}")
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    about = {"recipe": "lenet5", "model": name, "keywords": {}, "classes": list("0123456789"), "mean": 0.4, "std": 0.3}
    save_weights(folder / "last.safetensors", build_model(name).state_dict(), about)
    return folder


def session(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def assert_agrees(predict, expected):
    """Compares a file with the network for several batch sizes."""
    test, probabilities = expected
    for count in (1, 2, 77):
        found = predict(test.images[:count])
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, probabilities[:count], atol=1e-5, rtol=0)


def test_an_onnx_file_agrees_with_the_network_for_any_batch(fp32, expected):
    opened = session(fp32)
    assert opened.get_inputs()[0].type == "tensor(uint8)"
    metadata = {key: json.loads(text) for key, text in opened.get_modelmeta().custom_metadata_map.items()}
    assert metadata["classes"] == [str(digit) for digit in range(10)]
    form = {"channels": 1, "height": 28, "width": 28, "colours": "grey", "ground": "none", "resize": "crop"}
    assert form.items() <= metadata["image"].items()
    assert str(Path(export.__file__).parent).encode() not in fp32.read_bytes(), "the file holds paths of this machine"
    assert_agrees(lambda images: torch.from_numpy(opened.run(None, {"images": images.numpy()})[0]), expected)


def test_a_torch_file_agrees_with_the_network_for_any_batch(run_dir, expected, tmp_path, capsys):
    path = tmp_path / "made" / "file"
    assert export.main([str(run_dir), "--format", "torch", "--output", str(path)]) == 0
    assert str(Path(export.__file__).parent).encode() not in path.read_bytes(), "the file holds paths of this machine"
    assert_agrees(torch.export.load(path.rename(path.with_suffix(".pt2"))).module(), expected)
    # The file was verified on the whole test set, although the run was evaluated on 203 images.
    assert "1,024 of 1,024" in capsys.readouterr().out


def test_the_default_path_is_in_the_run_folder_with_no_other_file(fp32):
    assert list(fp32.parent.iterdir()) == [fp32]


def test_int8_is_small_and_as_accurate(run_dir, fp32, known_onnx, expected, tmp_path):
    int8 = tmp_path / "fp32.onnx"
    forms = exporter.export(load_run(run_dir, "last"), "onnx-int8", int8)
    assert [form.name.partition(" (")[0] for form in forms] == ["PyTorch", "onnx", "onnx-int8"]
    assert forms[-1].name.startswith("onnx-int8 (static, QDQ") and forms[-1].size == int8.stat().st_size
    assert int8.stat().st_size <= 0.35 * fp32.stat().st_size
    test, probabilities = expected
    correct = probabilities.argmax(dim=1) == test.labels
    found = session(int8).run(None, {"images": test.images.numpy()})[0].argmax(axis=1) == test.labels.numpy()
    assert abs(found.mean() - float(correct.float().mean())) <= 0.001
    assert onnx.TensorProto.INT8 in {tensor.data_type for tensor in onnx.load(int8).graph.initializer}
    assert list(tmp_path.iterdir()) == [int8]


def test_int8_weights_have_a_smaller_error_than_plain_rounding(fp32, expected, tmp_path):
    model = onnx.load(fp32)
    before = {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}
    quantize._quantize_weights(model, smallest=500)
    after = {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}
    quantized = [name for name in before if f"{name}/integers" in after]
    assert len(quantized) == 4  # the first convolution has 150 weights
    errors = []
    for name in quantized:
        rows, scales = before[name].reshape(len(before[name]), -1), after[f"{name}/scales"][:, None]
        found = after[f"{name}/integers"].reshape(rows.shape) * scales
        plain = np.abs(rows).max(axis=1, keepdims=True) / 127
        errors.append([np.square(each - rows).sum(axis=1) for each in (found, np.rint(rows / plain) * plain)])
    ours, rounded = np.concatenate(errors, axis=1)
    assert (ours <= 1.001 * rounded).all() and ours.sum() < 0.995 * rounded.sum()
    onnx.save(model, tmp_path / "file")
    test, probabilities = expected
    found = session(tmp_path / "file").run(None, {"images": test.images.numpy()})[0]
    np.testing.assert_allclose(found, probabilities.numpy(), atol=0.05)


def test_an_int8_file_that_is_too_large_is_refused_with_all_figures(run_dir, known_onnx, tmp_path, monkeypatch):
    monkeypatch.setattr(quantize, "LARGEST_SHARE", 0.2)
    monkeypatch.setattr(quantize, "CALIBRATION_IMAGES", 32)
    with pytest.raises(RunError) as refused:
        export.main([str(run_dir), "--format", "onnx-int8", "--output", str(tmp_path / "file")])
    lines = str(refused.value).splitlines()
    assert "20% of fp32's" in lines[0]
    assert len(lines) == 7 and all("bytes (" in line and " %, " in line for line in lines[1:])
    assert not list(tmp_path.iterdir())


def test_a_file_that_disagrees_is_never_left(run_dir, known_onnx, tmp_path, monkeypatch):
    def wrong_session(path, open_session=exporter.onnx_session):
        predict = open_session(path)

        def predict_wrongly(images):
            probabilities = predict(images)
            probabilities[7] = probabilities[7].roll(1)
            return probabilities

        return predict_wrongly

    monkeypatch.setattr(exporter, "onnx_session", wrong_session)
    (tmp_path / "file").write_text("an older file")
    with pytest.raises(RunError) as refused:
        export.main([str(run_dir), "--format", "onnx", "--output", str(tmp_path / "file")])
    assert "3 of 1,024" in str(refused.value) and "  image 7: " in str(refused.value)  # batches of 500
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "an older file"


def form_of(probabilities):
    """The form of a network or file that gives these probabilities, one row for each image."""
    probabilities = torch.tensor(probabilities)
    return verify.Form("onnx", 1000, 90.0, probabilities.argmax(dim=1), probabilities, lambda images: probabilities)


SURE = [[0.9, 0.06, 0.04]] * 9_999


def test_a_near_tie_does_not_forbid_an_export_and_is_counted(capsys):
    network, file = form_of([*SURE, [0.400001, 0.4, 0.199999]]), form_of([*SURE, [0.4, 0.400001, 0.199999]])
    verify.check_agreement(network, file, ["a", "b", "c"])
    export.show([network, file], torch.zeros(2, 1, 28, 28, dtype=torch.uint8))
    assert "9,999 of 10,000 + 1 near-tie" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("network", "file"),
    [
        ([0.40002, 0.4, 0.19998], [0.4, 0.40002, 0.19998]),  # a difference of 2e-5
        ([0.400001, 0.4, 0.199999], [0.2, 0.2, 0.6]),  # a near-tie, but the file predicts a third class
        ([0.9, 0.06, 0.04], [0.400001, 0.4000011, 0.199999]),  # a near-tie in the file alone
    ],
)
def test_any_other_disagreement_forbids_an_export(network, file):
    with pytest.raises(RunError, match="1 of 10,000"):
        verify.check_agreement(form_of([*SURE, network]), form_of([*SURE, file]), ["a", "b", "c"])


NETS = """
import torch
from torch import nn

class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(784, 10)

class LooksAtValues(Base):
    def forward(self, images):
        logits = self.linear(images.flatten(1))
        return logits if logits.sum() > 1e9 else 2 * logits

class CountsImages(Base):
    def forward(self, images):
        logits = self.linear(images.flatten(1))
        return logits if len(images) < 100 else 2 * logits

class Noisy(Base):
    def forward(self, images):
        return self.linear(images.flatten(1)) + torch.randn(10)
"""


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("simple_cnn", "initial.1"),  # normalises by the batch
        ("nets_to_export:LooksAtValues", ""),
        ("nets_to_export:CountsImages", ""),
        ("nets_to_export:Noisy", ""),
    ],
)
@pytest.mark.parametrize("kind", ["torch", "onnx"])
def test_a_network_that_no_file_can_hold_is_refused(tmp_path, monkeypatch, name, kind, layer):
    (tmp_path / "nets_to_export.py").write_text(NETS)
    monkeypatch.syspath_prepend(tmp_path)
    run = untrained(tmp_path / "run", name)
    with pytest.raises(RecipeError) as refused:
        export.main([str(run), "--format", kind, "--allow-code", "nets_to_export"])
    [problem] = refused.value.problems
    assert (
        (problem.key, problem.kind) == ("model.name", "model") and name in problem.message and layer in problem.message
    )
    assert not list((run / "export").glob("*")) + list((run / "export").glob(".*"))


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["RUN", "--format", "onnx", "--output", "TMP"], ("--output", "unwritable")),
        (["RUN", "--format", "torch", "--output", "/dev/null/file"], ("--output", "unwritable")),
        (["RUN", "--format", "page", "--onnxruntime-web", "absent.tgz"], ("--onnxruntime-web", "missing")),
        (["RUN", "--format", "page", "--onnxruntime-web", __file__], ("--onnxruntime-web", "damaged")),
    ],
)
def test_bad_input_is_refused(run_dir, tmp_path, refused, words, problem):
    paths = {"RUN": str(run_dir), "TMP": str(tmp_path)}
    assert refused(lambda: export.main([paths.get(word, word) for word in words])) == [problem]


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["nowhere", "--format", "onnx"], "nowhere"),
        (["RUN", "--format", "oonx"], "oonx"),
        (["RUN", "--format", "onnx", "data.dataset=emnist", "data.root=/nowhere"], "data.root"),
    ],
)
def test_a_missing_run_format_or_data_set_is_named(run_dir, words, name):
    with pytest.raises(RecipeError, match=name):
        export.main([str(run_dir) if word == "RUN" else word for word in words])


def test_another_number_of_classes_is_refused(run_dir, monkeypatch, refused):
    letters = SimpleNamespace(test=SimpleNamespace(classes=["letter"] * 26))
    monkeypatch.setattr(exporter, "load_data", lambda *arguments: letters)
    assert refused(lambda: export.main([str(run_dir), "--format", "torch"])) == [("data.dataset", "conflict")]


def test_several_processes_are_refused(run_dir, monkeypatch, refused):
    monkeypatch.setattr(exporter, "launched_world", lambda: SimpleNamespace(num_processes=2))
    [(_, kind)] = refused(lambda: export.main([str(run_dir), "--format", "torch"]))
    assert kind == "world"


def test_a_missing_package_is_named_with_the_command_that_installs_it(run_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(RecipeError, match=r'onnxscript.* pip install -e "\.\[export\]"') as refused:
        export.main([str(run_dir), "--format", "onnx"])
    assert [(each.key, each.kind) for each in refused.value.problems] == [("--format", "missing")]


# --- onnxruntime-web ------------------------------------------------------------------------------------------------


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """Returns a function that puts a stub of the npm client first in PATH; the cache of the archive is empty.

    The stub writes its arguments to the file `arguments`, and runs the given shell command.
    """
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")

    def write(command):
        stub = tmp_path / "bin" / "npm"
        stub.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > "{tmp_path}/arguments"\n{command}\n')
        stub.chmod(0o755)

    return write


@pytest.fixture
def small_archive(tmp_path, monkeypatch):
    """An archive with the two files that a page needs, for which the checksum is set."""
    path = tmp_path / "small.tgz"
    with tarfile.open(path, "w:gz") as made:
        for name in draw_page.FILES.values():
            entry = tarfile.TarInfo(f"package/dist/{name}")
            entry.size = len(name)
            made.addfile(entry, io.BytesIO(name.encode()))
    monkeypatch.setattr(draw_page, "SHA512", base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode())
    return path


@pytest.mark.parametrize("old", [None, b"half of it"])
def test_the_npm_client_fetches_the_archive_once_into_the_cache(npm, small_archive, tmp_path, old):
    npm(f'cp "{small_archive}" {draw_page.ARCHIVE}')
    cached = draw_page.cached_archive()
    if old:
        cached.parent.mkdir(parents=True)
        cached.write_bytes(old)
    runtime = draw_page.load_runtime()
    assert runtime == {key: name.encode() for key, name in draw_page.FILES.items()}
    assert (tmp_path / "arguments").read_text().split()[:2] == ["pack", f"onnxruntime-web@{draw_page.VERSION}"]
    assert list(cached.parent.iterdir()) == [cached] and cached.read_bytes() == small_archive.read_bytes()
    npm("exit 1")
    assert draw_page.load_runtime() == runtime


@pytest.mark.parametrize(
    ("command", "kind", "words"),
    [
        (None, "missing", ["npm"]),
        ("echo no such host >&2; exit 7", "missing", ["no such host"]),
        ("exit 0", "missing", [draw_page.ARCHIVE]),
        (f"echo other > {draw_page.ARCHIVE}", "damaged", ["SHA-512"]),
    ],
    ids=["not installed", "fails", "gives no file", "gives another file"],
)
def test_an_archive_that_npm_cannot_fetch_is_refused(run_dir, npm, tmp_path, monkeypatch, command, kind, words):
    if command is None:
        monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    else:
        npm(command)
    with pytest.raises(RecipeError) as refused:
        export.main([str(run_dir), "--format", "page"])
    [problem] = refused.value.problems
    assert (problem.key, problem.kind) == ("--onnxruntime-web", kind)
    if kind == "missing":
        words = [*words, draw_page.PACK_COMMAND, f"--onnxruntime-web {draw_page.ARCHIVE}"]
    assert all(word in problem.message for word in words)
    assert not draw_page.cached_archive().exists()


def test_a_file_is_used_without_the_npm_client(npm, small_archive, tmp_path):
    npm("exit 1")
    assert draw_page.load_runtime(small_archive)["wasm"] == draw_page.FILES["wasm"].encode()
    assert not (tmp_path / "arguments").exists()


# --- the page -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def archive():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("npm_config_fetch_retries", "0")  # without a network the test is skipped soon
        try:
            draw_page.load_runtime()
        except OSError as error:
            pytest.skip(f"onnxruntime-web is not cached and npm cannot fetch it: {error}")
    return draw_page.cached_archive()


@pytest.fixture(scope="module")
def page_file(archive, mnist_root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    words = ["data.limit_train=10000", "data.limit_test=500", "epochs=2", "optimizer.lr=0.003", *QUIET]
    train(load_recipe("lenet5", *words, f"data.root={mnist_root}"), folder / "run")
    exporter.export(load_run(folder / "run", "last"), "page", folder / "page.html")
    return folder / "page.html"


@pytest.fixture
def open_file(browser):
    """Opens a page on a screen (width, height). At the end there must be no error and no request outside the file."""
    contexts, errors, requests = [], [], []

    def open_page(path, width, height, **settings):
        context = browser.new_context(viewport={"width": width, "height": height}, offline=True, **settings)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda message: errors.append(message.text))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda sent: requests.append(sent.url))
        page.goto(path.as_uri())
        page.wait_for_selector("#confidence:has-text('the prediction appears')")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not errors
    assert {url.partition(":")[0] for url in requests} == {"file", "blob"}


@pytest.fixture
def opened(open_file, page_file):
    """Opens the page to draw in."""
    return partial(open_file, page_file)


TURN = [2 * math.pi * step / 20 for step in range(21)]
STROKES = {
    "1": [(0.52, 0.15), (0.48, 0.85)],
    "7": [(0.25, 0.2), (0.75, 0.2), (0.45, 0.85)],
    "0": [(0.5 + 0.25 * math.sin(angle), 0.5 - 0.35 * math.cos(angle)) for angle in TURN],
}


def points_of(page, digit):
    frame = page.locator("#paper").bounding_box()
    return [(frame["x"] + x * frame["width"], frame["y"] + y * frame["height"]) for x, y in STROKES[digit]]


def draw_with_mouse(page, digit):
    first, *rest = points_of(page, digit)
    page.mouse.move(*first)
    page.mouse.down()
    for point in rest:
        page.mouse.move(*point, steps=5)
    return page.mouse.up


def draw_with_finger(page, digit):
    channel = page.context.new_cdp_session(page)

    def touch(kind, *points):
        channel.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [{"x": x, "y": y} for x, y in points]})

    first, *rest = points_of(page, digit)
    touch("touchStart", first)
    for point in rest:
        touch("touchMove", point)
    return lambda: touch("touchEnd")


@pytest.mark.parametrize(
    ("draw", "screen"),
    [
        (draw_with_mouse, {"width": 1100, "height": 760}),
        (draw_with_finger, {"width": 390, "height": 844, "has_touch": True, "color_scheme": "dark"}),
    ],
    ids=["mouse", "finger"],
)
def test_the_page_predicts_while_the_user_draws(opened, draw, screen):
    page = opened(**screen)
    assert page.locator("#bars li").count() == 10
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    for digit in STROKES:
        lift = draw(page, digit)
        page.wait_for_selector(f"#bars li.best .name:text-is('{digit}')")
        assert not page.locator("#announced").inner_text().startswith(digit)  # announced once, when the pen is lifted
        lift()
        page.wait_for_selector(f"#announced:has-text('{digit}, ')")
        page.get_by_role("button", name="Clear").click()
        page.wait_for_selector("#bars li.best", state="detached")


def test_the_page_prepares_a_drawing_as_predict_prepares_a_picture(opened, tmp_path):
    page = opened(800, 700)
    for digit in STROKES:
        draw_with_mouse(page, digit)()
        page.wait_for_selector("#announced:has-text('confidence')")
        pictures = []
        for canvas in ("paper", "preview"):
            address = page.evaluate(f"document.getElementById('{canvas}').toDataURL()")
            pictures.append(Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))))
        # The ink alone: blending it with white would round it.
        pictures[0].getchannel("A").save(tmp_path / "ink.png")
        expected = read_picture(tmp_path / "ink.png")[0].int()
        found = torch.from_numpy(np.array(pictures[1].convert("L"))).int()
        assert expected.max() > 200
        # Older versions of Pillow shrink the width of a tall figure first.
        assert (expected - found).abs().max() <= (8 if digit == "1" else 1)
        page.get_by_role("button", name="Clear").click()
        page.wait_for_selector("#announced:has-text('empty')")


# --- colour ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["torch", "onnx", "onnx-int8"])
def test_a_network_of_colour_images_is_exported_with_the_form_of_the_images(colour_run, colour_data, tmp_path, kind):
    network, *_, form = exporter.export(colour_run, kind, tmp_path / "file")
    assert abs(form.accuracy - network.accuracy) <= 0.1
    if kind == "torch":
        files = {"classes.json": "", "image.json": ""}
        torch.export.load(tmp_path / "file", extra_files=files)
        classes, image = (json.loads(text) for text in files.values())
    else:
        opened = session(tmp_path / "file")
        assert opened.get_inputs()[0].shape == ["batch", 3, 24, 40]
        metadata = opened.get_modelmeta().custom_metadata_map
        classes, image = json.loads(metadata["classes"]), json.loads(metadata["image"])
        found = opened.run(None, {"images": colour_data.test.images[:5].numpy()})[0]
        np.testing.assert_allclose(found, network.probabilities[:5].numpy(), atol=1e-5 if kind == "onnx" else 0.1)
    assert classes == list(CLASSES)
    form = {"channels": 3, "height": 24, "width": 40, "colours": "RGB", "ground": "none", "resize": "crop"}
    assert form.items() <= image.items()


@pytest.fixture
def photo(tmp_path):
    """Returns a function that writes a picture of another size and shape: a bright rectangle in noise."""

    def write(name, size=(90, 130), mode="RGB", **settings):
        levels = torch.randint(0, 110, (*size, 3), generator=torch.Generator().manual_seed(7), dtype=torch.uint8)
        levels[size[0] // 4 : -size[0] // 4, size[1] // 3 : -size[1] // 5, 2] += 90
        picture = Image.fromarray(levels.numpy()).convert(mode)
        if mode == "RGBA":
            picture.paste((0, 0, 0, 0), (0, 0, 30, 20))
        picture.save(tmp_path / name, **settings)
        return tmp_path / name

    return write


def preview_of(page):
    """Returns the input of the network that the page shows, uint8 (3, height, width)."""
    address = page.evaluate("document.getElementById('preview').toDataURL()")
    shown = Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))).convert("RGB")
    return torch.from_numpy(np.array(shown)).movedim(-1, 0).int()


def page_for(archive, path, geometry, classes=CLASSES):
    """Writes a page whose network, a constant, serves for tests of its input."""
    channels, height, width = geometry.shape
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(channels * height * width, len(classes)))
    deployed = verify.Deployed(network, (0.5,) * channels, (0.5,) * channels).eval()
    images = torch.zeros(2, *geometry.shape, dtype=torch.uint8)
    exporter.write_onnx(exporter.trace_program(deployed, images, "linear"), path.with_suffix(".onnx"), "linear", {})
    model, runtime = path.with_suffix(".onnx").read_bytes(), draw_page.load_runtime(archive)
    path.write_text(draw_page.build_page(model, classes, "a caption", runtime, geometry), encoding="utf-8")
    return path


def test_the_page_classifies_a_picture_as_predict_does(colour_run, archive, open_file, photo, tmp_path):
    exporter.export(colour_run, "page", tmp_path / "page.html")
    page = open_file(tmp_path / "page.html", 1100, 700)
    assert "classes" in page.locator("#title").inner_text() and not page.locator("#photo").is_visible()
    path = photo("photo.png")
    expected = predict_picture(colour_run, path)
    page.locator("#file").set_input_files(path)
    page.wait_for_selector(f"#bars li.best .name:text-is('{expected['class']}')")
    assert f"{100 * expected['confidence']:.1f} %" in page.locator("#confidence").inner_text()
    page.wait_for_selector(f"#announced:has-text('{expected['class']}, ')")
    page.get_by_role("button", name="Clear").click()
    page.wait_for_selector("#bars li.best", state="detached")


@pytest.mark.parametrize("resize", ["crop", "stretch", "pad"])
@pytest.mark.parametrize("shape", [(3, 24, 40), (1, 32, 20)])
def test_the_page_prepares_a_picture_as_predict_does(archive, open_file, photo, tmp_path, shape, resize):
    side = min(shape[1:])
    geometry = Geometry("none", side, side, side, "box", shape, resize)
    page = open_file(page_for(archive, tmp_path / "page.html", geometry), 1100, 700)
    for width in (390, 1100):
        page.set_viewport_size({"width": width, "height": 700})
        box = page.locator("#preview").bounding_box()
        assert abs(box["width"] / box["height"] - shape[2] / shape[1]) < 0.03
    turned = Image.Exif()
    turned[0x0112] = 6
    pictures = [
        photo("wide.png", (60, 300)),
        photo("tall.png", (300, 60)),
        photo("small.png", (13, 17)),
        photo("same.png", shape[1:]),
        photo("holes.png", (90, 130), "RGBA"),
        photo("grey.png", (50, 70), "L"),
        photo("turned.jpg", (90, 130), exif=turned, quality=98, subsampling=0),
    ]
    for path in pictures:
        page.locator("#file").set_input_files(path)
        page.wait_for_selector(f"#picture[aria-label='Picture {path.name}']")
        page.wait_for_selector("#announced:has-text('confidence')", state="attached")
        expected = prepare_picture(path, geometry).image.int().expand(3, -1, -1)
        # Browsers and Pillow decode JPEG with other rounding.
        most = 4 if path.suffix == ".jpg" else 1
        assert (preview_of(page) - expected).abs().max() <= most, path.name
        page.get_by_role("button", name="Clear").click()
        page.wait_for_selector("#announced:has-text('empty')", state="attached")


def test_pictures_are_dropped_pasted_and_photographed(archive, open_file, photo, tmp_path):
    geometry = Geometry("none", 24, 24, 24, "box", (3, 24, 40))
    file = page_for(archive, tmp_path / "page.html", geometry, [f"kind {number}" for number in range(100)])
    page = open_file(file, 390, 844, has_touch=True, is_mobile=True, color_scheme="dark")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.locator("#bars li:visible").count() == 10
    data = base64.b64encode(photo("dropped.png").read_bytes()).decode()
    for kind in ("drop", "paste"):
        page.evaluate(
            """([kind, data]) => {
                const transfer = new DataTransfer(), bytes = Uint8Array.from(atob(data), each => each.charCodeAt(0));
                transfer.items.add(new File([bytes], kind + ".png", {type: "image/png"}));
                const settings = {bubbles: true, cancelable: true};
                document.body.dispatchEvent(kind === "drop" ? new DragEvent(kind, {...settings, dataTransfer: transfer})
                    : new ClipboardEvent(kind, {...settings, clipboardData: transfer}));
            }""",
            [kind, data],
        )
        page.wait_for_selector(f"#picture[aria-label='Picture {kind}.png']")
        page.wait_for_selector("#bars li.best")
        assert page.locator("#bars li:visible").count() == 10
    assert page.locator("#photo").get_attribute("capture") == "environment"
    assert page.get_by_text("Photograph").is_visible()
    (tmp_path / "text.png").write_text("no picture")
    page.locator("#photo").set_input_files(tmp_path / "text.png")
    page.wait_for_selector("#trouble:has-text('text.png')")
    page.wait_for_selector("#bars li.best", state="detached")
