"""Feature maps of any network, the smooth gradient, and the command `explain`, which draws both."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from mnist_dist import build_model, get_feature_maps
from mnist_dist.data import load_dataset
from mnist_dist.explain import main, smooth_gradient
from tests.colour import CODE, write_pictures


def noise(count: int) -> torch.Tensor:
    return torch.randn(count, 1, 28, 28, generator=torch.Generator().manual_seed(0))


def state_of(model: nn.Module) -> list:
    hooks = [len(part._forward_hooks) for part in model.modules()]
    return [hooks, [part.training for part in model.modules()], [buffer.clone() for buffer in model.buffers()]]


@pytest.mark.parametrize("name", ["ms_ran", "torchvision/mobilenet_v3_small", "simple_cnn"])
def test_every_convolution_gives_maps_and_the_model_is_unchanged(name):
    model = build_model(name).train()
    hooks, modes, buffers = state_of(model)
    maps = get_feature_maps(model, noise(3))
    assert list(maps) == [layer for layer, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert all(each.dim() == 4 and len(each) == 3 and not each.requires_grad for each in maps.values())
    assert state_of(model)[:2] == [hooks, modes]
    assert all(torch.equal(after, before) for after, before in zip(model.buffers(), buffers, strict=True))


def test_the_maps_are_the_layers_outputs():
    model = build_model("resnet18").eval()
    maps = get_feature_maps(model, noise(2), ["fc", "conv1", "bn1"])
    assert list(maps) == ["fc", "conv1", "bn1"]
    with torch.no_grad():
        torch.testing.assert_close(maps["conv1"], model.conv1(noise(2)))
        torch.testing.assert_close(maps["bn1"], model.bn1(maps["conv1"]))  # the next layer, a ReLU, works in place
        torch.testing.assert_close(maps["fc"][:, :, 0, 0], model(noise(2)))
    assert get_feature_maps(model, noise(2), "conv1").keys() == {"conv1"}
    half = get_feature_maps(model.bfloat16(), noise(2).bfloat16(), "conv1")["conv1"]
    assert half.dtype == torch.float32


class Twice(nn.Sequential):
    """Has a layer `pair` with two outputs, and a layer `spare` that it does not use."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(784, 10))
        self.pair, self.spare = nn.Identity(), nn.Identity()

    def forward(self, images):
        return self.pair((self[1](self[0](images)), images))[0]


@pytest.mark.parametrize(
    ("layers", "named"),
    [
        (["spair"], "'spair'.*'pair' or 'spare'"),
        (["1", "xyz"], "'xyz'.* 0, 1, pair, spare"),
        ([""], "''"),
        (["spare"], "'spare'"),
        (["1", "pair"], "'pair'.*tuple"),
        (None, "Twice.* 0, 1, pair"),
    ],
)
def test_the_error_names_a_layer_without_maps_and_removes_all_hooks(layers, named):
    model = Twice()
    before = state_of(model)
    with pytest.raises(ValueError, match=named):
        get_feature_maps(model, noise(1), layers)
    assert state_of(model) == before


class Quadratic(nn.Module):
    """The gradient is 2 × image for class 0 and -1 for class 1."""

    def forward(self, images):
        assert len(images) == 1, "a network may normalise by the batch"
        return torch.stack([images.square().flatten(1).sum(1), -images.flatten(1).sum(1)], dim=1)


def test_the_smooth_gradient_is_the_mean_over_images_with_noise_of_the_given_size():
    image = noise(1)
    assert torch.equal(smooth_gradient(Quadratic(), image, target=1), -torch.ones_like(image))
    found = smooth_gradient(Quadratic(), image, target=0, samples=50, noise=0.1)
    assert torch.equal(found, smooth_gradient(Quadratic(), image, target=0, samples=50, noise=0.1))
    deviation, extent = float(((found - 2 * image) / 2).std()), float(image.max() - image.min())
    assert deviation * 50**0.5 == pytest.approx(0.1 * extent, rel=0.1)


@pytest.fixture
def picture(debug_run: Path) -> Path:
    path = debug_run.parent / "noise.png"
    Image.fromarray(load_dataset("synthetic", limit_test=1).test.images[0, 0].numpy()).save(path)
    return path


def test_the_command_writes_a_png_of_all_or_of_chosen_layers(debug_run, picture, tmp_path, capsys):
    assert main([str(debug_run), str(picture)]) == 0
    path = debug_run / "plots" / "explain_noise.png"
    assert capsys.readouterr().out == f"{path}\n"
    chosen = tmp_path / "new" / "why.png"
    assert main([str(debug_run), str(picture), "--layers", "classifier.1", "--output", str(chosen)]) == 0
    both, one = (Image.open(each).size for each in (path, chosen))
    assert both[0] == one[0] and both[1] > one[1] > 300


def test_another_picture_of_the_same_name_gets_another_png(debug_run, picture, tmp_path, capsys):
    first = debug_run / "plots" / "explain_noise.png"
    first.parent.mkdir(exist_ok=True)
    first.write_bytes(b"of another picture")
    assert main([str(debug_run), str(picture), "--layers", "classifier.1"]) == 0
    second = first.with_name("explain_noise-2.png")
    assert capsys.readouterr().out == f"{second}\n" and second.is_file()
    assert first.read_bytes() == b"of another picture"


def test_a_picture_in_colour_is_explained(colour_run, colour_data, tmp_path, capsys):
    [path] = write_pictures(tmp_path, colour_data.test, count=1)
    assert main([str(colour_run.folder.path), str(path), "--allow-code", CODE]) == 0
    drawn = Image.open(capsys.readouterr().out.strip()).convert("RGB")
    # The input of the network, in which the rectangle is bright in the colour of its class.
    picture = drawn.crop((140, 195, 240, 255)).resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
    assert picture[0] > picture[1] + 50 and picture[0] > picture[2] + 50


@pytest.mark.parametrize(
    ("words", "key", "kind"),
    [
        (["nowhere", "PICTURE"], "nowhere", "missing"),
        (["RUN", "nowhere.png"], "nowhere.png", "missing"),
        (["RUN", "RUN"], "RUN", "missing"),
        (["RUN", "RUN/recipe.yaml"], "RUN/recipe.yaml", "damaged"),
        (["RUN", "PICTURE", "--layers", "features.9"], "--layers", "unknown"),
        (["RUN", "PICTURE", "--output", "RUN/recipe.yaml/a.png"], "--output", "unwritable"),
    ],
)
def test_bad_input_is_refused(refused, debug_run, picture, words, key, kind):
    words = [word.replace("RUN", str(debug_run)).replace("PICTURE", str(picture)) for word in words]
    assert refused(lambda: main(words)) == [(key.replace("RUN", str(debug_run)), kind)]
