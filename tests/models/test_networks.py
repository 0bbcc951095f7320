"""Networks have the documents' sizes and shapes, dropout is exact, every name finds its model or the nearest one."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from mnist_dist.models import MODELS, build_model, count_parameters, find_builder
from mnist_dist.models.layers import (
    Dropout,
    draw_bernoulli_positions,
    most_zeros,
    sparse_dropout,
    sparse_dropout_backward,
)

PARAMETERS = {
    "ms_ran": 443_994,
    "resnet18": 11_175_370,
    "resnet34": 21_283_530,
    "resnet50": 23_522_250,
    "resnet101": 42_514_378,
    "resnet152": 58_158_026,
    "simple_cnn": 21_614,
    "mnistnet": 108_864,
    "model_v1": 7_720,
    "model_v2": 7_730,
    "model_v3": 8_650,
    "lenet5": 61_706,
    "small_cnn": 59_630,
    "patch_cnn": 22_346,
    "separable_cnn": 7_914,
}
QUICK = sorted(set(MODELS) - {"resnet34", "resnet50", "resnet101", "resnet152"})
FORMATS = [torch.contiguous_format, torch.channels_last]


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 1, 28, 28, generator=torch.Generator().manual_seed(0))


# The documents' networks


@pytest.mark.parametrize("name", MODELS)
def test_parameter_count_is_the_documents(name):
    with torch.device("meta"):
        assert count_parameters(build_model(name)) == PARAMETERS[name]


@pytest.mark.parametrize(("width", "hidden", "expected"), [(15, 8, 24_331), (11, 6, 13_223)])
def test_narrow_mnistnet_has_the_claimed_sizes(width, hidden, expected):
    assert count_parameters(build_model("mnistnet", width=width, hidden=hidden)) == expected


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("num_classes", [10, 47])
def test_output_is_one_finite_number_per_class(name, num_classes):
    model = build_model(name, num_classes=num_classes)
    for batch, output in ((2, model.train()(images(2))), (2, model.eval()(images(2))), (1, model.eval()(images(1)))):
        assert output.shape == (batch, num_classes)
        assert output.isfinite().all()


@pytest.mark.parametrize("name", sorted(set(MODELS) - set(QUICK)))
def test_deep_networks_keep_the_shape(name):
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
    # What lets one loss serve every model: cross entropy of log-probabilities is their NLL.
    labels = torch.arange(4)
    assert torch.allclose(F.cross_entropy(output, labels), F.nll_loss(output, labels))


def test_simple_cnn_breakdown_is_the_documents_table():
    breakdown = build_model("simple_cnn").parameter_breakdown()
    assert breakdown == {"initial": 824, "residual1": 480, "transition": 132, "residual2": 936, "classifier": 19_242}


def test_simple_cnn_keeps_no_running_statistics():
    assert not list(build_model("simple_cnn").buffers())


def test_a_weighted_head_of_equal_weights_is_the_mean():
    mean, weighted = (build_model("separable_cnn", activation="hardswish", head=head) for head in ("mean", "weighted"))
    weighted.load_state_dict(mean.state_dict(), strict=False)
    nn.init.constant_(weighted.head[0].weight, 1 / 36)  # of 6×6 places
    weighted.head[1].eps = 0
    images = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(weighted.eval()(images), mean.eval()(images))
    assert count_parameters(weighted) - count_parameters(mean) == 32 * 36 + 2 * 32


@pytest.mark.parametrize(
    ("name", "keywords", "named"),
    [
        ("mnistnet", {"width": 0}, "width"),
        ("mnistnet", {"hidden": -1}, "hidden"),
        ("mnistnet", {"dropout": 1.5}, "dropout"),
        ("ms_ran", {"bottleneck": 0}, "bottleneck"),
        ("patch_cnn", {"widths": (8, 0)}, "widths"),
        ("patch_cnn", {"widths": (8, 8, 8, 8)}, "widths"),
        ("separable_cnn", {"widths": (8, 0)}, "widths"),
        ("separable_cnn", {"widths": (8,) * 6, "pooled": tuple(range(6))}, "pooled"),
        ("separable_cnn", {"activation": "swish"}, "activation must be one of relu, hardswish"),
        ("separable_cnn", {"head": "max"}, "head must be mean or weighted"),
        ("ms_ran", {"dropout": math.nan}, "dropout"),
        ("model_v3", {"dropout": -0.1}, "dropout"),
        *((name, {"num_classes": 0}, "num_classes") for name in sorted(MODELS)),
    ],
)
def test_bad_value_names_its_keyword(name, keywords, named):
    with pytest.raises(ValueError, match=named):
        build_model(name, **keywords)


# Dropout


@pytest.mark.parametrize("p", [0.01, 0.05])
def test_dropout_rate_and_variance_are_bernoulli(p):
    torch.manual_seed(0)
    size, trials = 1000, 3000
    counts = torch.tensor([len(draw_bernoulli_positions(size, p)) for _ in range(trials)], dtype=torch.float64)
    mean, variance = size * p, size * p * (1 - p)
    assert abs(counts.mean() - mean) < 5 * math.sqrt(variance / trials)
    assert abs(counts.var() / variance - 1) < 5 * math.sqrt(2 / trials)


@pytest.mark.parametrize("p", [0.01, 0.05, 0.2])
def test_dropped_places_are_independent_and_uniform(p):
    torch.manual_seed(0)
    size = 2_000_000
    positions = draw_bernoulli_positions(size, p)
    assert positions[0] >= 0 and positions[-1] < size
    gaps = positions.diff()
    assert gaps.min() >= 1
    for distance in (1, 2, 3):  # each gap of a geometric law has its own frequency
        rate = p * (1 - p) ** (distance - 1)
        assert abs((gaps == distance).double().mean() - rate) < 5 * math.sqrt(rate * (1 - rate) / len(gaps))
    dropped = torch.zeros(size, dtype=torch.bool)
    dropped[positions] = True
    pairs = (dropped[1:] & dropped[:-1]).sum()
    assert abs(pairs - size * p**2) < 6 * math.sqrt(size * p**2)
    tenths = dropped.view(10, -1).double().mean(dim=1)
    assert (tenths - p).abs().max() < 5 * math.sqrt(p * (1 - p) / (size / 10))


def test_drawing_goes_on_until_the_end_is_passed(monkeypatch):
    # Tiny gaps make the first round of draws fall short by far.
    monkeypatch.setattr(Tensor, "exponential_", lambda tensor, rate: tensor.zero_())
    assert draw_bernoulli_positions(1000, 0.01).tolist() == list(range(1000))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("gradient_format", FORMATS)
def test_dropout_scales_exactly_and_its_gradient_likewise(dtype, memory_format, gradient_format):
    torch.manual_seed(0)
    layer = Dropout(0.05)
    values = torch.rand(8, 6, 13, 11, dtype=dtype).add(1).contiguous(memory_format=memory_format).requires_grad_()
    gradient = torch.rand(8, 6, 13, 11, dtype=dtype).add(1).contiguous(memory_format=gradient_format)
    output = layer(values)
    output.backward(gradient)
    kept = output != 0
    assert 0 < (~kept).sum() < 0.1 * kept.numel()
    assert output.dtype == dtype and output.is_contiguous(memory_format=memory_format)
    assert torch.equal(output, torch.where(kept, values * (1 / 0.95), 0))
    assert torch.equal(values.grad, torch.where(kept, gradient * (1 / 0.95), 0))


@pytest.mark.parametrize("shape", [(4000,), (50, 80), (8, 5, 100), (4000, 1, 1, 1), (1, 4000, 1, 1), (0, 3, 5, 5)])
def test_dropout_takes_any_shape(shape):
    values = torch.ones(shape, requires_grad=True)
    output = Dropout(0.05)(values)
    output.sum().backward()
    assert torch.equal(output, values.grad)
    assert set(output.unique().tolist()) <= {0.0, torch.tensor(1 / 0.95).item()}


def test_dropout_takes_values_with_holes_and_leaves_them_alone():
    whole = torch.ones(40, 40)
    output = Dropout(0.1)(whole[:, ::2].t())
    assert output.shape == (20, 40) and (output == 0).any()
    assert (whole == 1).all()


def test_dropout_gradient_of_gradient():
    def seeded(values: Tensor) -> Tensor:
        torch.manual_seed(3)
        return Dropout(0.2)(values)

    values = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(seeded, (values,))
    assert torch.autograd.gradgradcheck(seeded, (values,))


@pytest.mark.parametrize("p", [0.01, 0.5])
def test_dropout_follows_the_seed(p):
    values = torch.ones(16, 8, 12, 12)
    layer = Dropout(p)

    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return layer(values)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("gradient_format", FORMATS)
def test_compiled_dropout_is_the_eager_one(memory_format, gradient_format, monkeypatch):
    layer, results = Dropout(0.1), []
    gradient = torch.rand(8, 6, 13, 11).contiguous(memory_format=gradient_format)
    for compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda compiling=compiling: compiling)
        torch.manual_seed(0)
        values = torch.ones(8, 6, 13, 11).contiguous(memory_format=memory_format).requires_grad_()
        output = layer(values)
        output.backward(gradient)
        assert output.is_contiguous(memory_format=memory_format)
        results.append((output, values.grad))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


def test_a_compiled_network_drops_what_the_eager_one_does():
    images, labels = torch.randn(16, 1, 28, 28, dtype=torch.float64), torch.arange(16) % 10
    gradients = []
    for compiled in (False, True):
        torch.manual_seed(0)
        network = build_model("model_v1", dropout=0.05).double().to(memory_format=torch.channels_last)
        if compiled:
            network.compile()
        torch.manual_seed(1)
        torch.nn.functional.cross_entropy(network(images), labels).backward()
        gradients.append([each.grad for each in network.parameters()])
    for eager, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, eager, rtol=1e-9, atol=1e-12)


def test_compiled_dropout_does_what_it_tells_the_compiler():
    values = torch.rand(4, 3, 5, 5, requires_grad=True).contiguous(memory_format=torch.channels_last)
    for utility in ("test_schema", "test_autograd_registration", "test_faketensor"):
        torch.library.opcheck(sparse_dropout, (values, 0.1, True), test_utils=utility)
    nothing_dropped = torch.full((most_zeros(3, 0.01),), -1)
    assert torch.equal(sparse_dropout_backward(torch.ones(3), nothing_dropped, 0.5, False), torch.full((3,), 2.0))


def test_dropout_is_an_identity_in_evaluation_and_at_zero():
    values = torch.randn(4, 3, 5, 5)
    assert Dropout(0.3).eval()(values) is values
    assert Dropout(0.0)(values) is values


def test_dropout_under_autocast_meta_and_export():
    network = nn.Sequential(nn.Conv2d(1, 4, 3), Dropout(0.05))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = network(images())
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert network[0].weight.grad is not None
    assert Dropout(0.05)(torch.empty(2, 3, device="meta")).shape == (2, 3)
    program = torch.export.export(network.eval(), (images(),))
    assert torch.equal(program.module()(images()), network(images()))


# Names


@pytest.mark.parametrize("name", ["mobilenet_v2", "efficientnet_b0"])
def test_torchvision_models_take_grey_images(name):
    model = build_model(f"torchvision/{name}", num_classes=7).eval()
    assert model(images()).shape == (2, 7)


def test_grey_convolution_equals_the_colour_one_on_equal_channels():
    torch.manual_seed(0)
    colour = torchvision.models.mobilenet_v2(weights=None, num_classes=10).eval()
    torch.manual_seed(0)
    grey = build_model("torchvision/mobilenet_v2").eval()
    assert torch.allclose(grey(images()), colour(images().expand(-1, 3, -1, -1)), atol=1e-5)


def test_torchvision_keywords_pass_through_and_wrong_ones_are_refused():
    model = build_model("torchvision/mobilenet_v2", width_mult=0.25)
    assert count_parameters(model) < count_parameters(build_model("torchvision/mobilenet_v2"))
    with pytest.raises(ValueError, match="width_mul"):
        build_model("torchvision/mobilenet_v2", width_mul=0.25)


def test_timm_models_take_grey_images():
    pytest.importorskip("timm", reason="timm is not installed: pip install timm")
    assert build_model("timm/resnet18").eval()(images()).shape == (2, 10)
    assert build_model("timm/vit_tiny_patch16_224", patch_size=4, depth=1).eval()(images()).shape == (2, 10)
    with pytest.raises(ValueError, match="resnet18"):
        find_builder("timm/resnet81")


def test_missing_timm_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match="pip install timm"):
        find_builder("timm/resnet18")


@pytest.fixture
def nets(tmp_path, monkeypatch):
    (tmp_path / "reader_nets.py").write_text(
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
    sys.modules.pop("reader_nets", None)


def test_a_readers_own_model_is_imported_from_the_current_directory(nets):
    assert build_model("reader_nets:Wide", num_classes=4, units=5)(images()).shape == (2, 4)
    assert build_model("reader_nets:fixed", num_classes=4)(images()).shape == (2, 10)


@pytest.mark.parametrize(
    ("name", "keywords", "said"),
    [
        ("reader_nets:Wild", {}, "Wide"),
        ("reader_nets:Wide", {}, "units"),
        ("reader_nets:Wide", {"unit": 5}, "did you mean 'units'"),
        ("reader_nets:fixed", {"units": 5}, "none"),
        ("reader_nets:no_model", {}, "not a torch.nn.Module"),
        ("no_such_package.nets:Net", {}, "start from the folder"),
        (":Net", {}, "start from the folder"),
    ],
)
def test_a_wrong_dotted_name_says_what_to_do(nets, name, keywords, said):
    with pytest.raises(ValueError, match=said):
        build_model(name, **keywords)


@pytest.mark.parametrize(
    ("name", "keywords", "said"),
    [
        ("resnet81", {}, "did you mean 'resnet18'.*known: ms_ran, .*small_cnn"),
        ("LeNet-5", {}, "did you mean 'lenet5'"),
        ("torchvision/mobilnet_v2", {}, "did you mean 'mobilenet_v2'"),
        ("mnistnet", {"widht": 8}, "did you mean 'width'.*width, hidden, dropout"),
        ("resnet18", {"dropout": 0.1}, "its keywords: none"),
    ],
)
def test_unknown_names_and_keywords_name_the_nearest(name, keywords, said):
    with pytest.raises(ValueError, match=said):
        build_model(name, **keywords)
