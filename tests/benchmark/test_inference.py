"""The measurement of inference: all backends compute the same logits, and each batch size is measured."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from mnist_dist.benchmark import __main__ as benchmark
from mnist_dist.benchmark import inference

_sessions: list[Any] = []


@pytest.fixture
def session(setup_of) -> Any:
    """The network of `debug` in ONNX Runtime, exported once with two images; None without the packages."""
    if inference.HAS_ONNX and not _sessions:
        _sessions.append(inference.onnx_session(setup_of()))
    return _sessions[0] if _sessions else None


def test_all_backends_compute_the_same_logits(setup_of, session):
    setup = setup_of()
    images = setup.dataset.test.normalize(setup.dataset.test.images[:3]).to(setup.state.device)
    backends = inference.torch_backends(setup, images)
    eager = backends["eager, fp32"]()
    assert eager.shape == (3, 10)
    others = {name: call() for name, call in backends.items() if "captured" not in name}
    if session is not None:
        [(name, call)] = inference.onnx_backend(session, images).items()
        others[name] = torch.from_numpy(call()[0]).to(eager.device)
    for logits in others.values():
        torch.testing.assert_close(logits, eager, rtol=1e-3, atol=1e-4)


def test_each_batch_size_is_measured(session, tmp_path, monkeypatch):
    monkeypatch.setattr(inference, "onnx_session", lambda setup: session)
    files = [f"--json={tmp_path / 'a.json'}", f"--markdown={tmp_path / 'a.md'}"]
    words = ["--recipe", "debug", "--inference", "--batches", "1,300", "--rounds", "2", "--steps", "2", *files]
    assert benchmark.main(words) == 0
    result = json.loads((tmp_path / "a.json").read_text())
    assert list(result["ms_per_call"]) == ["1", "300"]
    for backends in result["ms_per_call"].values():
        assert "eager, fp32" in backends and any("ONNX" in name for name in backends) == inference.HAS_ONNX
        assert all(0 < ms["min"] <= ms["median"] <= ms["max"] for ms in backends.values())
    eager = result["ms_per_call"]["300"]["eager, fp32"]["median"]
    text = (tmp_path / "a.md").read_text()
    assert f"| 300 | eager, fp32 | {eager:,.3f} |" in text
    assert f"| {1000 * eager / 300:,.1f} |" in text


def test_a_network_that_cannot_be_exported_is_measured_in_pytorch(tmp_path, monkeypatch, capsys):
    (tmp_path / "nets_of_choice.py").write_text(
        "from torch import nn\n\nclass Chooses(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.out = nn.Linear(784, 10)\n\n    def forward(self, images):\n"
        "        logits = self.out(images.flatten(1))\n        return logits if logits.sum() > 1e9 else 2 * logits\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    words = ["--inference", "--batches", "2", "--rounds", "1", "--steps", "1", f"--json={tmp_path / 'a.json'}"]
    assert benchmark.main(["--recipe", "debug", "model.name=nets_of_choice:Chooses", *words]) == 0
    assert list(json.loads((tmp_path / "a.json").read_text())["ms_per_call"]["2"]) == ["eager, fp32"]
    assert ("nets_of_choice:Chooses" in capsys.readouterr().err) == inference.HAS_ONNX
