"""Order, rows and random numbers are pure functions of seed, epoch, step and sample, for any number of processes."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mnist_dist.data import Augmentation, Batches, EpochPlan, derive_seed
from mnist_dist.data.batches import _hash, _hash_with, uniform

INT64 = st.integers(-(2**63), 2**63 - 1)


def batches_of(batches: Batches, plan: EpochPlan) -> list[Tensor]:
    return [batches.rows(plan, index) for index in range(batches.steps_per_epoch)]


# --- the order of an epoch ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_samples", "batch_size"), [(1, 1), (10, 3), (12, 4), (10, 16), (1000, 128)])
def test_an_epoch_contains_every_sample_once(num_samples, batch_size):
    batches = Batches(num_samples, batch_size, seed=3)
    seen = torch.cat(batches_of(batches, batches.plan(epoch=2)))
    assert seen.dtype == torch.int64
    assert seen.sort().values.tolist() == list(range(num_samples))


def test_order_differs_between_epochs_and_seeds():
    orders = {(seed, epoch): Batches(100, 10, seed).plan(epoch).order for seed in range(4) for epoch in range(4)}
    for one, other in itertools.combinations(orders, 2):
        assert not torch.equal(orders[one], orders[other]), f"(seed, epoch) {one} and {other} have the same order"


def test_order_depends_on_seed_and_epoch_only():
    torch.manual_seed(1)
    expected = Batches(100, 10, seed=5).plan(epoch=3).order
    torch.manual_seed(2)
    torch.rand(7)
    state = torch.get_rng_state()
    again = Batches(100, 33, seed=5, augmentation=Augmentation(rotation=10)).plan(epoch=3).order
    assert torch.equal(again, expected)
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"


def test_order_is_not_nearly_sorted():
    order = Batches(10_000, 10, seed=0).plan(0).order.double()
    correlation = torch.corrcoef(torch.stack([order, torch.arange(10_000).double()]))[0, 1]
    assert abs(correlation) < 5 / math.sqrt(10_000)


# --- global batches and the rows of each process ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_samples", "batch_size", "steps", "last"),
    [(60_000, 128, 469, 96), (10, 5, 2, 5), (10, 16, 1, 10), (7, 3, 3, 1), (1, 1, 1, 1)],
)
def test_the_last_batch_contains_the_remaining_samples(num_samples, batch_size, steps, last):
    batches = Batches(num_samples, batch_size, seed=0)
    assert batches.steps_per_epoch == steps
    sizes = [batches.size(index) for index in range(steps)]
    assert sizes == [batch_size] * (steps - 1) + [last]
    assert [len(rows) for rows in batches_of(batches, batches.plan(0))] == sizes


@pytest.mark.parametrize("world_size", range(1, 8))
@pytest.mark.parametrize("batch_size", [1, 2, 7, 10, 32])
def test_the_rows_of_all_ranks_in_order_are_the_global_batch(batch_size, world_size):
    batches = Batches(45, batch_size, seed=1)
    plan = batches.plan(0)
    for index in range(batches.steps_per_epoch):
        pieces = [batches.rows(plan, index, rank=rank, world_size=world_size) for rank in range(world_size)]
        assert torch.equal(torch.cat(pieces), plan.order[index * batch_size : (index + 1) * batch_size])
        sizes = [len(piece) for piece in pieces]
        assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)


# --- random changes -----------------------------------------------------------------------------------------------


def test_there_are_no_changes_without_augmentation():
    rows = torch.arange(10)
    assert Batches(10, 5, seed=0).changes(0, rows) is None
    assert Batches(10, 5, seed=0, augmentation=Augmentation(scale=(1.0, 1.0))).changes(0, rows) is None


@pytest.mark.parametrize(
    "words", [{"rotation": 10, "translation": 0.1, "scale": (0.9, 1.1), "shear": 5}, {"elastic": 1}]
)
def test_a_change_depends_on_seed_epoch_and_sample_only(words):
    augmentation = Augmentation(**words)

    def changes(seed: int, epoch: int, rows: Tensor) -> Tensor:
        return Batches(5000, 10, seed, augmentation=augmentation).changes(epoch, rows)

    rows = torch.randperm(5000, generator=torch.Generator().manual_seed(0))
    expected = changes(0, 0, rows)
    for size in (1, 2, 3, 7, 16, 31, 100, 128, 4097):  # a vectorised sine must not depend on the position
        assert torch.equal(changes(0, 0, rows[:size]), expected[:size]), size
    for seed, epoch in [(0, 1), (1, 0)]:
        assert (changes(seed, epoch, rows) != expected).any(dim=1).all()


def test_elastic_changes_extend_the_affine_ones():
    rows, augmentation = torch.arange(60), Augmentation(rotation=10, translation=0.1, scale=(0.9, 1.1), shear=5)
    plain = Batches(60, 7, 0, augmentation=augmentation).changes(0, rows)
    elastic = Batches(60, 7, 0, augmentation=replace(augmentation, elastic=1.0)).changes(0, rows)
    assert torch.equal(elastic.view(60, 2, -1)[:, :, :3], plain.view(60, 2, 3))
    assert elastic.view(60, 2, -1)[:, :, 3:].unique(dim=0).shape == (60, 2, 64)


# --- random numbers per sample ------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(0, 2**63 - 1), st.integers(0, 10_000), st.lists(st.integers(0, 69_999), min_size=1, max_size=20))
def test_uniform_does_not_depend_on_the_other_samples_and_columns(seed, epoch, indices):
    at_once = uniform(seed, epoch, torch.tensor(indices), 5)
    for index, row in zip(indices, at_once, strict=True):
        assert torch.equal(uniform(seed, epoch, torch.tensor([index]), 5)[0], row)
    assert torch.equal(uniform(seed, epoch, torch.tensor(indices), 2), at_once[:, :2])


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (1, 7), (2**63 - 1, 3)])
def test_uniform_is_uniform_and_independent(seed, epoch):
    count, columns = 60_000, 5
    samples = torch.arange(count)
    draws = uniform(seed, epoch, samples, columns)
    assert draws.shape == (count, columns)
    assert draws.dtype == torch.float32
    assert draws.min() >= 0
    assert draws.max() < 1

    draws = draws.double()
    five_sigma = 5 / math.sqrt(count)
    assert (draws.mean(dim=0) - 1 / 2).abs().max() < five_sigma * math.sqrt(1 / 12)
    # The standard deviation of a variance follows from the fourth central moment, which is 1/80 here.
    assert (draws.var(dim=0) - 1 / 12).abs().max() < five_sigma * math.sqrt(1 / 80 - 1 / 144)
    others = {
        "its own columns": draws,
        "the next sample": draws.roll(1, dims=0),
        "the next epoch": uniform(seed, epoch + 1, samples, columns).double(),
        "another seed": uniform(seed ^ 1, epoch, samples, columns).double(),
    }
    for name, other in others.items():
        correlation = torch.corrcoef(torch.cat([draws, other], dim=1).T)[:columns, columns:]
        if other is draws:
            correlation = correlation - torch.eye(columns)
        assert correlation.abs().max() < five_sigma, f"correlated with {name}"


def test_pairs_of_numbers_fill_the_square_evenly():
    draws = uniform(0, 0, torch.arange(60_000), 2)
    cells = (draws * 16).long()
    counts = torch.bincount(cells[:, 0] * 16 + cells[:, 1], minlength=256).double()
    expected = 60_000 / 256
    chi_squared = float(((counts - expected) ** 2 / expected).sum())
    assert abs(chi_squared - 255) < 5 * math.sqrt(2 * 255)


def test_uniform_does_not_depend_on_its_internal_chunks():
    at_once = uniform(3, 1, torch.arange(10_000), 7)
    assert torch.equal(at_once[4090:4100], uniform(3, 1, torch.arange(4090, 4100), 7))
    assert uniform(3, 1, torch.arange(0), 7).shape == (0, 7)


def test_uniform_takes_the_upper_24_bits_of_the_hash():
    draws = uniform(9, 4, torch.tensor([0, 5, 59_999]), 3)
    expected = [[(_hash(9, 4, index, column) >> 40) / 2**24 for column in range(3)] for index in (0, 5, 59_999)]
    assert draws.tolist() == expected


# --- the hash -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "bits"),
    [
        ((0,), 0xE220A8397B1DCDAF),  # splitmix64's published first outputs for the seeds 0 and 1234567
        ((1234567,), 6457827717110365317),
        ((0, 0), 0xA706DD2F4D197E6F),
        ((1, 2, 3), 0x6AE515C1C0AC7E37),
        ((2**63 - 1, 10**6), 0x50EA0460D91C5B0F),
    ],
)
def test_derived_seeds_never_change(parts, bits):
    assert derive_seed(*parts) == bits >> 1


def test_derived_seeds_depend_on_every_part_and_on_the_order():
    parts = [p for length in (1, 2, 3) for p in itertools.product(range(6), repeat=length)]
    assert len({derive_seed(*p) for p in parts}) == len(parts)


@settings(deadline=None)
@given(st.lists(INT64, max_size=3), INT64)
def test_the_tensor_hash_equals_the_int_hash(first, last):
    bits = int(_hash_with(_hash(*first), torch.tensor([last])))
    assert bits % 2**64 == _hash(*first, last)


@settings(deadline=None)
@given(INT64, INT64, INT64)
def test_the_tensor_hash_chains_like_the_int_hash(first, second, third):
    bits = int(_hash_with(_hash_with(_hash(first), torch.tensor([second])), torch.tensor([third])))
    assert bits % 2**64 == _hash(first, second, third)
