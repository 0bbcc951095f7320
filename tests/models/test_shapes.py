"""Networks for images of other channels and sizes."""

import pytest
import torch

from mnist_dist.models import MODELS, build_model

SMALL = {"resnet34": {}, "resnet50": {}, "resnet101": {}, "resnet152": {}}
"""ResNets that differ from resnet18 in their depth only are built once, in test_networks.py."""


@pytest.mark.parametrize("name", sorted(MODELS.keys() - SMALL.keys()))
@pytest.mark.parametrize(("channels", "size"), [(3, (32, 32)), (1, (32, 32)), (3, (28, 28)), (3, (40, 24))])
def test_every_network_takes_the_shape_of_the_images(name, channels, size):
    model = build_model(name, num_classes=7, in_channels=channels, image_size=size).eval()
    with torch.no_grad():
        images = torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(0))
        found = model(images)
        assert found.shape == (2, 7)
        assert not torch.equal(model(images.roll(1, dims=1)) if channels > 1 else model(-images), found)


@pytest.mark.parametrize("name", ["torchvision/mobilenet_v3_small", "timm/resnet18", "timm/vit_tiny_patch16_224"])
@pytest.mark.parametrize("channels", [1, 3])
def test_networks_of_other_packages_take_the_shape_of_the_images(name, channels):
    keywords = {"depth": 1, "patch_size": 8} if "vit" in name else {}
    if name.startswith("timm/"):
        pytest.importorskip("timm", reason="timm is not installed")
    model = build_model(name, num_classes=7, in_channels=channels, image_size=(32, 32), **keywords).eval()
    assert model(torch.zeros(2, channels, 32, 32)).shape == (2, 7)


def test_the_stem_of_a_resnet_for_small_images():
    model = build_model("resnet18", in_channels=3, image_size=(32, 32), stem="cifar").eval()
    assert tuple(model.conv1.weight.shape) == (64, 3, 3, 3) and model.conv1.stride == (1, 1)
    features = model.layer1(model.maxpool(model.relu(model.bn1(model.conv1(torch.zeros(1, 3, 32, 32))))))
    assert features.shape == (1, 64, 32, 32)
    with pytest.raises(ValueError, match="stem"):
        build_model("resnet18", stem="cifr")


@pytest.mark.parametrize("name", ["lenet5", "small_cnn", "model_v1", "mnistnet", "patch_cnn", "simple_cnn"])
def test_an_image_that_is_too_small_is_refused(name):
    with pytest.raises(ValueError):
        build_model(name, image_size=(3, 3))


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("patch_cnn", (27, 28)), ("torchvision/vit_b_16", (28, 28)), ("torchvision/vit_b_16", (32, 48)),
        ("torchvision/maxvit_t", (40, 40)), ("torchvision/swin_t", (30, 32)), ("timm/convmixer_768_32", (40, 40)),
        ("timm/vit_tiny_patch16_224", (37, 41)), ("timm/mixer_s32_224", (40, 40)),
        ("timm/xcit_nano_12_p16_224", (40, 40)), ("timm/swin_tiny_patch4_window7_224", (33, 32)),
    ],
)  # fmt: skip
def test_patches_that_do_not_cover_the_image_are_refused(name, size):
    if name.startswith("timm/"):
        pytest.importorskip("timm", reason="timm is not installed")
    with pytest.raises(ValueError, match=r"patch|square|partition") as caught, torch.device("meta"):
        build_model(name, in_channels=3, image_size=size)
    assert len(str(caught.value).splitlines()) == 1 and "one of ," not in str(caught.value)


@pytest.mark.parametrize(("annotation", "expected"), [("image_size: int", "28"), ("image_size=(1, 1)", "(28, 28)")])
def test_a_users_own_network_is_given_what_its_signature_has(tmp_path, monkeypatch, annotation, expected):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    name = f"own_shapes_{len(annotation)}"
    (tmp_path / f"{name}.py").write_text(
        "from torch import nn\n"
        f"def net(in_channels, {annotation}):\n"
        "    made = nn.Sequential(nn.Flatten(), nn.Linear(in_channels * 784, 10))\n"
        "    made.given = str(image_size)\n"
        "    return made\n"
    )
    model = build_model(f"{name}:net", in_channels=3)
    assert model.given == expected and model(torch.zeros(1, 3, 28, 28)).shape == (1, 10)


# --- pretrained weights -------------------------------------------------------------------------------------------


@pytest.fixture
def published(monkeypatch):
    """Weights for ImageNet that are at hand: those of a network with random weights."""
    from torchvision import models

    torch.manual_seed(5)
    state = models.resnet18(weights=None).state_dict()
    monkeypatch.setattr("torchvision.models._api.WeightsEnum.get_state_dict", lambda self, **words: state)
    return state


@pytest.mark.parametrize("name", ["resnet18", "torchvision/resnet18"])
@pytest.mark.parametrize("channels", [1, 3])
def test_pretrained_weights_are_used_except_for_the_last_layer(published, name, channels):
    model = build_model(name, num_classes=7, in_channels=channels, pretrained=True)
    own = model.state_dict()
    expected = published["conv1.weight"] if channels == 3 else published["conv1.weight"].sum(dim=1, keepdim=True)
    assert torch.equal(own["conv1.weight"], expected)
    assert torch.equal(own["layer4.1.bn2.weight"], published["layer4.1.bn2.weight"])
    assert torch.equal(own["layer3.0.conv1.weight"], published["layer3.0.conv1.weight"])
    assert own["fc.weight"].shape == (7, 512)


def test_pretrained_weights_that_cannot_be_had_end_in_one_line(monkeypatch):
    def fail(self, **words):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.models._api.WeightsEnum.get_state_dict", fail)
    for name in ("resnet18", "torchvision/mobilenet_v2"):
        with pytest.raises(ValueError, match="no network") as caught:
            build_model(name, in_channels=3, pretrained=True)
        assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(ValueError, match="pretrained"):
        build_model("lenet5", pretrained=True)
