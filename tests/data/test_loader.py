"""The loader gives each process the images, labels and random changes of its rows, at any number of processes."""

import threading
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mnist_dist.data import Augmentation, Batch, Batches, EpochPlan, Images, Loader
from mnist_dist.data import loader as loader_module
from mnist_dist.data.batches import CHUNK, piece

COUNT = 200


def noise(count: int = COUNT) -> Images:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return Images(images, torch.randint(0, 10, (count,), generator=generator), tuple("0123456789"))


def loader_of(data: Images, rank: int = 0, world_size: int = 1) -> Loader:
    return Loader(data, lambda size: piece(size, rank, world_size))


@pytest.mark.parametrize("world_size", [1, 3])
def test_the_batches_of_all_processes_are_the_global_batch(world_size):
    data, batches = noise(), Batches(COUNT, 32, 5, (3, 8, 8), Augmentation(rotation=10))
    loaders = [loader_of(data, rank, world_size) for rank in range(world_size)]
    for epoch, index in [(0, 0), (0, 1), (0, 6), (1, 3), (0, 2)]:
        plan = batches.plan(epoch)
        rows, parts = batches.rows(plan, index), [each.load(batches, plan, index) for each in loaders]
        assert torch.equal(torch.cat([each.images for each in parts]), data.images[rows])
        assert torch.equal(torch.cat([each.labels for each in parts]), data.labels[rows])
        assert torch.equal(torch.cat([each.changes for each in parts]), batches.changes(epoch, rows))
        assert {each.size for each in parts} == {len(rows)}
        assert [each.start for each in parts] == [piece(len(rows), rank, world_size)[0] for rank in range(world_size)]


def test_random_changes_are_drawn_for_a_bounded_number_of_samples(monkeypatch):
    counts: list[int] = []
    draw = Batches.changes

    def counted(self: Batches, epoch: int, rows: Tensor) -> Tensor | None:
        counts.append(len(rows))
        return draw(self, epoch, rows)

    monkeypatch.setattr(Batches, "changes", counted)
    count = 3 * CHUNK
    data = Images(torch.zeros(count, 1, 1, 1, dtype=torch.uint8), torch.zeros(count, dtype=torch.int64), ("a",))
    batches = Batches(count, 100, 0, (1, 1, 1), Augmentation(rotation=10))
    loader, plan = loader_of(data), batches.plan(0)
    for index in range(batches.steps_per_epoch):
        loader.load(batches, plan, index)
    assert sum(counts) == count and max(counts) <= CHUNK and len(counts) < 6


def test_other_batches_and_other_plans_give_other_changes():
    data = noise()
    one, other = (Batches(COUNT, 32, seed, (3, 8, 8), Augmentation(rotation=10)) for seed in (0, 1))
    loader = loader_of(data)
    for batches, epoch in [(one, 0), (other, 0), (one, 1), (one, 0)]:
        found = loader.load(batches, batches.plan(epoch), 0)
        assert torch.equal(found.changes, batches.changes(epoch, batches.rows(batches.plan(epoch), 0)))


@pytest.mark.parametrize(("count", "sizes"), [(1, [7]), (2, [4, 3]), (7, [1] * 7), (9, [1] * 7 + [0] * 2)])
def test_a_batch_splits_into_consecutive_pieces(count, sizes):
    data, batches = noise(7), Batches(7, 7, 0, (3, 8, 8), Augmentation(rotation=10))
    batch = loader_of(data).load(batches, batches.plan(0), 0)
    pieces = batch.split(count)
    assert [len(each) for each in pieces] == sizes
    assert [each.start for each in pieces] == [sum(sizes[:number]) for number in range(count)]
    for name in ("images", "labels", "changes"):
        assert torch.equal(torch.cat([getattr(each, name) for each in pieces]), getattr(batch, name))


# --- several batches at once, as on a GPU --------------------------------------------------------------------------

MIXED = Augmentation(flip=True, crop_padding=1, rotation=10, brightness=0.2, mixup=0.2, cutmix=1.0)


@pytest.mark.parametrize("augmentation", [None, Augmentation(rotation=10, elastic=1), MIXED])
@pytest.mark.parametrize("world_size", [1, 3])
def test_prepared_batches_hold_what_a_step_computes_from_the_others(monkeypatch, augmentation, world_size):
    data, batches = replace(noise(), mean=(0.1,) * 3, std=(0.2,) * 3), Batches(COUNT, 32, 5, (3, 8, 8), augmentation)
    monkeypatch.setattr(loader_module, "BLOCK_BYTES", 100 * 4 * 3 * 8 * 8)  # fewer images than an epoch
    for rank in range(world_size):
        plain, prepared = (loader_of(data, rank, world_size) for _ in range(2))
        prepared.prepares = True
        for epoch, index in [(0, 0), (0, 1), (0, 6), (1, 3), (0, 2), (0, 3), (0, 4)]:
            found, batch = (each.load(batches, batches.plan(epoch), index) for each in (prepared, plain))
            assert found.is_prepared and not batch.is_prepared
            assert (found.size, found.start, len(found)) == (batch.size, batch.start, len(batch))
            torch.testing.assert_close(found.images, data.normalize(batches.augmented(batch)), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(batches.targets(found, 10), batches.targets(batch, 10))


def test_a_block_is_prepared_once(monkeypatch):
    prepared: list[range] = []
    prepare = Loader._prepare_block

    def counted(self: Loader, batches: Batches, plan: EpochPlan, indices: range) -> list[Batch]:
        prepared.append(indices)
        return prepare(self, batches, plan, indices)

    monkeypatch.setattr(Loader, "_prepare_block", counted)
    monkeypatch.setattr(loader_module, "BLOCK_BYTES", 96 * 4 * 3 * 8 * 8)
    batches, loader = Batches(COUNT, 32, 5, (3, 8, 8)), loader_of(noise())
    loader.prepares = True
    for epoch in range(2):
        plan = batches.plan(epoch)
        for index in range(batches.steps_per_epoch):
            loader.load(batches, plan, index)
    assert prepared == 2 * [range(0, 3), range(3, 6), range(6, 7)]


# --- one batch ahead ----------------------------------------------------------------------------------------------


def assert_same_batch(found: Batch, expected: Batch) -> None:
    assert (found.size, found.start) == (expected.size, expected.start)
    for name in ("images", "labels", "changes"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


@pytest.mark.parametrize("world_size", [1, 3])
def test_batches_loaded_ahead_are_those_loaded_at_once(world_size):
    data, batches = noise(), Batches(COUNT, 64, 5, (3, 8, 8), Augmentation(rotation=10))
    other = replace(batches, seed=6)
    for rank in range(world_size):
        at_once = loader_of(data, rank, world_size)
        ahead = Loader(data, lambda size, rank=rank: piece(size, rank, world_size), ahead=True)
        steps = [(batches, number) for number in range(10)]  # two and a half epochs, each with a short last batch
        jumps = [(batches, 2), (batches, 1), (other, 1), (other, 2), (batches, 3), (batches, 4)]
        for each, number in steps + jumps:
            epoch, index = divmod(number, each.steps_per_epoch)
            assert_same_batch(ahead.load(each, each.plan(epoch), index), at_once.load(each, each.plan(epoch), index))


def test_a_batch_of_a_plan_with_another_order_is_not_the_one_loaded_ahead():
    data, batches = noise(), Batches(COUNT, 64, 5, (3, 8, 8))
    loader, plan = Loader(data, range, ahead=True), batches.plan(0)
    loader.load(batches, plan, 0)
    reversed_plan = EpochPlan(0, plan.order.flip(0))
    found = loader.load(batches, reversed_plan, 1)
    assert torch.equal(found.images, data.images[batches.rows(reversed_plan, 1)])


def test_every_batch_after_the_first_is_gathered_before_it_is_asked_for(monkeypatch):
    gathered: list[tuple[int, int, str]] = []
    gather = Loader._gather_rows

    def counted(self: Loader, batches: Batches, plan: EpochPlan, index: int):
        gathered.append((plan.epoch, index, threading.current_thread().name))
        return gather(self, batches, plan, index)

    monkeypatch.setattr(Loader, "_gather_rows", counted)
    batches = Batches(COUNT, 64, 5, (3, 8, 8))
    loader = Loader(noise(), range, ahead=True)
    for number in range(9):
        epoch, index = divmod(number, 4)
        loader.load(batches, batches.plan(epoch), index)
        assert loader._ahead is not None
        loader._ahead.future.result()
        assert (loader._ahead.epoch, loader._ahead.index) == divmod(number + 1, 4)
    assert [entry[:2] for entry in gathered] == [divmod(number, 4) for number in range(10)], "none is gathered twice"
    assert {name for *_, name in gathered} == {"loader_0"}


def test_an_error_of_the_thread_reaches_the_caller(monkeypatch):
    batches = Batches(COUNT, 64, 5, (3, 8, 8))
    loader = Loader(noise(), range, ahead=True)
    loader.load(batches, batches.plan(0), 0)
    loader._ahead.future.result()

    def fail(*arguments):
        raise OSError("the disk is gone")

    monkeypatch.setattr(Loader, "_gather", fail)
    loader.load(batches, batches.plan(0), 1)
    with pytest.raises(OSError, match="gone"):
        loader.load(batches, batches.plan(0), 2)
