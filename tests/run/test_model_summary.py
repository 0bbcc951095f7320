"""The summary of a network: layers, parameters and multiply-adds."""

from __future__ import annotations

import torch
from torch import nn

from mnist_dist.run.model_summary import summarize_model


def summary_rows(text):
    """Returns {layer: the other cells}. Two or more spaces separate cells."""
    lines = text.splitlines()
    first, last = (index for index, line in enumerate(lines) if line and not line.strip("-"))
    rows = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines[first + 1 : last]]
    return {row[0]: row[1:] for row in rows}


def total_of(text, name):
    (line,) = [line for line in text.splitlines() if line.startswith(name + "  ")]
    return line.removeprefix(name).strip()


class Net(nn.Module):
    """Layers in another order than called, a tuple as output, a shared layer, and a parameter outside all layers."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 10)
        self.mix = nn.Linear(8, 8, bias=False)
        self.features = nn.Sequential(nn.Conv2d(1, 4, 5, stride=2), nn.BatchNorm2d(4), nn.ReLU())
        self.grouped = nn.Conv2d(4, 8, 3, groups=2)
        self.recurrent = nn.LSTM(100, 8, batch_first=True)
        self.scale = nn.Parameter(torch.ones(3))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        x = self.grouped(self.features(x)).flatten(2)
        x, _ = self.recurrent(x)
        x = self.dropout(x[:, -1] + torch.randn_like(x[:, -1]))
        return self.head(self.mix(self.mix(x))) * self.scale[0]


def test_it_lists_layers_in_call_order_with_exact_counts():
    rows = summary_rows(summarize_model(Net()))
    called = ["features.0", "features.1", "features.2", "grouped", "recurrent", "dropout", "mix", "head", "(elsewhere)"]
    assert list(rows) == called
    # 12 × 12 outputs in 4 channels, each a product with 1 × 5 × 5 weights.
    assert rows["features.0"] == ["Conv2d", "(N, 4, 12, 12)", "104", "14,400"]
    assert rows["features.1"] == ["BatchNorm2d", "(N, 4, 12, 12)", "8", "0"]
    # 10 × 10 outputs in 8 channels, each of two of the four channels: 2 × 3 × 3 weights.
    assert rows["grouped"] == ["Conv2d", "(N, 8, 10, 10)", "152", "14,400"]
    assert rows["recurrent"][:2] == ["LSTM", "(N, 8, 8), (1, 2, 8), (1, 2, 8)"]
    assert rows["mix"] == ["Linear", "(N, 8)", "0", "64"], "the second call of a shared layer adds no parameters"
    assert rows["head"] == ["Linear", "(N, 10)", "90", "80"]
    assert rows["(elsewhere)"][1:] == ["-", "3", "-"]


def test_totals_are_those_of_the_model():
    model = Net()
    model.features.requires_grad_(False)
    text = summarize_model(model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert total_of(text, "Parameters") == f"{parameters:,}"
    assert total_of(text, "Trainable parameters") == f"{parameters - 104 - 8:,}"
    assert total_of(text, "Multiply-adds") == "29,008 (0.03 M) per image"
    assert total_of(text, "Weights") == f"{4 * parameters / 1e6:.2f} MB as float32"
    assert "convolutions and linear layers only" in text


def test_tied_weights_count_once():
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 16, bias=False), nn.Linear(16, 784, bias=False))
    model.append(nn.Linear(784, 16, bias=False))
    model[3].weight = model[1].weight
    text = summarize_model(model)
    assert total_of(text, "Parameters") == f"{2 * 784 * 16:,}"
    assert total_of(text, "Multiply-adds").startswith(f"{3 * 784 * 16:,} ")


def test_a_layer_with_several_rows_per_image_counts_them_all():
    patches = nn.Sequential(nn.Unflatten(2, (7, 4)), nn.Flatten(0, 2), nn.Linear(28, 5))
    rows = summary_rows(summarize_model(patches))
    assert rows["2"] == ["Linear", "(7N, 4, 5)", "145", f"{28 * 28 * 5:,}"]


def test_mode_hooks_weights_and_random_numbers_are_unchanged():
    model = Net().train()
    model.features.eval()
    seen = []
    model.head.register_forward_hook(lambda *_: seen.append("called"))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    summarize_model(model)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert not seen
    assert [len(module._forward_hooks) for module in model.modules() if module._forward_hooks] == [1]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_half_precision_and_other_input_shapes_work():
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.AdaptiveAvgPool2d(1)).to(torch.bfloat16)
    text = summarize_model(model, input_shape=(3, 32, 32))
    assert text.startswith("Sequential on (N, 3, 32, 32)\n")
    assert total_of(text, "Multiply-adds").startswith(f"{3 * 2 * 32 * 32:,} ")
    assert model[0].weight.dtype == torch.bfloat16


def test_a_model_that_cannot_run_is_listed_with_the_error():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 4))
    text = summarize_model(model)
    assert summary_rows(text) == {"0": ["Flatten", "-", "0", "-"], "1": ["Linear", "-", "16", "-"]}
    assert total_of(text, "Parameters") == "16"
    assert total_of(text, "Multiply-adds") == "not measured"
    assert "could not be run (RuntimeError: " in text.splitlines()[-1]
    # Lazy layers that were not reached have no parameters yet.
    assert total_of(summarize_model(model.append(nn.LazyLinear(3))), "Parameters") == "16"


def test_the_model_runs_in_evaluation_mode_without_gradients():
    class EvaluationOnly(nn.Linear):
        def forward(self, x):
            assert not self.training and not torch.is_grad_enabled()
            return super().forward(x)

    assert "could not be run" not in summarize_model(EvaluationOnly(28, 2))


def test_lazy_layers_and_a_model_that_cannot_be_copied_work():
    lazy = nn.Sequential(nn.Flatten(), nn.LazyLinear(3))
    assert total_of(summarize_model(lazy), "Parameters") == f"{784 * 3 + 3:,}"
    assert isinstance(lazy[1], nn.LazyLinear) and lazy[1].has_uninitialized_params()

    model = nn.Linear(2, 2)
    model.derived = model.weight * 2  # deepcopy refuses a tensor that is part of a graph
    text = summarize_model(model)
    assert total_of(text, "Parameters") == "6"
    assert "could not be run" in text
