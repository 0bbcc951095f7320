"""The thread that writes files: order of the files, copies that training cannot change, failures."""

from __future__ import annotations

import sys
import threading

import pytest
import torch

from mnist_dist.engine.writer import HostCopy, Writer
from tests.processes import run_ranks

CPU = torch.device("cpu")
PATIENCE = 60.0


@pytest.fixture
def writer():
    made = Writer(CPU)
    yield made
    made.close()


def test_the_caller_goes_on_while_the_thread_writes_a_copy_that_no_longer_changes(writer):
    released, found = threading.Event(), []
    weights = torch.zeros(3)
    state = {"weights": weights, "steps": [1]}

    def job(copy):
        assert threading.current_thread() is not threading.main_thread()
        assert released.wait(PATIENCE)
        found.append(copy)

    writer.write("state", state, job)
    assert not found
    weights += 1
    state["steps"].append(2)
    released.set()
    writer.wait_until_written()
    assert found[0]["steps"] == [1] and torch.equal(found[0]["weights"], torch.zeros(3))
    assert writer.seconds > 0


def test_files_are_written_in_the_order_of_the_calls_and_a_copy_waits_for_the_job_that_reads_its_memory(writer):
    order = []

    def job(name):
        return lambda copy: order.append((name, copy.item()))

    for step in range(20):
        writer.write("weights", torch.tensor(step), job("weights"))
        writer.write("state", torch.tensor(step), job("state"))
    writer.wait_until_written()
    assert order == [(name, step) for step in range(20) for name in ("weights", "state")]


def test_waiting_for_one_name_does_not_wait_for_the_jobs_after_it(writer):
    released = threading.Event()
    writer.write("weights", torch.zeros(1), lambda copy: None)
    writer.write("state", torch.zeros(1), lambda copy: released.wait(PATIENCE))
    writer.wait_until_written("weights")
    assert not released.is_set()
    released.set()


def test_after_a_failure_nothing_is_written_and_every_later_call_raises_it(writer):
    written, failing = [], threading.Event()

    def fail(copy):
        failing.wait(PATIENCE)
        raise OSError(28, "No space left on device", "state.pt")

    writer.write("weights", torch.zeros(1), fail)
    writer.write("state", torch.zeros(1), written.append)  # queued before the failure
    assert not writer.has_failed
    failing.set()
    for _ in range(2):
        with pytest.raises(OSError, match=r"state\.pt"):
            writer.wait_until_written("state")
    assert writer.has_failed
    with pytest.raises(OSError):
        writer.write("state", torch.zeros(1), written.append)
    assert written == []


def test_the_end_waits_for_what_is_still_written(tmp_path):
    writer, released = Writer(CPU), threading.Event()

    def job(copy):
        assert released.wait(PATIENCE)
        (tmp_path / "state").write_text("complete")

    writer.write("state", torch.zeros(1), job)
    threading.Timer(0.05, released.set).start()
    writer.close()
    assert (tmp_path / "state").read_text() == "complete"


def test_the_next_copy_takes_the_same_memory_and_keeps_type_and_layout():
    copies = HostCopy()
    image = torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last)
    part = torch.arange(12.0).view(3, 4)
    value = {"image": image, 0: [part.T, part.half()], "pair": (1, "two", None), "flag": torch.tensor(True)}
    first = copies.take(value)
    addresses = [first["image"].data_ptr(), first[0][0].data_ptr(), first["flag"].data_ptr()]
    image += 1
    second = copies.take(value)
    assert [second["image"].data_ptr(), second[0][0].data_ptr(), second["flag"].data_ptr()] == addresses
    assert torch.equal(second["image"], image) and second["image"].stride() == image.stride()
    assert torch.equal(second[0][0], part.T) and second[0][1].dtype == torch.float16
    assert second["pair"] == (1, "two", None) and second["flag"].item() is True
    assert addresses[0] != image.data_ptr()


def test_reserved_memory_is_that_of_the_first_copy(writer):
    value = {"state": [torch.ones(5), 1], "scalar": torch.tensor(2.0)}
    writer.reserve("state", value)
    writer.wait_until_written()
    reserved = [each.data_ptr() for each in writer._copies["state"]._tensors.values()]
    found = []
    writer.write("state", value | {"late": torch.ones(1)}, found.append)  # a later value may have more tensors
    writer.wait_until_written()
    [copy] = found
    assert [copy["state"][0].data_ptr(), copy["scalar"].data_ptr()] == reserved
    assert torch.equal(copy["state"][0], torch.ones(5)) and copy["scalar"] == 2 and copy["late"] == 1


def test_a_tensor_that_has_changed_its_shape_gets_new_memory():
    copies = HostCopy()
    copies.take({"state": torch.zeros(3)})
    assert torch.equal(copies.take({"state": torch.ones(2, 2)})["state"], torch.ones(2, 2))


def test_tensors_that_share_memory_are_copied_apart():
    table = torch.arange(12.0)
    copy = HostCopy().take({"table": table, "part": table[3:]})
    assert torch.equal(copy["table"], table) and torch.equal(copy["part"], table[3:])


SHARDED = """
import os, sys, time, torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from mnist_dist.distributed.launcher import launched_world
from mnist_dist.engine.writer import Writer

state = launched_world()
mesh = init_device_mesh("cpu", (2,))
full = {name: torch.arange(15.0).view(5, 3) + name for name in range(4)}
value = {name: distribute_tensor(each, mesh, [Shard(0)]) for name, each in full.items()}
gather, living, most, found = DTensor.full_tensor, [], 0, []

def gathered(tensor):
    global most
    deadline = time.monotonic() + 10  # the thread that communicates may release a tensor a moment later
    while not all(torch.UntypedStorage._expired(each) for each in living) and time.monotonic() < deadline:
        time.sleep(0.01)
    result = gather(tensor)
    storage = result.untyped_storage()._weak_ref()
    living.append(storage)
    most = max(most, sum(not torch.UntypedStorage._expired(each) for each in living))
    return result

DTensor.full_tensor = gathered
writer = Writer(state.device)
writer.write("state", {"model": value, "step": 3}, found.append if state.is_main_process else None)
writer.close()
assert most == 1, f"{most} gathered tensors at once"
if state.is_main_process:
    [copy] = found
    assert copy["step"] == 3 and all(torch.equal(copy["model"][name], full[name]) for name in full)
else:
    assert not found and not writer._copies["state"]._tensors
"""


def test_sharded_tensors_are_gathered_one_at_a_time_and_kept_on_the_rank_that_writes():
    run_ranks(2, [sys.executable, "-c", SHARDED])


@pytest.mark.gpu
def test_a_device_makes_its_copy_before_the_work_that_follows(gpu):
    writer, found = Writer(gpu), []
    weights = torch.zeros(2**26, device=gpu)
    for step in range(5):
        weights.add_(1)
        writer.write("state", weights, lambda copy: found.append((copy.min().item(), copy.max().item())))
        for _ in range(20):
            weights.mul_(2).div_(2)
        weights.fill_(step + 1)
    writer.close()
    assert found == [(step, step) for step in (1.0, 2.0, 3.0, 4.0, 5.0)]
