"""A recorded step replayed makes the numbers of an eager one. On a GPU the recording is a CUDA graph; here, on any
machine, it is a list of operations that are done again on the very tensors they were done on, which is all that a graph
can do: what Python decides anew at each step, or reads from the device, shows as a difference or is refused."""

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mnist_dist import load_recipe, train
from mnist_dist.data import Augmentation, Batches, Images
from mnist_dist.engine import cuda_graph as capture
from mnist_dist.engine import train_step as step
from mnist_dist.engine.cuda_graph import WARM_UP_STEPS, CapturedStep
from mnist_dist.engine.distillation import Distillation
from mnist_dist.engine.ema import MovingAverage
from mnist_dist.engine.metrics import Meter
from mnist_dist.engine.optimizers import build_optimizer
from mnist_dist.engine.schedules import build_schedule, set_rates
from mnist_dist.engine.train_step import NotFinite, Update
from mnist_dist.models import build_model

NUM_SAMPLES, BATCH_SIZE, STEPS = 144, 16, 24  # nine full batches an epoch

# --- a recorder for machines without graphs -----------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    """Keeps every operation with the tensors it was given and gave."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        result = function(*args, **(kwargs or {}))
        self.done.append((function, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for function, args, kwargs, recorded in self.done:
            fresh = function(*args, **kwargs)
            for target, value in zip(tensors(recorded), tensors(fresh), strict=True):
                if target.untyped_storage().data_ptr() != value.untyped_storage().data_ptr():
                    target.copy_(value)


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [each for item in value for each in tensors(item)] if isinstance(value, list | tuple) else []


@contextmanager
def nothing_happens() -> Iterator[None]:
    """Puts the content of every tensor back: a graph's recording does not do what it records."""
    found = [each.detach() for each in gc.get_objects() if isinstance(each, Tensor) and each.device.type == "cpu"]
    before = [each.clone() for each in found]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(found, before, strict=True):
                tensor.copy_(value)


def record(body: Callable[[], None]) -> Callable[[], None]:
    with nothing_happens(), Recorder() as recorder:
        body()
    return recorder.replay


# --- the same run, eager and captured -----------------------------------------------------------------------------


def noisy_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 5, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(576, 10)
    )


def noise(samples: int = NUM_SAMPLES) -> Images:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (samples, 1, 28, 28), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 10, (samples,), generator=generator)
    return Images(images, labels, tuple("0123456789"), mean=0.5, std=0.29)


def run(
    captured: CapturedStep | None,
    *,
    build: Callable[[], nn.Module] = noisy_network,
    optimizer: str = "sgd",
    keywords: dict[str, Any] | None = None,
    ema: bool = False,
    data: Images | None = None,
    batch_size: int = BATCH_SIZE,
    steps: int = STEPS,
    first: int = 0,
    accelerator: Accelerator | None = None,
    looks: tuple[int, ...] = (),
    **update_keywords: Any,
) -> Update:
    accelerator, data = accelerator or Accelerator(cpu=True), data or noise()
    torch.manual_seed(0)
    module = build().to(accelerator.device)
    augmentation = Augmentation(rotation=20, translation=0.1)
    batches = Batches(len(data), batch_size, 3, augmentation=augmentation)
    made = build_optimizer(module.parameters(), optimizer, lr=0.25, **(keywords or {}))
    average = MovingAverage(module, 0.75) if ema else None
    lengths = {"steps_per_epoch": batches.steps_per_epoch, "total_steps": steps}
    schedule = build_schedule("step", lr=2**-5, step_size=1, gamma=0.5, **lengths)
    update = Update(
        accelerator, accelerator.prepare_model(module), module, made, batches, data.to(accelerator.device),
        meter=Meter(accelerator), average=average, captured=captured, **update_keywords,
    )  # fmt: skip
    for number in range(first, steps):
        epoch, index = divmod(number, batches.steps_per_epoch)
        set_rates(made, schedule, number)
        if index == 0 or number == first:  # as in `fit`: steps of an epoch share its plan
            plan = batches.plan(epoch, accelerator.device)
        update(plan, index, number)
        if number + 1 in looks:
            update.check()
    if captured is not None:
        captured.finish(update)
    return update


def state(update: Update) -> dict[str, Tensor]:
    found = dict(update.module.state_dict())
    if update.average:
        found |= {f"average.{name}": value for name, value in update.average.state_dict().items()}
    for place, each in enumerate(update.optimizer.state.values()):
        found |= {f"{place}.{key}": value for key, value in each.items()}
    gradients = {f"{place}.grad": each.grad for place, each in enumerate(update.module.parameters())}
    return found | gradients | {"sums": update.meter._sums, "norm": update._norm, "skipped": update._skipped}


def assert_equal(found: Update, expected: Update) -> None:
    found_state, expected_state = state(found), state(expected)
    assert found_state.keys() == expected_state.keys()
    for name, value in expected_state.items():
        assert torch.equal(found_state[name], value), name
    assert found.meter._own_samples == expected.meter._own_samples


@pytest.fixture
def on_device(monkeypatch):
    """Gradients are judged as on a GPU, without asking."""
    monkeypatch.setattr(step, "guards_on_device", lambda optimizer, accelerator: True)


def recorded(steps: int = 1) -> CapturedStep:
    return CapturedStep(torch.device("cpu"), steps, record, say=lambda line: pytest.fail(line))


@pytest.mark.parametrize(
    "words",
    [
        {},
        {"optimizer": "sgd", "keywords": {"momentum": 0.9, "nesterov": True}, "clip_grad_norm": 0.5},
        {"optimizer": "adam", "ema": True},
        {"optimizer": "adamw", "label_smoothing": 0.1, "micro_batch_size": 7},
        {"build": lambda: build_model("lenet5"), "batch_size": 20, "steps": 30},  # a short last batch stays eager
    ],
    ids=lambda words: "-".join(words) or "plain",
)
def test_replayed_steps_are_the_eager_ones(on_device, words):
    captured = recorded()
    found = run(captured, **words)
    assert captured._replay_one is not None
    assert_equal(found, run(None, **words))


def plain_network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 5, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10))


@pytest.mark.parametrize("together", [4, 50])  # the latter more than an epoch has
@pytest.mark.parametrize(
    "words",
    [
        {},
        {"looks": (8, 9, 17)},  # in the middle of a replay, and beside its ends
        {"batch_size": 20, "steps": 30, "optimizer": "adam", "ema": True},  # a short last batch finds steps that wait
        {"first": 5, "keywords": {"momentum": 0.9, "nesterov": True}},
    ],
    ids=str,
)
def test_several_steps_a_replay_are_the_eager_ones(on_device, words, together):
    captured = recorded(together)
    found = run(captured, build=plain_network, **words)
    assert captured._replay_all is not captured._replay_one is not None
    assert_equal(found, run(None, build=plain_network, **words))


def test_steps_wait_for_a_replay_until_someone_looks(on_device):
    captured = recorded(4)
    update = run(captured, build=plain_network, steps=WARM_UP_STEPS + 4)
    before = update.module[0].weight.detach().clone()
    plan = update.batches.plan(0)
    update(plan, WARM_UP_STEPS + 4, WARM_UP_STEPS + 4)
    assert torch.equal(update.module[0].weight, before)
    update.grad_norm()
    assert not torch.equal(update.module[0].weight, before)


def test_a_network_that_draws_gets_one_step_a_replay_and_says_so_once(on_device):
    said: list[str] = []
    captured = CapturedStep(torch.device("cpu"), 4, record, say=said.append)
    assert_equal(run(captured), run(None))
    assert captured._replay_all is captured._replay_one
    assert len(said) == 1 and "one step a replay" in said[0]


def test_a_run_that_goes_on_warms_up_again_and_makes_the_same_steps(on_device):
    expected = run(None, first=5)
    assert_equal(run(recorded(), first=5), expected)


def test_another_seed_s_epoch_of_the_same_number_brings_its_own_warps(on_device):
    captured = recorded()
    update = run(captured, steps=5)
    assert captured._plan is not None
    plan = Batches(NUM_SAMPLES, BATCH_SIZE, 99, augmentation=Augmentation(rotation=20)).plan(0)
    update(plan, 5, 5)
    assert plan.warps is not None and torch.equal(captured._plan.warps, plan.warps)


@pytest.mark.parametrize("together", [1, 3])
@pytest.mark.parametrize("bad_step", [1, WARM_UP_STEPS + 4])
def test_a_replayed_step_with_a_bad_gradient_is_passed_over_or_named(on_device, bad_step, together):
    data = noise()
    batches = Batches(NUM_SAMPLES, BATCH_SIZE, 3)
    images = data.images.float()
    images[batches.rows(batches.plan(0), bad_step)] = torch.nan
    data = Images(images, data.labels, data.classes, data.mean, data.std)
    words = {"data": data, "steps": 9, "ema": True, "optimizer": "adam", "build": plain_network}
    assert_equal(run(recorded(together), on_nonfinite="skip", **words), run(None, on_nonfinite="skip", **words))

    stopped = run(recorded(together), **words)
    with pytest.raises(NotFinite, match=f"step {bad_step} "):
        stopped.check()
    before = run(None, **words | {"steps": bad_step})
    for name, value in before.module.state_dict().items():
        assert torch.equal(stopped.module.state_dict()[name], value), name


class AsksTheDevice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(784, 10)

    def forward(self, images: Tensor) -> Tensor:
        flat = images.flatten(1)
        return self.layer(flat if float(flat.mean()) > 0 else -flat)


def test_a_network_that_cannot_be_recorded_trains_eagerly_and_says_so_once(on_device):
    said: list[str] = []
    found = run(CapturedStep(torch.device("cpu"), record=record, say=said.append), build=AsksTheDevice)
    assert len(said) == 1
    assert "not permitted when stream is capturing" in said[0]
    assert_equal(found, run(None, build=AsksTheDevice))


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ({}, None),
        ({"device": torch.device("cpu")}, "records no graphs"),
        ({"world_size": 2}, "several processes"),
        ({"scaler": True}, "bf16"),
        ({"moves_momentum": True}, "cycle_momentum=false"),
        ({"shards": True}, "logical_shards"),
        ({"compile_mode": "max-autotune"}, "graphs of its own"),
        ({"compile_mode": True}, None),
        ({"optimizer": torch.optim.RMSprop([torch.zeros(1)])}, "RMSprop has no fused kernel"),
    ],
    ids=str,
)
def test_what_cannot_be_captured_is_said_before(words, reason):
    optimizer = torch.optim.SGD([torch.zeros(1)], fused=True)
    usual = {"world_size": 1, "moves_momentum": False, "scaler": False, "shards": False, "compile_mode": False}
    found = capture.capture_obstacle(**({"device": torch.device("cuda"), "optimizer": optimizer} | usual | words))
    assert (found is None) if reason is None else (reason in found)


def test_on_a_cpu_the_user_who_asks_for_a_graph_is_told(tmp_path):
    words = ("engine.capture=step", "max_steps=2", "data.limit_train=300", "tracking.wandb.mode=disabled")
    train(load_recipe("debug", *words), tmp_path / "run")
    assert "engine.capture: all steps are eager: a cpu records no graphs" in (tmp_path / "run/console.log").read_text()


def test_a_compiled_network_trains_as_the_eager_one(tmp_path):
    words = ("max_steps=6", "data.limit_train=300", "tracking.wandb.mode=disabled", "log_every=1")
    losses = []
    for name, compiled in (("eager", "false"), ("compiled", "true")):
        train(load_recipe("debug", *words, f"compile={compiled}"), tmp_path / name)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses.append([line.split('"train/loss": ')[1].split(",")[0] for line in lines if "train/loss" in line])
    assert [float(each) for each in losses[1]] == pytest.approx([float(each) for each in losses[0]], rel=1e-4)


# --- a GPU that is not there --------------------------------------------------------------------------------------

GPU = torch.device("cuda", 0)


class PretendedGPU:
    """What an update asks of Accelerate, for PyTorch's fake tensors: they have a device and a shape, and no content.

    A step that brings tensors of two devices together, or asks one for its content, fails as it would on the device and
    in a recording. The backward pass and the optimizer's kernel are left out: they want the driver.
    """

    device = torch.device("cuda")  # as Accelerate names the GPU of a single process
    num_processes, process_index, scaler, is_main_process = 1, 0, None, True

    def __init__(self, module: nn.Module):
        self._parameters = list(module.parameters())

    def no_sync(self, model: nn.Module) -> AbstractContextManager[None]:
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        assert loss.device == GPU and loss.ndim == 0
        for parameter in self._parameters:
            parameter.grad = torch.zeros_like(parameter)

    def clip_grad_norm_(self, parameters: list[Tensor], max_norm: float) -> Tensor:
        return nn.utils.clip_grad_norm_(parameters, max_norm)


def pretend_a_step(
    build: Callable[[], nn.Module],
    monkeypatch: pytest.MonkeyPatch,
    *,
    optimizer: str = "adam",
    ema: bool = False,
    learns: bool = False,
    elastic: float = 0.0,
    **keywords: Any,
) -> None:
    with FakeTensorMode(), GPU:
        try:
            torch.zeros(1).copy_(torch.ones(1))
        except RuntimeError as error:
            pytest.skip(f"fake tensors of torch {torch.__version__} want the driver themselves: {error}")
    # A copy of a network, as averaged weights begin with, stays among the tensors of its mode.
    monkeypatch.setattr(FakeTensorMode, "__deepcopy__", lambda self, memo: self, raising=False)
    monkeypatch.setattr(Update, "seed", lambda self, step, piece: None)
    with FakeTensorMode():
        with GPU:
            module, teacher = build(), build_model("lenet5").eval()
            images = torch.zeros(64, 1, 28, 28, dtype=torch.uint8)
            data = Images(images, torch.zeros(64, dtype=torch.int64), tuple("0123456789"), mean=0.1, std=0.3)
        augmentation = Augmentation(rotation=10, elastic=elastic, fill=elastic, interpolation="bilinear")
        batches = Batches(64, 16, 0, augmentation=augmentation)
        made = build_optimizer(module.parameters(), optimizer, lr=0.1)
        monkeypatch.setattr(made, "step", lambda: None)
        accelerator: Any = PretendedGPU(module)
        teachers = [(teacher, 0.2, 0.3)]
        update = Update(
            accelerator, module, module, made, batches, data, meter=Meter(accelerator),
            average=MovingAverage(module, 0.9) if ema else None,
            distillation=Distillation(teachers, weight=0.5, temperature=2, mean=0.1, std=0.3) if learns else None,
            **keywords,
        )  # fmt: skip
        assert update.latches == (optimizer != "rmsprop")
        update.compute(batches.plan(0, accelerator.device), 0, 0)
        capture.rates_on_device(made)
        assert all(group["lr"].device == GPU for group in made.param_groups)
        update.compute(batches.plan(0, accelerator.device), 1, 1)


@pytest.mark.parametrize("name", ["model_v1", "model_v3", "simple_cnn", "mnistnet", "lenet5", "ms_ran", "resnet18"])
@pytest.mark.parametrize(
    "words",
    [
        {"optimizer": "sgd"},
        {"ema": True, "clip_grad_norm": 1.0, "on_nonfinite": "skip"},
        {"learns": True, "label_smoothing": 0.1, "micro_batch_size": 5, "elastic": 1.4},
    ],
    ids=lambda words: "-".join(words),
)
def test_a_step_on_a_gpu_stays_there_and_never_waits(monkeypatch, name, words):
    pretend_a_step(lambda: build_model(name), monkeypatch, **words)


def test_an_averaged_weight_s_count_on_the_cpu_would_have_been_found(monkeypatch):
    class Elsewhere(MovingAverage):
        def __init__(self, module: nn.Module, decay: float):
            super().__init__(module, decay)
            self.n_averaged = torch.zeros((), dtype=torch.int64, device="cpu")

    monkeypatch.setitem(globals(), "MovingAverage", Elsewhere)
    with pytest.raises(RuntimeError, match="device"):
        pretend_a_step(lambda: build_model("lenet5"), monkeypatch, ema=True)


def test_a_question_to_the_device_would_have_been_found(monkeypatch):
    with pytest.raises(DataDependentOutputException):
        pretend_a_step(AsksTheDevice, monkeypatch)
    with pytest.raises(DataDependentOutputException):
        pretend_a_step(plain_network, monkeypatch, optimizer="rmsprop")  # no kernel of its that could judge


# --- on a GPU -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model_v1", "model_v3", "simple_cnn", "mnistnet", "lenet5", "ms_ran", "resnet18"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_cuda_graph_makes_the_eager_steps(gpu, name, precision):
    torch.backends.cudnn.benchmark = False
    words = {"build": lambda: build_model(name), "optimizer": "adam", "ema": True, "clip_grad_norm": 1.0, "steps": 20}
    results = []
    together = 4 if name in ("lenet5", "simple_cnn", "resnet18") else 1  # the others have dropout
    for captured in (CapturedStep(gpu, together, say=lambda line: pytest.fail(line)), None):
        AcceleratorState._reset_state(True)
        results.append(run(captured, accelerator=Accelerator(mixed_precision=precision), **words))
    found, expected = (state(each) for each in results)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-2, atol=1e-3, msg=lambda text, key=key: f"{key}: {text}")


def test_a_captured_run_ends_where_the_eager_one_does(gpu, tmp_path):
    words = ("epochs=1", "data.limit_train=3000", "tracking.wandb.mode=disabled", "log_every=5")
    losses = {}
    for how in ("off", "step", "epoch"):
        summary = train(load_recipe("model_v1_onecycle", *words, f"engine.capture={how}"), tmp_path / how)
        losses[how] = summary["train.last.loss"]
    assert "eager" not in (tmp_path / "step/console.log").read_text()
    assert "one step a replay" in (tmp_path / "epoch/console.log").read_text()
    assert losses["step"] == losses["epoch"] == pytest.approx(losses["off"], rel=0.05)
