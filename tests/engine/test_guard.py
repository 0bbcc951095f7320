"""A bad step is undone, with and without the help of the host."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mnist_dist.engine.checkpoint import save_weights
from mnist_dist.engine.guard import Guard, UpdateGuard
from mnist_dist.engine.optimizers import OPTIMIZERS, build_optimizer
from mnist_dist.models import build_model

NAN, INF = float("nan"), float("inf")
KEYWORDS = {"sgd": {"momentum": 0.9, "dampening": 0.5, "fused": False}, "rmsprop": {"momentum": 0.9}}


def tensors() -> list[Tensor]:
    layouts = torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last)
    return [torch.rand(3, dtype=torch.float64), torch.tensor(5), torch.rand(2, 3), torch.tensor([True, False]), layouts]


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("stays_set", [False, True])
def test_a_bad_step_leaves_every_tensor_as_it_was(on_device, stays_set):
    torch.manual_seed(0)
    guarded = tensors()
    objects, start = list(guarded), [each.clone() for each in guarded]
    guard = Guard(guarded[0], guarded[1:], stays_set=stays_set, joins=on_device)
    assert all(torch.equal(now, before) for now, before in zip(guarded, start, strict=True))
    bad_steps = 0
    for gradients in ([1.0, 2.0], [1.0, NAN], [1.0, 2.0], [-INF, 0.0], [3.0, 3.0]):
        bad_steps += is_bad(gradients) or (stays_set and bad_steps > 0)
        before = [each.clone() for each in guarded]
        guard.store()
        for each in guarded:
            each.copy_(~each if each.dtype == torch.bool else each + (NAN if each.is_floating_point() else 1))
        find(guard, gradients, on_device)
        guard.undo()
        undone = is_bad(gradients) or (stays_set and bad_steps > 0)
        assert bool(guard.bad) == undone
        assert not on_device or float(guard.found_inf) == undone
        for now, old in zip(guarded, before, strict=True):
            assert torch.equal(now, old) if undone else not torch.equal(now, old)
            now.copy_(old)
        assert guard.skipped == bad_steps
    assert all(one is other for one, other in zip(guarded, objects, strict=True))
    assert [now.stride() for now in guarded] == [before.stride() for before in start]


def is_bad(gradients: list[float]) -> bool:
    return not all(abs(each) < INF for each in gradients)


def find(guard: Guard, gradients: list[float], on_device: bool) -> None:
    values = [torch.tensor([each]) for each in gradients]
    if on_device:
        guard.find_on_device([*values, torch.ones(2, dtype=torch.float64)])
        assert [float(each) for each in values if each.isfinite()] == [each for each in gradients if abs(each) < INF]
    else:
        guard.find(torch.nn.utils.get_total_norm(values))


def test_take_counts_the_bad_steps_since_the_last_call():
    guard = Guard(torch.zeros(1), [], stays_set=True, joins=True)
    for gradient, count in ((NAN, 3), (1.0, 0), (INF, 2)):
        for _ in range(count):
            guard.store()
            find(guard, [gradient], on_device=True)
            guard.undo()
        assert bool(guard.bad) == (count > 0) and guard.take() == count
        assert not guard.bad and not guard.found_inf
    assert guard.skipped == 5


@pytest.mark.parametrize("bad_steps", [(0,), (1,), (0, 1, 3), (2, 3)], ids=str)
@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_a_bad_update_of_any_optimizer_changes_nothing(name, bad_steps):
    check_bad_updates(name, bad_steps, "cpu")


@pytest.mark.parametrize("name", ["lion", "muon", "sgd"])
def test_a_gpu_undoes_a_bad_update(gpu, name):
    check_bad_updates(name, (0, 2, 3), gpu)


def check_bad_updates(name: str, bad_steps: tuple[int, ...], device: str | torch.device) -> None:
    """One optimizer makes the good steps only; another one makes all steps, of which the bad ones are undone."""
    modules = [torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3))).to(device)]
    modules.append(copy.deepcopy(modules[0]))
    expected, found = (build_optimizer(module, name, lr=0.1, **KEYWORDS.get(name, {})) for module in modules)
    guard = UpdateGuard(found)
    for step in range(5):
        gradients = [torch.randn_like(each) for each in modules[0].parameters()]
        for module in modules:
            for parameter, gradient in zip(module.parameters(), gradients, strict=True):
                parameter.grad = torch.full_like(gradient, NAN) if step in bad_steps else gradient.clone()
        if step not in bad_steps:
            expected.step()
        guard.store()
        found.step()
        guard.undo(torch.tensor(step in bad_steps, device=device))
        for parameter, other in zip(*(module.parameters() for module in modules), strict=True):
            assert torch.equal(parameter, other)
            state, other_state = expected.state.get(parameter, {}), found.state.get(other, {})
            assert state.keys() == other_state.keys()
            assert all(
                torch.equal(value, other_state[key]) for key, value in state.items() if isinstance(value, Tensor)
            )


def test_a_network_with_guarded_buffers_can_be_saved(tmp_path):
    check_saving(tmp_path, "cpu")


def test_a_network_with_guarded_buffers_on_a_gpu_can_be_saved(gpu, tmp_path):
    check_saving(tmp_path, gpu)


def check_saving(tmp_path: Path, device: str | torch.device) -> None:
    module = build_model("model_v1").to(device)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    Guard(torch.zeros(3, dtype=torch.float64, device=device), list(module.buffers()), stays_set=True, joins=True)
    assert {each.dtype for each in module.buffers()} == {torch.float32, torch.int64}
    torch.save(module.state_dict(), tmp_path / "checkpoint.pt")
    save_weights(tmp_path / "weights.safetensors", module.state_dict(), {})
    for loaded in (torch.load(tmp_path / "checkpoint.pt"), load_file(tmp_path / "weights.safetensors")):
        assert loaded.keys() == before.keys()
        assert all(torch.equal(loaded[name].to(device), value) for name, value in before.items())
