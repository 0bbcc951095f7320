"""A bad step is undone, with and without the help of the host."""

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mnist_dist.engine.checkpoint import save_weights
from mnist_dist.engine.guard import Guard
from mnist_dist.models import build_model

NAN, INF = float("nan"), float("inf")


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


def test_a_network_with_guarded_buffers_can_be_saved(tmp_path):
    module = build_model("model_v1")
    before = {name: value.clone() for name, value in module.state_dict().items()}
    Guard(torch.zeros(3, dtype=torch.float64), list(module.buffers()), stays_set=True, joins=True)
    assert {each.dtype for each in module.buffers()} == {torch.float32, torch.int64}
    torch.save(module.state_dict(), tmp_path / "checkpoint.pt")
    save_weights(tmp_path / "weights.safetensors", module.state_dict(), {})
    for loaded in (torch.load(tmp_path / "checkpoint.pt"), load_file(tmp_path / "weights.safetensors")):
        assert loaded.keys() == before.keys()
        assert all(torch.equal(loaded[name], value) for name, value in before.items())
