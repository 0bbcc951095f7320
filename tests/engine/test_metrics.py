"""The meter's figures, read at once or an interval behind a device that works behind the host."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from mnist_dist.distributed.gradients import GradientClock
from mnist_dist.engine.metrics import Meter


@dataclass
class LateDevice:
    """A device that works behind the host: work is queued, and the host sees its end only if it waits."""

    queued_until: float = 0.0
    """The device's time when all queued work is done."""
    waited_until: float = 0.0
    """The latest moment that the host has waited for."""

    def moment(self, device: torch.device) -> "LateMoment":
        return LateMoment(self, self.queued_until)


@dataclass
class LateMoment:
    owner: LateDevice
    at: float

    def wait(self) -> None:
        self.owner.waited_until = max(self.owner.waited_until, self.at)

    def seconds_since(self, earlier: "LateMoment") -> float:
        self.wait()
        return self.at - earlier.at


@dataclass
class FakeProcess:
    """Stands in for the Accelerator of one of several processes; `reduce` adds the rows of the processes before."""

    process_index: int = 0
    num_processes: int = 1
    rows: list[Tensor] = field(default_factory=list)
    scaler: Any = None
    device: ClassVar = torch.device("cpu")

    @property
    def is_main_process(self) -> bool:
        return self.process_index == 0

    def reduce(self, row: Tensor, reduction: str) -> Tensor:
        if self.num_processes == 1:
            return row.clone()
        self.rows.append(row.clone())
        return torch.stack(self.rows).sum(dim=0)


@pytest.fixture
def late(monkeypatch) -> LateDevice:
    device = LateDevice()
    monkeypatch.setattr("mnist_dist.engine.metrics.runs_behind", lambda _: True)
    monkeypatch.setattr("mnist_dist.engine.metrics.Moment", device.moment)
    return device


def train(meter: Meter, late: LateDevice, seconds: float, loss: float = 2.0, samples: int = 50) -> None:
    """Queues a step of this duration whose predictions are all right."""
    meter.count_step(samples)
    meter.add(torch.tensor(loss * samples), torch.zeros(samples, 10), torch.zeros(samples, dtype=torch.int64))
    late.queued_until += seconds


def test_a_reading_waits_for_its_own_interval_only(late):
    meter = Meter(FakeProcess())
    meter.resume()
    train(meter, late, 5.0)
    first = meter.start_reading(torch.tensor(0.25))
    train(meter, late, 2.0, loss=4.0)
    train(meter, late, 2.0, loss=8.0)
    assert late.waited_until == 0.0
    figures = meter.finish_reading(first)
    assert late.waited_until == 5.0, "the device has 4 seconds of work left"
    assert figures == {"train/loss": 2.0, "train/accuracy": 100.0, "train/images_per_second": 10.0}
    assert first.figures[-1] == 0.25
    second = meter.start_reading()
    assert late.waited_until == 5.0
    assert meter.finish_reading(second) == pytest.approx(
        {"train/loss": 6.0, "train/accuracy": 100.0, "train/images_per_second": 25.0}
    )
    assert meter.read_epoch()["train/epoch_loss"] == pytest.approx(14 / 3)
    # The second row told the processes the time of the first interval; `agree` tells them the rest.
    assert (meter.train_seconds, meter.seconds_per_step) == (5.0, 5.0)
    meter.agree()
    assert (meter.train_seconds, meter.seconds_per_step, meter.own_seconds) == (9.0, 2.0, 9.0)


def test_all_processes_agree_on_the_clock_of_rank_0(late):
    rows: list[Tensor] = []
    meters = [Meter(FakeProcess(rank, 2, rows)) for rank in range(2)]
    for rank, meter in reversed([*enumerate(meters)]):  # the last process to reduce sees the rows of both
        late.queued_until = 100.0 * rank  # clocks of two devices
        meter.resume()
        train(meter, late, 5.0 + rank)
        meter.finish_reading(meter.start_reading())
    rows.clear()
    for rank, meter in enumerate(meters):
        late.queued_until = 100.0 * rank + 5.0 + rank
        train(meter, late, 3.0 + rank)
        meter.finish_reading(meter.start_reading())
    assert meters[1].train_seconds == meters[1].seconds_per_step == 5.0
    assert meters[1].own_seconds == 6.0 + 4.0


def test_figures_of_each_process_show_who_waits_for_whom(late, monkeypatch):
    monkeypatch.setattr("mnist_dist.engine.metrics.runs_behind", lambda _: False)
    rows: list[Tensor] = []
    clocks = [GradientClock() for _ in range(2)]
    meters = [Meter(FakeProcess(rank, 2, rows), clocks[rank]) for rank in range(2)]
    for waited in (1.0, 3.0):
        rows.clear()
        for rank, meter in reversed([*enumerate(meters)]):
            late.queued_until = 0.0
            meter.resume()
            train(meter, late, 5.0, samples=50 + 10 * rank)
            clocks[rank].seconds += waited * rank  # only process 1 waits
            clocks[rank].reductions += 1
            reading = meter.start_reading()
        assert meters[0].finish_reading(reading)["train/images_per_second"] == 22.0
        assert meters[0].process_figures() == {
            **{"process/0/images_per_second": 10.0, "process/1/images_per_second": 12.0},
            **{"process/0/waiting_percent": 0.0, "process/1/waiting_percent": 20 * waited},
            "train/waiting_percent": 10 * waited,
        }


@pytest.mark.parametrize("behind", [True, False])
def test_waits_that_the_host_does_not_see_are_not_shown(late, monkeypatch, behind):
    monkeypatch.setattr("mnist_dist.engine.metrics.runs_behind", lambda _: behind)
    clock = GradientClock()
    clock.reductions = int(behind)  # a GPU reduces without a wait of the host; one process reduces nothing
    meter = Meter(FakeProcess(), clock)
    train(meter, late, 5.0)
    meter.read()
    assert meter.process_figures() == {"process/0/images_per_second": 10.0}


def test_a_reading_that_is_taken_back_is_read_with_the_next_one(late):
    meters = [Meter(FakeProcess()), Meter(FakeProcess())]
    for meter in meters:
        late.queued_until = 0.0
        meter.load_state_dict({"sums": [[8.0, 1.0, 4.0]], "epoch_sums": [0.0] * 3, "train_seconds": 1.0, "steps": 3,
                               "seconds": 6.0})  # fmt: skip
        meter.resume()
        train(meter, late, 5.0)
        if meter is meters[1]:
            reading = meter.start_reading()
            train(meter, late, 2.0)
            meter.take_back(reading)
        else:
            train(meter, late, 2.0)
    states = [{"sums": meter.sums.tolist(), "seconds": meter._seconds_unread(), "steps": meter._steps,
               "before": meter._steps_before} for meter in meters]  # fmt: skip
    assert states[0] == states[1]
    assert states[0]["seconds"] == 13.0
    assert meters[0].read() == meters[1].read()
    assert meters[0].train_seconds == meters[1].train_seconds == 14.0


def test_with_a_gradient_scaler_and_on_other_devices_figures_are_read_at_once(late, monkeypatch):
    assert not Meter(FakeProcess(scaler=object())).reads_behind
    monkeypatch.undo()
    meter = Meter(FakeProcess())
    assert not meter.reads_behind
    meter.count_step(1)
    meter.add(torch.tensor(1.0), torch.zeros(1, 10), torch.zeros(1, dtype=torch.int64))
    assert meter.read()["train/loss"] == 1.0
    assert meter.train_seconds == meter.seconds_per_step == meter.own_seconds > 0
