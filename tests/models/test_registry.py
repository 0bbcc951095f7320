"""Every name finds its network: of this package, of torchvision, of timm, or a user's own."""

import sys
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor

from mnist_dist.models import build_model, count_parameters, find_builder


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 1, 28, 28, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["mobilenet_v2", "efficientnet_b0"])
def test_torchvision_networks_accept_grey_images(name):
    model = build_model(f"torchvision/{name}", num_classes=7).eval()
    assert model(images()).shape == (2, 7)


def test_the_grey_convolution_equals_the_colour_convolution_for_equal_channels():
    torch.manual_seed(0)
    colour = torchvision.models.mobilenet_v2(weights=None, num_classes=10).eval()
    torch.manual_seed(0)
    grey = build_model("torchvision/mobilenet_v2").eval()
    assert torch.allclose(grey(images()), colour(images().expand(-1, 3, -1, -1)), atol=1e-5)


def test_torchvision_keywords_are_passed_on_and_wrong_ones_are_refused():
    model = build_model("torchvision/mobilenet_v2", width_mult=0.25)
    assert count_parameters(model) < count_parameters(build_model("torchvision/mobilenet_v2"))
    with pytest.raises(ValueError, match="width_mul"):
        build_model("torchvision/mobilenet_v2", width_mul=0.25)


def test_timm_networks_accept_grey_images():
    pytest.importorskip("timm", reason="timm is not installed: pip install timm")
    assert build_model("timm/resnet18").eval()(images()).shape == (2, 10)
    assert build_model("timm/vit_tiny_patch16_224", patch_size=4, depth=1).eval()(images()).shape == (2, 10)
    with pytest.raises(ValueError, match="resnet18"):
        find_builder("timm/resnet81")


@pytest.mark.parametrize("keywords", [{}, {"patch_size": 5}])
def test_patches_that_do_not_cover_the_image_are_refused(keywords):
    pytest.importorskip("timm", reason="timm is not installed: pip install timm")
    with pytest.raises(ValueError, match=r"patch_size.* 2, 4, 7, 14"):
        build_model("timm/vit_tiny_patch16_224", depth=1, **keywords)


@pytest.mark.parametrize(
    ("name", "keyword"),
    [
        ("torchvision/resnet18", "weights"),
        ("timm/resnet18", "in_chans"),
        ("timm/resnet18", "checkpoint_path"),
    ],
)
def test_a_keyword_that_the_trainer_sets_is_refused_by_name(name, keyword):
    if name.startswith("timm/"):
        pytest.importorskip("timm", reason="timm is not installed: pip install timm")
    with pytest.raises(ValueError, match=f"{keyword}.*trainer"):
        build_model(name, **{keyword: "DEFAULT"})


def test_without_timm_the_error_names_the_command_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match="pip install timm"):
        find_builder("timm/resnet18")


@pytest.fixture
def nets(tmp_path, monkeypatch):
    """A module `user_nets` in the current directory."""
    (tmp_path / "user_nets.py").write_text(
        "from torch import nn\n"
        "class Wide(nn.Sequential):\n"
        "    def __init__(self, units: int, num_classes: int = 10):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(784, units), nn.Linear(units, num_classes))\n"
        "def fixed():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))\n"
        "def no_model():\n"
        "    return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    sys.modules.pop("user_nets", None)


def test_a_users_own_network_is_imported_from_the_current_directory(nets):
    assert build_model("user_nets:Wide", num_classes=4, units=5)(images()).shape == (2, 4)
    assert build_model("user_nets:fixed", num_classes=4)(images()).shape == (2, 10)


@pytest.mark.parametrize(
    ("name", "keywords", "named"),
    [
        ("user_nets:Wild", {}, "'Wild'.*'Wide'"),
        ("user_nets:Wide", {}, "'units'"),
        ("user_nets:Wide", {"unit": 5}, "'unit'.*'units'"),
        ("user_nets:fixed", {"units": 5}, "'units'.*\\n.*none"),
        ("user_nets:no_model", {}, "torch.nn.Module.*int"),
        ("no_such_package.nets:Net", {}, "'no_such_package.nets'.*\\n.*{cwd}"),
        (":Net", {}, "{cwd}"),
    ],
)
def test_the_error_names_what_is_wrong_with_a_users_own_network(nets, name, keywords, named):
    with pytest.raises(ValueError, match=named.replace("{cwd}", str(Path.cwd()))):
        build_model(name, **keywords)


@pytest.mark.parametrize(
    ("name", "keywords", "named"),
    [
        ("resnet81", {}, "'resnet81'.*'resnet18'.*\\n.*ms_ran, .*small_cnn"),
        ("LeNet-5", {}, "'LeNet-5'.*'lenet5'"),
        ("torchvision/mobilnet_v2", {}, "'torchvision/mobilnet_v2'.*'mobilenet_v2'"),
        ("mnistnet", {"widht": 8}, "'widht'.*'width'.*\\n.*width, hidden, dropout"),
        ("resnet18", {"dropout": 0.1}, "'dropout'.*\\n.*stem"),
    ],
)
def test_the_error_names_similar_networks_and_keywords(name, keywords, named):
    with pytest.raises(ValueError, match=named):
        build_model(name, **keywords)
