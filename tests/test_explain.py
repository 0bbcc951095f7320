"""What layers give, where ink counts, and the picture of both."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch import nn

from mnist_dist import build_model, get_feature_maps, load_recipe, train
from mnist_dist.data import load_dataset
from mnist_dist.errors import RecipeError
from mnist_dist.explain import main, smooth_gradient


def noise(count: int) -> torch.Tensor:
    return torch.randn(count, 1, 28, 28, generator=torch.Generator().manual_seed(0))


def state_of(model: nn.Module) -> list:
    hooks = [len(part._forward_hooks) for part in model.modules()]
    return [hooks, [part.training for part in model.modules()], [buffer.clone() for buffer in model.buffers()]]


@pytest.mark.parametrize("name", ["ms_ran", "torchvision/mobilenet_v3_small", "simple_cnn"])
def test_the_maps_of_every_convolution_are_there_and_nothing_is_left_behind(name):
    model = build_model(name).train()
    hooks, modes, buffers = state_of(model)
    maps = get_feature_maps(model, noise(3))
    assert list(maps) == [layer for layer, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert all(each.dim() == 4 and len(each) == 3 and not each.requires_grad for each in maps.values())
    assert state_of(model)[:2] == [hooks, modes]
    assert all(torch.equal(after, before) for after, before in zip(model.buffers(), buffers, strict=True))


def test_the_maps_are_what_the_layer_gives():
    model = build_model("resnet18").eval()
    maps = get_feature_maps(model, noise(2), ["fc", "conv1", "bn1"])
    assert list(maps) == ["fc", "conv1", "bn1"]
    with torch.no_grad():
        torch.testing.assert_close(maps["conv1"], model.conv1(noise(2)))
        torch.testing.assert_close(maps["bn1"], model.bn1(maps["conv1"]))  # the ReLU behind it works in place
        torch.testing.assert_close(maps["fc"][:, :, 0, 0], model(noise(2)))
    assert get_feature_maps(model, noise(2), "conv1").keys() == {"conv1"}
    half = get_feature_maps(model.bfloat16(), noise(2).bfloat16(), "conv1")["conv1"]
    assert half.dtype == torch.float32


class Twice(nn.Sequential):
    """Gives two outputs, and never asks its `spare`."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(784, 10))
        self.pair, self.spare = nn.Identity(), nn.Identity()

    def forward(self, images):
        return self.pair((self[1](self[0](images)), images))[0]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (["spair"], "Twice has no layer 'spair'; did you mean 'pair' or 'spare'"),
        (["1", "xyz"], "Twice has no layer 'xyz'; the first ones are 0, 1, pair, spare"),
        ([""], "has no layer ''"),
        (["spare"], "layer 'spare' takes no part when Twice is called"),
        (["1", "pair"], "layer 'pair' gives tuple; expected"),
        (None, "Twice has no convolution; name layers, e.g. 0, 1, pair"),
    ],
)
def test_what_gives_no_maps_is_named_and_no_hook_stays(layers, expected):
    model = Twice()
    before = state_of(model)
    with pytest.raises(ValueError, match=expected):
        get_feature_maps(model, noise(1), layers)
    assert state_of(model) == before


class Quadratic(nn.Module):
    """Its gradient is 2 × image for the class 0 and -1 for the class 1."""

    def forward(self, images):
        assert len(images) == 1, "a network may normalise by the batch"
        return torch.stack([images.square().flatten(1).sum(1), -images.flatten(1).sum(1)], dim=1)


def test_the_smooth_gradient_is_the_mean_over_noise_of_the_paper_s_size():
    image = noise(1)
    assert torch.equal(smooth_gradient(Quadratic(), image, target=1), -torch.ones_like(image))
    found = smooth_gradient(Quadratic(), image, target=0, samples=50, noise=0.1)
    assert torch.equal(found, smooth_gradient(Quadratic(), image, target=0, samples=50, noise=0.1))
    deviation, extent = float(((found - 2 * image) / 2).std()), float(image.max() - image.min())
    assert deviation * 50**0.5 == pytest.approx(0.1 * extent, rel=0.1)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("explain") / "run"
    train(load_recipe("debug", "model.name=simple_cnn"), folder)
    image = load_dataset("synthetic", limit_test=1).test.images[0, 0]
    Image.fromarray(image.numpy()).save(folder.parent / "noise.png")
    return folder


def test_the_door_writes_a_picture(run_dir, tmp_path, capsys):
    assert main([str(run_dir), str(run_dir.parent / "noise.png")]) == 0
    path = run_dir / "plots" / "explain_noise.png"
    assert capsys.readouterr().out == f"{path}\n"
    words = ["--layers", "initial.0", "classifier.1", "--output", str(tmp_path / "new" / "why.png")]
    assert main([str(run_dir), str(run_dir.parent / "noise.png"), *words]) == 0
    six, two = (Image.open(each).size for each in (path, tmp_path / "new" / "why.png"))
    assert six[0] == two[0] and six[1] > two[1] > 400


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["nowhere", "IMAGE"], "not a run folder"),
        (["RUN", "nowhere.png"], "nowhere.png\n *No such file"),
        (["RUN", "RUN"], "Is a directory"),
        (["RUN", "IMAGE", "--layers", "initial.9"], "--layers\n *SimpleCNN has no layer 'initial.9'; did you mean"),
        (["RUN", "IMAGE", "--output", "RUN/recipe.yaml/a.png"], "--output .*\n *.*recipe.yaml"),
    ],
)
def test_bad_input_is_refused(run_dir, words, expected):
    words = [word.replace("RUN", str(run_dir)).replace("IMAGE", str(run_dir.parent / "noise.png")) for word in words]
    with pytest.raises(RecipeError, match=expected):
        main(words)
