"""A replayed step gives the same numbers as an eager one.

Machines without a GPU use a stand-in for a CUDA graph: a list of operations, repeated on the same tensors. Like a graph
it does not repeat Python code, so a decision that Python makes at each step shows as a difference. Reading a value from
the device during the capture is an error.
"""

import gc
import inspect
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mnist_dist import load_recipe, load_run, train
from mnist_dist.benchmark import baselines
from mnist_dist.data import Augmentation, Batches, Images, mixing, randaugment
from mnist_dist.distributed.gradients import FlatGradients, GradientClock
from mnist_dist.engine import cuda_graph, train_step
from mnist_dist.engine.cuda_graph import WARM_UP_STEPS, CapturedStep, capture_obstacle, rates_on_device
from mnist_dist.engine.distillation import Distillation
from mnist_dist.engine.ema import MovingAverage
from mnist_dist.engine.metrics import Meter
from mnist_dist.engine.optimizers import build_optimizer
from mnist_dist.engine.schedules import build_schedule, set_rates
from mnist_dist.engine.train_step import NotFinite, StepSettings, TrainedNetwork, TrainStep
from mnist_dist.models import build_model
from mnist_dist.models.layers import Dropout
from mnist_dist.run.build import build_components
from mnist_dist.run.data import load_data
from mnist_dist.run.kernels import set_determinism
from mnist_dist.run.model_setup import build_module
from tests.fake_tensors import skip_unless_fake_tensors_work
from tests.processes import run_ranks

NUM_SAMPLES, BATCH_SIZE, STEPS = 144, 16, 24  # nine full batches per epoch

EVERYTHING = Augmentation(
    flip=True, crop_padding=2, rotation=10, elastic=1.0, brightness=0.2, contrast=0.2, saturation=0.2,
    randaugment=(2, 9), cutout=4, mixup=0.2, cutmix=1.0,
)  # fmt: skip

# --- a stand-in for CUDA graphs -----------------------------------------------------------------------------------


class OperationList(TorchDispatchMode):
    """Stores every operation with its inputs and outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        result = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for function, args, kwargs, captured in self.operations:
            result = function(*args, **kwargs)
            if function is torch.ops.c10d.allreduce_.default:
                dist.Work.unbox(result[1]).wait()
            for target, value in zip(tensors_in(captured), tensors_in(result), strict=True):
                if target.untyped_storage().data_ptr() != value.untyped_storage().data_ptr():
                    target.copy_(value)


def tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [each for item in value for each in tensors_in(item)] if isinstance(value, list | tuple) else []


@contextmanager
def tensors_restored() -> Iterator[None]:
    """Restores the values of all tensors afterwards, because the capture of a graph does not execute its operations."""
    # `type`, because `isinstance` asks a weak reference of an earlier test for an object that is gone.
    tensors: list[Tensor] = [each for each in gc.get_objects() if issubclass(type(each), Tensor)]
    found = [each.detach() for each in tensors if each.device.type == "cpu"]
    before = [each.clone() for each in found]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(found, before, strict=True):
                tensor.copy_(value)


def capture(body: Callable[[], None]) -> Callable[[], None]:
    with tensors_restored(), OperationList() as captured:
        body()
    return captured.replay


@pytest.fixture(autouse=True)
def random_operations_on_all_images(monkeypatch):
    """Makes the CPU compute RandAugment as a GPU does: a graph cannot hold sizes that depend on values."""
    monkeypatch.setattr(randaugment, "SELECTING_DEVICES", ())


# --- the same run, eager and captured -----------------------------------------------------------------------------

Wrap = Callable[[TrainStep], CapturedStep]


def captured(steps: int = 1) -> Wrap:
    """Captures with the stand-in; a message to the user fails the test."""
    return lambda step: CapturedStep(step, steps, capture, notify=pytest.fail)


def dropout_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 5, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(576, 10)
    )


def noise(samples: int = NUM_SAMPLES) -> Images:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (samples, 1, 28, 28), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 10, (samples,), generator=generator)
    return Images(images, labels, tuple("0123456789"), mean=(0.5,), std=(0.29,))


def run(
    wrap: Wrap | None,
    *,
    build: Callable[[], nn.Module] = dropout_network,
    optimizer: str = "sgd",
    keywords: dict[str, Any] | None = None,
    ema: bool = False,
    data: Images | None = None,
    batch_size: int = BATCH_SIZE,
    steps: int = STEPS,
    first: int = 0,
    accelerator: Accelerator | None = None,
    augmentation: Augmentation | None = None,
    ahead: bool = False,
    checks: tuple[int, ...] = (),
    **settings: Any,
) -> TrainStep | CapturedStep:
    """Trains from step `first` to step `steps`: eagerly, or captured if `wrap` is given.

    Args:
        checks: numbers of steps after which `check` is called.
        settings: as for `StepSettings`.
    """
    accelerator, data = accelerator or Accelerator(cpu=True), data or noise()
    torch.manual_seed(0)
    module = build().to(accelerator.device)
    augmentation = augmentation or Augmentation(rotation=20, translation=0.1)
    batches = Batches(len(data), batch_size, 3, augmentation=augmentation)
    made = build_optimizer(module, optimizer, lr=0.25, **(keywords or {}))
    average = MovingAverage(module, 0.75) if ema else None
    lengths = {"steps_per_epoch": batches.steps_per_epoch, "total_steps": steps}
    schedule = build_schedule("step", lr=2**-5, step_size=1, gamma=0.5, **lengths)
    several = accelerator.num_processes > 1
    reduction = FlatGradients(module, "none", False, GradientClock()) if several else None
    accelerator.prepare_model(module, evaluation_mode=True)
    network = TrainedNetwork(module, made, average, reduction)
    meter, data = Meter(accelerator), data.to(accelerator.device)
    eager = TrainStep(accelerator, network, batches, data, meter, StepSettings(**settings), ahead=ahead)
    update = wrap(eager) if wrap else eager
    for number in range(first, steps):
        epoch, index = divmod(number, batches.steps_per_epoch)
        set_rates(made, schedule, number)
        if index == 0 or number == first:  # as in `fit`: the steps of an epoch share its plan
            plan = batches.plan(epoch)
        update(plan, index, number)
        if number + 1 in checks:
            update.check()
    if isinstance(update, CapturedStep):
        update.finish()
    return update


def step_of(update: TrainStep | CapturedStep) -> TrainStep:
    return update._step if isinstance(update, CapturedStep) else update


def state(update: TrainStep | CapturedStep) -> dict[str, Tensor]:
    step = step_of(update)
    found = dict(step.module.state_dict())
    if step.average:
        found |= {f"average.{name}": value for name, value in step.average.state_dict().items()}
    for number, each in enumerate(step.optimizer.state.values()):
        found |= {f"{number}.{key}": value for key, value in each.items()}
    gradients = {f"{number}.grad": each.grad for number, each in enumerate(step.module.parameters())}
    return found | gradients | {"sums": step.meter.sums, "norm": step.health()[0], "skipped": step._guard._skipped}


def assert_equal(found: TrainStep | CapturedStep, expected: TrainStep | CapturedStep) -> None:
    found_state, expected_state = state(found), state(expected)
    assert found_state.keys() == expected_state.keys()
    for name, value in expected_state.items():
        assert torch.equal(found_state[name], value), name
    assert step_of(found).meter._own_samples == step_of(expected).meter._own_samples


@pytest.fixture
def guard_on_device(monkeypatch):
    """Makes a CPU guard against bad gradients as a GPU does, without a wait for the device."""
    monkeypatch.setattr(train_step, "guards_on_device", lambda optimizer, accelerator: True)


@pytest.mark.parametrize(
    "words",
    [
        {},
        {"optimizer": "sgd", "keywords": {"momentum": 0.9, "nesterov": True}, "clip_grad_norm": 0.5},
        {"optimizer": "adam", "ema": True},
        {"optimizer": "adamw", "label_smoothing": 0.1, "micro_batch_size": 7},
        {"augmentation": EVERYTHING, "ahead": True, "batch_size": 20, "steps": 16},
        {"build": lambda: build_model("lenet5"), "batch_size": 20, "steps": 30},  # the short last batch stays eager
    ],
    ids=lambda words: "-".join(words) or "plain",
)
def test_replayed_steps_equal_eager_steps(guard_on_device, words):
    found = run(captured(), **words)
    assert found._replay_one is not None
    assert_equal(found, run(None, **words))


def plain_network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 5, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10))


@pytest.mark.parametrize("steps_a_replay", [4, 50])  # 50 steps are more than an epoch has
@pytest.mark.parametrize(
    "words",
    [
        {},
        {"checks": (8, 9, 17)},  # reads in the middle of a replay, and just before and after its end
        {"batch_size": 20, "steps": 30, "optimizer": "adam", "ema": True},  # steps wait when the short batch comes
        {"first": 5, "keywords": {"momentum": 0.9, "nesterov": True}},
    ],
    ids=str,
)
def test_several_steps_per_replay_equal_eager_steps(guard_on_device, words, steps_a_replay):
    found = run(captured(steps_a_replay), build=plain_network, **words)
    assert found._replay_all is not found._replay_one is not None
    assert_equal(found, run(None, build=plain_network, **words))


def test_steps_wait_for_a_replay_until_a_result_is_read(guard_on_device):
    update = run(captured(4), build=plain_network, steps=WARM_UP_STEPS + 4)
    weight = step_of(update).module[0].weight
    before = weight.detach().clone()
    update(update.batches.plan(0), WARM_UP_STEPS + 4, WARM_UP_STEPS + 4)
    assert torch.equal(weight, before)
    update.health()
    assert not torch.equal(weight, before)


def test_a_network_with_dropout_gets_one_step_per_replay_and_one_message(guard_on_device):
    messages: list[str] = []
    found = run(lambda step: CapturedStep(step, 4, capture, notify=messages.append))
    assert_equal(found, run(None))
    assert found._replay_all is found._replay_one
    assert len(messages) == 1 and "engine.capture" in messages[0]


def test_a_resumed_run_warms_up_again_and_makes_the_same_steps(guard_on_device):
    expected = run(None, first=5)
    assert_equal(run(captured(), first=5), expected)


def test_a_replay_reads_the_batch_of_a_plan_with_another_order(guard_on_device):
    update = run(captured(), steps=5)
    other = Batches(NUM_SAMPLES, BATCH_SIZE, 99, augmentation=Augmentation(rotation=20))
    update.batches = other
    update(other.plan(0), 5, 5)
    rows = other.rows(other.plan(0), 5)
    (read,) = update._inputs
    assert torch.equal(read.images, step_of(update).data.images[rows])
    assert read.changes is not None and torch.equal(read.changes, other.changes(0, rows))


def test_a_replay_may_hold_steps_of_two_epochs(guard_on_device):
    found = run(captured(4), build=plain_network, steps=17)
    assert [len(found._inputs), found._waiting] == [4, []]
    update = run(captured(4), build=plain_network, steps=WARM_UP_STEPS + 4)
    for number in range(WARM_UP_STEPS + 4, 10):
        update(update.batches.plan(number // 9), number % 9, number)
    assert len(update._waiting) == 3, "the end of the epoch, step 9, ended the replay"


def test_graphs_are_freed_with_the_last_reference_to_the_step(guard_on_device):
    """A process group of NCCL waits for them, so they must not wait for a garbage collection."""
    update = run(captured(4), build=plain_network, steps=WARM_UP_STEPS + 4)
    freed = weakref.finalize(update._replay_one.__self__, lambda: None)
    gc.disable()
    try:
        del update
        assert not freed.alive
    finally:
        gc.enable()


def test_new_batches_reach_the_wrapped_step(guard_on_device):
    update = run(captured(), steps=5)
    update.batches = Batches(NUM_SAMPLES, BATCH_SIZE, 99)
    assert step_of(update).batches.seed == 99


@pytest.mark.parametrize("steps_a_replay", [1, 3])
@pytest.mark.parametrize("bad_step", [1, WARM_UP_STEPS + 4])
def test_a_replayed_step_with_a_bad_gradient_is_skipped_or_raises(guard_on_device, bad_step, steps_a_replay):
    data = noise()
    batches = Batches(NUM_SAMPLES, BATCH_SIZE, 3)
    images = data.images.float()
    images[batches.rows(batches.plan(0), bad_step)] = torch.nan
    data = Images(images, data.labels, data.classes, data.mean, data.std)
    words = {"data": data, "steps": 9, "ema": True, "optimizer": "adam", "build": plain_network}
    skipping = run(captured(steps_a_replay), on_nonfinite="skip", **words)
    assert skipping.skipped == 1
    assert_equal(skipping, run(None, on_nonfinite="skip", **words))

    stopped = run(captured(steps_a_replay), **words)
    with pytest.raises(NotFinite) as error:
        stopped.check()
    assert error.value.step == bad_step
    expected = step_of(run(None, **words | {"steps": bad_step})).module.state_dict()
    for name, value in step_of(stopped).module.state_dict().items():
        assert torch.equal(value, expected[name]), name


class ReadsTheDevice(nn.Module):
    """A network that cannot be captured: Python reads a value from the device and decides by it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(784, 10)

    def forward(self, images: Tensor) -> Tensor:
        flat = images.flatten(1)
        return self.layer(flat if float(flat.mean()) > 0 else -flat)


def test_a_network_that_cannot_be_captured_trains_eagerly_after_one_message(guard_on_device):
    messages: list[str] = []
    found = run(lambda step: CapturedStep(step, capture=capture, notify=messages.append), build=ReadsTheDevice)
    assert len(messages) == 1
    assert "not permitted when stream is capturing" in messages[0]  # the reason, from PyTorch
    assert_equal(found, run(None, build=ReadsTheDevice))


@pytest.mark.parametrize("fails_at_the_end", [False, True])
def test_a_failed_capture_restores_stream_and_generator_and_names_the_first_error(monkeypatch, fails_at_the_end):
    current = ["usual"]

    @contextmanager
    def stream(new: str) -> Iterator[None]:
        before, current[0] = current[0], new
        try:
            yield
        finally:
            current[0] = before

    @contextmanager
    def graph(*arguments: object, **keywords: object) -> Iterator[None]:
        """As in PyTorch, the side stream stays current if the end of the capture fails."""
        current[0] = "side"
        try:
            yield
        finally:
            if fails_at_the_end:
                raise RuntimeError("the capture was invalidated")
            current[0] = "usual"

    captured, generator = MagicMock(), MagicMock()
    for name, value in {"stream": stream, "graph": graph, "CUDAGraph": lambda: captured}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[0])
    monkeypatch.setattr(torch.cuda, "default_generators", (generator,))
    with pytest.raises(ZeroDivisionError):
        cuda_graph.capture_cuda_graph(lambda: 1 / 0, MagicMock(device=torch.device("cuda", 0)))
    assert current == ["usual"]
    generator.graphsafe_set_state.assert_called_once_with(generator.clone_state.return_value)
    captured.reset.assert_called_once()


def test_the_capture_starts_without_a_workspace_of_cublas(monkeypatch):
    events: list[str] = []

    @contextmanager
    def graph(*_: Any, **__: Any) -> Iterator[None]:
        events.append("capture")
        yield

    replaced = {"stream": nullcontext, "graph": graph, "CUDAGraph": MagicMock, "current_stream": MagicMock()}
    for name, value in (replaced | {"default_generators": (MagicMock(),)}).items():
        monkeypatch.setattr(torch.cuda, name, value)
    clear = "_cuda_clearCublasWorkspaces"  # missing in PyTorch without CUDA
    monkeypatch.setattr(torch._C, clear, lambda: events.append("clear"), raising=False)
    cuda_graph.capture_cuda_graph(lambda: None, MagicMock(device=torch.device("cuda", 0)))
    assert events == ["clear", "capture"], "the graph would use a workspace that it does not own"


def test_a_replay_needs_no_workspace_that_others_free(gpu):
    network, images = build_model("simple_cnn").to(gpu), torch.rand(128, 1, 28, 28, device=gpu)

    def body() -> None:
        network.zero_grad()
        network(images).square().mean().backward()

    replay = baselines.captured(body)
    torch._C._cuda_clearCublasWorkspaces()  # as Lightning's Trainer does when it starts
    torch.cuda.empty_cache()
    replay()
    replayed = [parameter.grad.clone() for parameter in network.parameters()]
    body()
    for parameter, gradient in zip(network.parameters(), replayed, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-5)  # kernels may add in another order


IN_TWO_PROCESSES = """
import torch.distributed as dist
from tests.engine.test_cuda_graph import CapturedStep, Accelerator, assert_equal, capture, captured, run
from mnist_dist.distributed import gradients
from mnist_dist.engine import train_step

train_step.guards_on_device = lambda optimizer, accelerator: True
rank = Accelerator(cpu=True).process_index
for words in ({}, {"optimizer": "adam", "ema": True, "clip_grad_norm": 1.0, "micro_batch_size": 3}, {"batch_size": 20}):
    found, expected = run(captured(), **words), run(None, **words)
    assert found._replay_one is not None
    assert_equal(found, expected)
    gradients.BUCKET_BYTES = 2000  # from now on several buffers, which are sent during the backward pass

def fails_on_rank_1(body):
    replay = capture(body)
    if rank == 1:
        raise RuntimeError("no memory left")
    return replay

messages = []
found = run(lambda step: CapturedStep(step, capture=fails_on_rank_1, notify=messages.append))
assert found._failed and found._replay_one is None
assert [message.endswith("no memory left") for message in messages] == [True] * (rank == 0)
assert_equal(found, run(None))
"""


def test_two_processes_replay_the_reduction_too_and_all_or_none_captures():
    run_ranks(2, [sys.executable, "-c", IN_TWO_PROCESSES])


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ({}, None),
        ({"device": torch.device("cpu")}, "CPU"),
        ({"device": torch.device("xpu")}, "xpu"),
        ({"fsdp": True}, "FSDP2"),
        ({"allows_unused": True}, "ddp.find_unused_parameters"),
        ({"scaler": True}, "mixed_precision=bf16"),
        ({"moves_momentum": True}, "schedule.cycle_momentum=false"),
        ({"shards": True}, "logical_shards"),
        ({"compile_mode": "max-autotune"}, "compile=max-autotune"),
        ({"compile_mode": True}, None),
        ({"optimizer": torch.optim.RMSprop([torch.zeros(1)])}, "RMSprop"),
    ],
    ids=str,
)
def test_obstacles_to_a_capture_are_known_before_training(words, reason):
    optimizer = torch.optim.SGD([torch.zeros(1)], fused=True)
    usual = dict.fromkeys(("moves_momentum", "scaler", "shards", "fsdp", "allows_unused", "compile_mode"), False)
    found = capture_obstacle(**({"device": torch.device("cuda"), "optimizer": optimizer} | usual | words))
    assert (found is None) if reason is None else (reason in found)


@pytest.mark.parametrize(("choice", "notes"), [("step", 1), ("epoch", 1), ("auto", 0), ("off", 0)])
def test_a_note_explains_eager_steps_to_users_who_ask_for_a_graph(accelerator, choice, notes):
    recipe = load_recipe("debug", f"engine.capture={choice}", "data.limit_train=300")
    dataset = load_data(recipe, PartialState())
    components = build_components(recipe, "no", dataset.train, build_module(recipe, dataset))
    assert components.captured is None
    assert len([note for note in components.notes if note.startswith("engine.capture")]) == notes


@pytest.mark.parametrize("choice", ["step", "epoch"])
def test_a_captured_run_trains_and_saves_like_the_eager_run(guard_on_device, monkeypatch, tmp_path, choice):
    """Uses the stand-in for a CUDA graph. A graph reads the learning rate as float32, so rounding differs."""
    words = ["epochs=2", "batch_size=32", "data.limit_train=300", "data.limit_test=50", "log_every=4"]
    words += [f"engine.capture={choice}", "checkpoint.every_steps=7"]
    train(load_recipe("debug", *words), tmp_path / "eager")

    wrapped: list[CapturedStep] = []

    def wrap(step: TrainStep, steps: int) -> CapturedStep:
        wrapped.append(CapturedStep(step, steps, capture))
        return wrapped[-1]

    monkeypatch.setattr("mnist_dist.run.build.capture_obstacle", lambda *arguments, **keywords: None)
    monkeypatch.setattr("mnist_dist.run.build.CapturedStep", wrap)
    train(load_recipe("debug", *words), tmp_path / "captured")
    assert not wrapped[0]._failed and wrapped[0].seconds > 0
    assert len(wrapped[0]._inputs) == (1 if choice == "step" else 9)
    assert wrapped[0]._replay_one is None, "the graph is freed at the end of the run"
    assert wrapped[0].notify is not print  # messages go to the console of the run
    eager, found = (load_run(tmp_path / name) for name in ("eager", "captured"))
    assert len(found.metrics) == len(eager.metrics)
    for line, expected in zip(found.metrics, eager.metrics, strict=True):
        assert line.keys() == expected.keys()
        for key in line.keys() & {"step", "train/lr", "train/loss", "train/grad_norm", "eval/loss"}:
            assert line[key] == pytest.approx(expected[key], rel=1e-3), (line["step"], key)
    for name, value in eager.model.state_dict().items():
        torch.testing.assert_close(found.model.state_dict()[name], value, rtol=1e-3, atol=1e-4)


def network_of_few_kernels(num_classes: int) -> nn.Module:
    """Every kernel costs the C++ compiler seconds."""
    layers = [nn.Conv2d(1, 4, 5, stride=4), nn.ReLU(), Dropout(0.1), nn.Flatten(), nn.Linear(144, num_classes)]
    return nn.Sequential(*layers)


@pytest.mark.usefixtures("compiler")
def test_a_compiled_network_trains_like_the_eager_one(tmp_path):
    """Its dropout layer removes the same elements."""
    words = ["data.limit_train=300", "data.limit_test=10", "log_every=1"]  # batches of 128, 128 and 44 images
    words += [f"model.name={__name__}:network_of_few_kernels"]
    losses = []
    for name, compiled in (("eager", "false"), ("compiled", "true")):
        train(load_recipe("debug", *words, f"compile={compiled}"), tmp_path / name)
        metrics = load_run(tmp_path / name).metrics
        losses.append([line["train/loss"] for line in metrics if "train/loss" in line])
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


# --- fake tensors on a GPU ----------------------------------------------------------------------------------------

GPU = torch.device("cuda", 0)


class Marked:
    """Stands in for a moment of the device, which needs the driver. It has not come: waiting fails."""

    def __init__(self, device: torch.device):
        assert device.type == "cuda"


class FakeGPU:
    """Stands in for the Accelerator of a GPU. PyTorch's fake tensors have a device and a shape, but no content.

    A step that combines tensors of two devices, or reads the content of one, fails as it would on a GPU or in a
    capture. The backward pass and the optimizer's kernel need the driver and are left out.
    """

    device = torch.device("cuda")  # as Accelerate names the GPU of a single process
    num_processes, process_index, scaler, is_main_process = 1, 0, None, True

    def __init__(self, module: nn.Module):
        self._parameters = list(module.parameters())

    def backward(self, loss: Tensor, gradient: Tensor) -> None:
        assert gradient.device == GPU
        assert loss.device == GPU and loss.ndim == 0
        for parameter in self._parameters:
            parameter.grad = torch.zeros_like(parameter)

    def reduce(self, row: Tensor, reduction: str) -> Tensor:
        return row.clone()

    def clip_grad_norm_(self, parameters: list[Tensor], max_norm: float) -> Tensor:
        return nn.utils.clip_grad_norm_(parameters, max_norm)


def run_fake_steps(
    build: Callable[[], nn.Module],
    monkeypatch: pytest.MonkeyPatch,
    *,
    optimizer: str = "adam",
    ema: bool = False,
    teacher: bool = False,
    elastic: float = 0.0,
    everything: bool = False,
    watching: AbstractContextManager[object] | None = None,
    **settings: Any,
) -> None:
    """Runs two steps on fake tensors, the second with learning rates on the device, inside the context `watching`."""
    skip_unless_fake_tensors_work()
    # The averaged weights start as a deep copy, which must belong to the same fake mode.
    monkeypatch.setattr(FakeTensorMode, "__deepcopy__", lambda self, memo: self, raising=False)
    monkeypatch.setattr(TrainStep, "seed", lambda self, step, share: None)
    monkeypatch.setattr("mnist_dist.engine.metrics.Moment", Marked)
    monkeypatch.setattr(torch, "_fused_sgd_", lambda *lists, **settings: None)  # needs the driver
    # A fake tensor must not stay in a cache.
    monkeypatch.setattr(mixing, "_probabilities", inspect.unwrap(mixing._probabilities))
    with FakeTensorMode(), watching or nullcontext():
        with GPU:
            module, other = build(), build_model("lenet5").eval()
            images = torch.zeros(64, 1, 28, 28, dtype=torch.uint8)
            data = Images(images, torch.zeros(64, dtype=torch.int64), tuple("0123456789"), mean=(0.1,), std=(0.3,))
        augmentation = Augmentation(rotation=10, elastic=elastic, fill=elastic, interpolation="bilinear")
        batches = Batches(64, 16, 0, augmentation=EVERYTHING if everything else augmentation)
        made = build_optimizer(module, optimizer, lr=0.1)
        monkeypatch.setattr(made, "step", lambda: None)
        accelerator: Any = FakeGPU(module)
        network = TrainedNetwork(module, made, MovingAverage(module, 0.9) if ema else None)
        distillation = Distillation([(other, 0.2, 0.3)], weight=0.5, temperature=2, mean=(0.1,), std=(0.3,))
        step = TrainStep(
            accelerator, network, batches, data, Meter(accelerator), StepSettings(**settings),
            distillation=distillation if teacher else None,
        )  # fmt: skip
        assert step.guard_is_on_device == (optimizer != "rmsprop")
        assert (step._update_guard is not None) == (optimizer == "lion")
        step.compute(step.load(batches.plan(0), 0), 0)
        rates_on_device(made)
        assert all(group["lr"].device == GPU for group in made.param_groups)
        step.compute(step.load(batches.plan(0), 1), 1)
        assert step.meter.reads_behind
        reading = step.meter.start_reading(*step.health())
        assert reading.figures.shape == (7,) and reading.own_sums.device == GPU


@pytest.mark.parametrize("name", ["model_v1", "model_v3", "simple_cnn", "mnistnet", "lenet5", "ms_ran", "resnet18"])
@pytest.mark.parametrize(
    "words",
    [
        {"optimizer": "sgd"},
        {"optimizer": "lion"},  # no fused kernel: the update is undone
        {"ema": True, "clip_grad_norm": 1.0, "on_nonfinite": "skip"},
        {"everything": True},
        {"teacher": True, "label_smoothing": 0.1, "micro_batch_size": 5, "elastic": 1.4},
    ],
    ids=lambda words: "-".join(words),
)
def test_a_step_on_a_gpu_uses_one_device_and_never_waits_for_it(monkeypatch, name, words):
    run_fake_steps(lambda: build_model(name), monkeypatch, **words)


def test_fake_tensors_detect_a_rate_on_the_cpu(monkeypatch):
    class RatesOnTheCPU(MovingAverage):
        def __init__(self, module: nn.Module, decay: float):
            super().__init__(module, decay)
            self._smallest_rate = torch.zeros(1, device="cpu")

    monkeypatch.setitem(globals(), "MovingAverage", RatesOnTheCPU)
    with pytest.raises(RuntimeError, match="device"):
        run_fake_steps(lambda: build_model("lenet5"), monkeypatch, ema=True)


def test_fake_tensors_detect_a_read_from_the_device(monkeypatch):
    with pytest.raises(DataDependentOutputException):
        run_fake_steps(ReadsTheDevice, monkeypatch)
    with pytest.raises(DataDependentOutputException):
        run_fake_steps(plain_network, monkeypatch, optimizer="rmsprop")  # it counts its steps on the host


# --- on a GPU -----------------------------------------------------------------------------------------------------


@pytest.fixture
def deterministic_kernels(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # `set_determinism` would leave it set
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    before = torch.are_deterministic_algorithms_enabled()
    set_determinism(True)
    yield
    set_determinism(before)


@pytest.mark.parametrize("name", ["model_v1", "model_v3", "simple_cnn", "mnistnet", "lenet5", "ms_ran", "resnet18"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_cuda_graph_makes_the_eager_steps(gpu, deterministic_kernels, name, precision):
    # Within these steps, Adam turns a difference of 1e-7 into one of 0.1, so no tolerance separates right from wrong.
    words = {"build": lambda: build_model(name), "optimizer": "adam", "ema": True, "clip_grad_norm": 1.0, "steps": 20}
    results = []
    steps_a_replay = 4 if name in ("lenet5", "simple_cnn", "resnet18") else 1  # the other networks have dropout
    for wrap in (lambda step: CapturedStep(step, steps_a_replay, notify=pytest.fail), None):
        AcceleratorState._reset_state(True)
        results.append(run(wrap, accelerator=Accelerator(mixed_precision=precision), **words))
    found, expected = (state(each) for each in results)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def test_a_captured_run_ends_like_the_eager_one(gpu, tmp_path):
    words = ("epochs=1", "data.limit_train=3000", "tracking.wandb.mode=disabled", "log_every=5", "deterministic=true")
    losses, notes, weights = {}, {}, {}
    for choice in ("off", "step", "epoch"):
        recipe = load_recipe("model_v1_onecycle", *words, f"engine.capture={choice}")
        losses[choice] = train(recipe, tmp_path / choice)["train.last.loss"]
        weights[choice] = load_run(tmp_path / choice).model.state_dict()
        notes[choice] = (tmp_path / choice / "console.log").read_text().count("engine.capture:")
    assert notes == {"off": 0, "step": 0, "epoch": 1}  # the network has dropout: one step per replay
    assert losses["step"] == losses["epoch"] == pytest.approx(losses["off"], rel=0.05)
    for name, value in weights["off"].items():
        assert torch.equal(weights["step"][name], value), name
