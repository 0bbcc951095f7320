"""Gradient reduction in the dtypes that the recipe offers."""

from __future__ import annotations

from tests.distributed.training import relative_deviations, train_in_world


def test_gradients_may_be_sent_in_half_precision(tmp_path):
    words = ["--recipe", "lenet5", "data.dataset=synthetic", "max_steps=5", "log_every=1"]
    words += ["data.limit_train=640", "data.limit_test=100"]
    hooks = ("none", "bf16", "fp16")
    full, *half = (train_in_world(2, tmp_path / name, *words, f"ddp.comm_hook={name}") for name in hooks)
    for metrics in half:
        assert 0 < max(relative_deviations(full, metrics)) < 1e-2
