"""The loader gives each process the images, labels and random changes of its rows, at any number of processes."""

import pytest
import torch
from torch import Tensor

from mnist_dist.data import Augmentation, Batches, Images, Loader
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
