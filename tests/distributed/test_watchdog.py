"""A process that hangs is reported with its stack, and all processes end."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from mnist_dist.distributed.watchdog import describe, find_hanging
from tests.faults.training import VARIABLES
from tests.processes import Process, free_port, popen, rank_variables, run_in_each, run_ranks

WORDS = ["data.dataset=synthetic", "data.limit_train=320", "data.limit_test=50", "batch_size=64", "log_every=1"]
WORDS += ["epochs=2", "tracking.wandb.mode=disabled"]

HANGS = """
import os, signal, sys, time
from mnist_dist.cli import run_command
from mnist_dist.engine.train_step import TrainStep
from mnist_dist.train import main
inputs = TrainStep.inputs
def patience(self, batch):
    self.calls = getattr(self, "calls", 0) + 1
    if self.calls == 6 and self.accelerator.process_index == 1:
        os.kill(os.getpid(), signal.SIGSTOP) if sys.argv[1] == "frozen" else time.sleep(600)
    return inputs(self, batch)
TrainStep.inputs = patience
sys.exit(run_command(lambda: main(sys.argv[2:])))
"""


@pytest.mark.parametrize("how", ["asleep", "frozen"])
def test_a_process_that_hangs_is_reported_with_its_stack_and_all_end(how, tmp_path):
    script, port = tmp_path / "hangs.py", free_port()
    script.write_text(HANGS)
    words = [*WORDS, "engine.hang_seconds=4", "tracking.plots=false"]
    command = [sys.executable, script, how, "--recipe", "lenet5", "--run-dir", tmp_path / "run", *words]
    ranks: list[Process] = []
    with (tmp_path / "errors").open("w") as errors:
        for rank in range(2):
            variables = os.environ | VARIABLES | rank_variables(rank, 2, port)
            ranks.append(popen(command, env=variables, stdout=subprocess.DEVNULL, stderr=errors))
        try:
            assert ranks[0].wait(timeout=120) == 1
            if how == "asleep":
                assert ranks[1].wait(timeout=60) == 1
        finally:
            for each in ranks:
                each.kill()  # a frozen process cannot end itself
    message = (tmp_path / "errors").read_text()
    # A frozen process publishes no report: the last one is up to a second old, so its step and stack may be older.
    assert ("is frozen or has ended in step" if how == "frozen" else "hangs in step 5") in message
    assert "rank 1 (" in message and ("hangs.py" in message or how == "frozen")
    # Not by its place: PyTorch's store may warn on the other rank after this message, when rank 0 has ended.
    assert "  waiting: rank 0" in message.splitlines()
    assert (tmp_path / "run" / "STATUS").read_text() == "failed\n"


SLOW_DISK = """
import sys, time
from mnist_dist.cli import run_command
from mnist_dist.run import checkpointing
from mnist_dist.train import main

save, waits = checkpointing.save_checkpoint, [6]
def slowly(*arguments, **keywords):
    if waits:
        time.sleep(waits.pop())
    save(*arguments, **keywords)
checkpointing.save_checkpoint = slowly
sys.exit(run_command(lambda: main(sys.argv[1:])))
"""


def test_ranks_that_wait_for_a_slow_disk_are_not_ended(tmp_path):
    """The second checkpoint waits for the first: longer than the limit, and ten times longer than a step."""
    script = tmp_path / "slow_disk.py"
    script.write_text(SLOW_DISK)
    words = [*WORDS, "engine.hang_seconds=2", "tracking.plots=false", "checkpoint.every_steps=4"]
    command = [sys.executable, script, "--recipe", "lenet5", "--run-dir", tmp_path / "run", *words]
    run_ranks(2, command, env=os.environ | VARIABLES)
    assert (tmp_path / "run" / "STATUS").read_text() == "done\n"


CALLBACK = """
import sys, time
from mnist_dist.distributed import watchdog
from mnist_dist.distributed.gradients import GradientClock
from mnist_dist.distributed.launcher import launched_world

watchdog.LAST_WORDS_SECONDS, watchdog.PATIENCE_IN_STEPS = 1.0, 1
state = launched_world()

def fail():
    print("called", flush=True)
    if sys.argv[1] == "hangs":
        time.sleep(600)
    raise {"disk": OSError(28, "No space left"), "exit": SystemExit(0), "key": KeyboardInterrupt()}[sys.argv[1]]

with watchdog.Watchdog(state, 1.0, GradientClock(), fail):
    if sys.argv[1] == "store":  # as after the end of rank 0, which holds the store
        def gone(*arguments):
            raise RuntimeError("the store is gone")
        watchdog.dist.PrefixStore.set = gone
    if sys.argv[1] == "network":  # the machine of rank 0 is cut off: calls of its store wait for an answer
        watchdog.dist.PrefixStore.check = lambda *arguments: time.sleep(600)
    time.sleep(600)
"""


def test_the_processes_end_whatever_the_callback_does_and_without_the_store():
    """The cases run at the same time, because they only wait."""
    cases = ("disk", "exit", "key", "hangs", "store", "network")
    processes = {}
    for how in cases:
        port = free_port()
        for rank in range(2):
            variables = os.environ | {"ACCELERATE_USE_CPU": "true"} | rank_variables(rank, 2, port)
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            processes[how, rank] = popen([sys.executable, "-c", CALLBACK, how], env=variables, **pipes)
    try:
        printed = {key: process.communicate(timeout=120) for key, process in processes.items()}
    finally:
        for process in processes.values():
            process.kill()
    codes = {key: process.wait() for key, process in processes.items()}
    assert codes == dict.fromkeys(codes, 1)
    for how in cases:
        (out, err), (other_out, other_err) = printed[how, 0], printed[how, 1]
        if how in ("store", "network"):
            assert (out, other_out) == ("", ""), how
            assert "rank 0: no progress" in err and "rank 1: no progress" in other_err, how
        else:
            assert (out, other_out) == ("called\n", ""), how
            assert "all processes end" in err, how


# --- NCCL: a rank waits for a collective in any call that reads a value of the device -----------------------------

ASYNCHRONOUS = """
import sys, time, torch, torch.distributed as dist
from mnist_dist.distributed import watchdog
from mnist_dist.distributed.gradients import GradientClock
from mnist_dist.distributed.launcher import launched_world

watchdog.PATIENCE_IN_STEPS = 1
state = launched_world()

def tolist(work):  # stands for Tensor.tolist on a GPU: no frame of torch.distributed is on the stack
    while not work.is_completed():
        time.sleep(0.01)

def oversleeps():
    time.sleep(600)

with watchdog.Watchdog(state, 2.0, GradientClock()) as dog:
    for step in range(1, 4):
        work = dist.all_reduce(torch.ones(1), async_op=True)
        tolist(work)
        dog.beat(step)
    if state.process_index == 1:
        oversleeps()
    work = dist.all_reduce(torch.ones(1), async_op=True)
    while True:  # as `tolist`, but gloo completes the work when another rank has ended
        time.sleep(0.01)
"""


def test_a_rank_that_waits_for_its_device_is_not_named_as_hanging():
    port = free_port()
    environments = [os.environ | {"ACCELERATE_USE_CPU": "true"} | rank_variables(rank, 3, port) for rank in range(3)]
    done = run_in_each(environments, [sys.executable, "-c", ASYNCHRONOUS], timeout=90)
    assert [each.returncode for each in done] == [1, 1, 1]
    message = done[0].stderr
    assert "rank 1 (" in message and "hangs in step 3" in message and "oversleeps" in message
    assert message.count("hangs in step") == 1 and "  waiting: rank 0, 2" in message.splitlines()


def report(rank: int, *position: int, alive: bool = True, waits: bool = False) -> dict:
    return {"rank": rank, "position": list(position), "alive": alive, "waits": waits} | {
        "where": "n0, pid 1",
        "step": position[0] if position else 0,
        "stack": "  in tolist",
    }


@pytest.mark.parametrize(
    ("reports", "hanging"),
    [
        # beats, collectives, reductions of replayed graphs
        ([report(0, 9, 30, 9), report(1, 9, 29, 9), report(2, 9, 30, 9)], [1]),
        ([report(0, 9, 0, 10), report(1, 9, 0, 9)], [1]),  # a captured step
        ([report(0, 11, 32, 0), report(1, 9, 29, 0), report(2, 10, 30, 0)], [1]),  # a rank runs ahead of its device
        ([report(0, 9, 30, 9), report(1, 9, 29, 9), report(2, 9, 29, 9)], [1, 2]),
        ([report(0, 9, 30, 9), report(1, alive=False), report(2, 9, 30, 9)], [1]),
        ([report(0, 9, 30, 9), report(1, 9, 30, 9, alive=False), report(2, 9, 30, 9, waits=True)], [0, 1]),
        ([report(0, 9, 0, 0, waits=True), report(1, 9, 0, 0)], [1]),  # a backend that does not count
    ],
)
def test_the_rank_that_has_started_the_fewest_collectives_hangs(reports, hanging):
    assert [each["rank"] for each in find_hanging(reports)] == hanging
    assert "no rank is behind" not in describe(reports, 60.0)


def test_if_no_rank_is_behind_all_are_listed_and_the_devices_suspected():
    message = describe([report(0, 9, 30, 9), report(1, 9, 30, 9)], 60.0)
    assert "no rank is behind" in message and message.count("hangs in step 9") == 2
