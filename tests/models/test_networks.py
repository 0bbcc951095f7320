"""Every network has its documented number of parameters, its output shape and gradients, and checks its arguments."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnist_dist.models import MODELS, build_model, count_parameters
from tests.models.parameters import PARAMETERS

QUICK = sorted(set(MODELS) - {"resnet34", "resnet50", "resnet101", "resnet152"})
"""The networks that are quick enough to compute with."""


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 1, 28, 28, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", MODELS)
def test_every_network_has_its_number_of_parameters(name):
    with torch.device("meta"):
        assert count_parameters(build_model(name)) == PARAMETERS[name]


@pytest.mark.parametrize(("width", "hidden", "name"), [(15, 8, "mnistnet_25k"), (11, 6, "mnistnet_13k")])
def test_a_narrow_mnistnet_has_its_number_of_parameters(width, hidden, name):
    assert count_parameters(build_model("mnistnet", width=width, hidden=hidden)) == PARAMETERS[name]


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("num_classes", [10, 47])
def test_the_output_is_one_finite_number_per_class(name, num_classes):
    model = build_model(name, num_classes=num_classes)
    for batch, output in ((2, model.train()(images(2))), (2, model.eval()(images(2))), (1, model.eval()(images(1)))):
        assert output.shape == (batch, num_classes)
        assert output.isfinite().all()


@pytest.mark.parametrize("name", sorted(set(MODELS) - set(QUICK)))
def test_deep_networks_have_the_output_shape(name):
    with torch.device("meta"):
        assert build_model(name)(torch.empty(2, 1, 28, 28)).shape == (2, 10)


@pytest.mark.parametrize("name", QUICK)
def test_every_parameter_gets_a_gradient(name):
    model = build_model(name)
    F.cross_entropy(model(images(4)), torch.arange(4)).backward()
    assert not [name for name, each in model.named_parameters() if each.grad is None or not each.grad.any()]


@pytest.mark.parametrize("name", ["model_v1", "model_v2", "model_v3"])
def test_log_softmax_sums_to_one(name):
    output = build_model(name)(images(4))
    assert torch.allclose(output.exp().sum(dim=1), torch.ones(4), atol=1e-6)
    # One loss serves every network, because cross entropy of log-probabilities equals their negative log likelihood.
    labels = torch.arange(4)
    assert torch.allclose(F.cross_entropy(output, labels), F.nll_loss(output, labels))


def test_the_stages_of_simple_cnn_have_the_documents_sizes():
    breakdown = build_model("simple_cnn").parameter_breakdown()
    assert breakdown == {"initial": 824, "residual1": 480, "transition": 132, "residual2": 936, "classifier": 19_242}


def test_simple_cnn_has_no_running_statistics():
    assert not list(build_model("simple_cnn").buffers())


def test_a_weighted_head_with_equal_weights_is_the_mean():
    mean, weighted = (build_model("separable_cnn", activation="hardswish", head=head) for head in ("mean", "weighted"))
    weighted.load_state_dict(mean.state_dict(), strict=False)
    nn.init.constant_(weighted.head[0].weight, 1 / 36)  # of 6×6 pixels
    weighted.head[1].eps = 1e-30  # some versions of PyTorch refuse 0
    torch.testing.assert_close(weighted.eval()(images(4)), mean.eval()(images(4)))
    assert count_parameters(weighted) - count_parameters(mean) == 32 * 36 + 2 * 32


def test_the_heads_of_patch_cnn_give_the_linear_layer_every_value_or_one_per_channel():
    flat, mean, largest = (
        build_model("patch_cnn", in_channels=3, image_size=(32, 32), patch=1, padding=1, head=head)
        for head in ("flatten", "mean", "max")
    )
    last = []
    for network in (flat, mean, largest):
        network.convolutions.load_state_dict(flat.convolutions.state_dict())
        network.eval().classifier.register_forward_pre_hook(lambda _, given: last.append(given[0]))
        network(torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    every = last[0].unflatten(1, (64, 8 * 8))
    torch.testing.assert_close(last[1], every.mean(2))
    torch.testing.assert_close(last[2], every.amax(2))
    assert largest.classifier[1].in_features == mean.classifier[1].in_features == 64


def test_the_margin_of_patch_cnn_is_cut_off():
    cut = build_model("patch_cnn", image_size=(28, 24), margin=2).eval()
    inner = build_model("patch_cnn", image_size=(24, 20)).eval()
    inner.load_state_dict(cut.state_dict())
    pictures = torch.rand(4, 1, 28, 24, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(cut(pictures), inner(pictures[..., 2:26, 2:22]))


def test_the_whitening_of_patch_cnn_is_fixed_and_gives_inputs_that_are_hardly_correlated():
    network = build_model("patch_cnn", in_channels=3, image_size=(32, 32), patch=1, whitening=2, padding=1)
    transform = network.stem[0]
    assert not transform.weight.requires_grad and network.stem[1].weight.requires_grad
    half = transform.weight[:12].flatten(1)
    torch.testing.assert_close(half @ half.T, torch.eye(12))
    assert torch.equal(transform.weight[12:], -transform.weight[:12])

    noise = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    grey = F.avg_pool2d(noise.mean(1, keepdim=True), 5, 1, 2)  # what neighbouring pixels and the three colours share
    pictures = 5 * grey + 0.1 * noise

    def correlation(rows):
        found = torch.corrcoef(rows)
        return (found - torch.eye(len(found))).abs().mean()

    patches = F.unfold(pictures, 2).transpose(0, 1).flatten(1)
    coefficients = transform(pictures)[:, :12].transpose(0, 1).flatten(1)
    assert correlation(patches) > 0.7
    assert correlation(coefficients) < 0.05
    batch = network.stem[1](transform(pictures)).transpose(0, 1).flatten(1)
    torch.testing.assert_close(batch.std(1), torch.ones(24), rtol=0.2, atol=0)


@pytest.mark.parametrize(
    ("name", "keywords", "named"),
    [
        ("mnistnet", {"width": 0}, "width"),
        ("mnistnet", {"hidden": -1}, "hidden"),
        ("mnistnet", {"dropout": 1.5}, "dropout"),
        ("ms_ran", {"bottleneck": 0}, "bottleneck"),
        ("patch_cnn", {"widths": (8, 0)}, "widths"),
        ("patch_cnn", {"patch": 0}, "patch"),
        ("patch_cnn", {"patch": 5}, "patch"),
        ("patch_cnn", {"margin": -1}, "margin.*from 0 to 13"),
        ("patch_cnn", {"margin": 14}, "margin.*from 0 to 13"),
        ("patch_cnn", {"margin": 1, "patch": 4}, "patch.*26×26"),
        ("patch_cnn", {"whitening": -1}, "whitening.*from 0 to 14"),
        ("patch_cnn", {"whitening": 15}, "whitening.*from 0 to 14"),
        ("patch_cnn", {"widths": (8, 8, 8, 8)}, r"widths\[2\]"),
        ("patch_cnn", {"head": "weighted"}, "head.*flatten.*max"),
        ("separable_cnn", {"widths": (8, 0)}, "widths"),
        ("separable_cnn", {"widths": (8,) * 6, "pooled": tuple(range(6))}, "pooled"),
        ("separable_cnn", {"activation": "swish"}, "activation.*hardswish"),
        ("separable_cnn", {"head": "max"}, "head.*weighted"),
        ("ms_ran", {"dropout": math.nan}, "dropout"),
        ("model_v3", {"dropout": -0.1}, "dropout"),
        *((name, {"num_classes": 0}, "num_classes") for name in sorted(MODELS)),
    ],
)
def test_the_error_names_the_argument_of_a_bad_value(name, keywords, named):
    with pytest.raises(ValueError, match=named):
        build_model(name, **keywords)
