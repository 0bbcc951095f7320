"""Fixtures for all tests, and the marker of each test.

Imports torch late: with xdist, the process that only distributes the tests needs it not at all.
"""

from __future__ import annotations

import gc
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mnist_dist.distributed.signals import SIGNALS
from mnist_dist.machine.limits import count_cores, free_memory
from tests.processes import draw_synthetic_once

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from mnist_dist.data import Dataset
    from mnist_dist.run.reader import Run

# Several tests run at once on few cores: waiting threads would take most of the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The processes of xdist keep freed memory: to get it from the kernel again takes a twentieth of their time.
os.environ |= {
    "MALLOC_MMAP_THRESHOLD_": str(2**29),
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
    "MALLOC_TOP_PAD_": str(2**24),
}
# A test of W&B sets its own mode.
os.environ["WANDB_MODE"] = "disabled"
# Tests use the CPU on every machine; a test for GPUs requests the fixture `gpu`.
os.environ["ACCELERATE_USE_CPU"] = "true"

MARKED_FOLDERS = {"launch": "launch", "faults": "faults", "cluster": "cluster"}
"""Folder below tests/ -> marker of its tests."""
WAITING_FOLDERS = ("lessons", "faults", "launch", "doctor", "distributed")
"""Folders below tests/ with tests that start processes and wait for them, those that wait longest first."""
MARKED_FIXTURES = {"mnist_root": "mnist", "gpu": "gpu", "browser": "browser", "machines": "root"}
"""Fixture -> marker of the tests that request it."""


def wants_cluster(config: pytest.Config) -> bool:
    """Returns whether the command line names the marker `cluster`: its tests take minutes, and only one can run."""
    return "cluster" in config.option.markexpr.replace("not cluster", "")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Returns how many processes run the tests: two more than cores, because some tests only wait.

    More than 16 would only repeat the imports, and a process may need 2 GB. The tests of the cluster run in one
    process, because a machine can have one cluster at a time.
    """
    workers = min(count_cores() + 2, 16, free_memory() // 2**31)
    return 1 if wants_cluster(config) else max(1, workers)


def pytest_collection(session: pytest.Session) -> None:
    """Prepares this process for the tests, unless it only distributes them to the processes of xdist."""
    if getattr(session.config.option, "dist", "no") == "no":
        import torch

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        draw_synthetic_once()


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
    """Adds the markers, so that `pytest -m "not launch"` selects by folder and by fixture; orders what is selected."""
    for item in items:
        marks = [mark for folder, mark in MARKED_FOLDERS.items() if folder in folders_of(item)]
        marks += [mark for fixture, mark in MARKED_FIXTURES.items() if fixture in getattr(item, "fixturenames", ())]
        for mark in marks:
            item.add_marker(mark)
    if not wants_cluster(config):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("cluster")])
        items[:] = [item for item in items if not item.get_closest_marker("cluster")]
    yield
    if hasattr(config, "workerinput"):
        items[:] = waiting_first(items, config.workerinput["workercount"])


def pytest_collection_finish() -> None:
    """Excludes the objects of the imports, about a million, from every garbage collection of the tests."""
    gc.freeze()


def waiting_place(item: pytest.Item) -> int | None:
    """Returns the place among the waiting tests of one that waits for the compiler or other processes, else None."""
    if "compiler" in getattr(item, "fixturenames", ()):
        return -1
    return min((WAITING_FOLDERS.index(name) for name in folders_of(item) if name in WAITING_FOLDERS), default=None)


def waiting_first(items: list[pytest.Item], workers: int) -> list[pytest.Item]:
    """Returns the tests in an order in which each process of xdist starts with its share of the waiting tests.

    At the start xdist gives each process the next equal part of the list; a process that has finished takes tests from
    the end of another part. A test that waits costs little while other tests run, but at the end all would wait for it.
    """
    places = [(waiting_place(item), item) for item in items]
    waiting = [item for place in range(-1, len(WAITING_FOLDERS)) for each, item in places if each == place]
    others = iter([item for place, item in places if place is None])
    files = list(dict.fromkeys(item.path for item in waiting))
    ordered: list[pytest.Item] = []
    for worker in range(workers):
        own = set(files[worker::workers])  # tests of one file share their fixtures
        ordered += [item for item in waiting if item.path in own]
        ordered += islice(others, max(0, len(items) * (worker + 1) // workers - len(ordered)))
    return [*ordered, *others]


def folders_of(item: pytest.Item) -> set[str]:
    """Returns the names of the folders between tests/ and the test."""
    return set(item.path.relative_to(Path(__file__).parent).parent.parts)


@pytest.fixture(autouse=True)
def no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Switches off the pictures of runs, which take longer than the run. A test marked `pictures` draws them."""
    if request.node.get_closest_marker("pictures") is None:
        monkeypatch.setattr("mnist_dist.run.summary._pictures", lambda *arguments: [])


@pytest.fixture(autouse=True)
def signal_handlers() -> Iterator[None]:
    """Restores the signal handlers that a command sets. Programs that later tests start would inherit ignored ones."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    """A new Accelerator on the CPU. Without the reset, Accelerate keeps device and precision of an earlier test."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """The first CUDA GPU, which Accelerate uses during the test."""
    import torch
    from accelerate.state import AcceleratorState

    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU on this machine")
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield torch.device("cuda", 0)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def compiler() -> Iterator[None]:
    """Lets torch.compile work in one thread: more would be processes that import torch."""
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("torch.compile needs a C++ compiler")
    import torch

    with torch._inductor.config.patch(compile_threads=1):
        yield


@pytest.fixture(scope="session")
def mnist_root() -> Path:
    """The folder that holds all files of MNIST/raw: $MNIST_DIST_DATA or ./data."""
    stems = [f"{part}-{what}-ubyte" for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1")]
    roots = [Path(root) for root in (os.environ.get("MNIST_DIST_DATA"), "data") if root]
    for root in roots:
        if all(list((root / "MNIST" / "raw").glob(f"{stem}*")) for stem in stems):
            return root.absolute()
    pytest.skip(f"MNIST is not on this machine: not found in {' or '.join(map(str, roots))} (set MNIST_DIST_DATA)")


@pytest.fixture(scope="session")
def _finished_debug_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from accelerate.state import AcceleratorState

    from mnist_dist import load_recipe, train

    folder = tmp_path_factory.mktemp("debug") / "run"
    AcceleratorState._reset_state(reset_partial_state=True)
    train(load_recipe("debug", "tracking.plots=false", "tracking.wandb.mode=disabled"), folder)
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder


@pytest.fixture
def debug_run(_finished_debug_run: Path, tmp_path: Path) -> Path:
    """A copy of a finished run of the recipe `debug` (synthetic data), trained once per test session."""
    return shutil.copytree(_finished_debug_run, tmp_path / "debug_run")


@pytest.fixture
def colour_data() -> Iterator[Dataset]:
    """Colour images of 24×40 pixels in three classes, which are the data set `synthetic` during the test."""
    from mnist_dist.data import load_dataset
    from tests.colour import as_synthetic

    with as_synthetic():
        yield load_dataset("synthetic")


@pytest.fixture(scope="session")
def _finished_colour_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from accelerate.state import AcceleratorState

    from tests.colour import train_on_colour

    folder = tmp_path_factory.mktemp("colour") / "run"
    AcceleratorState._reset_state(reset_partial_state=True)
    train_on_colour(folder)
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder


@pytest.fixture
def colour_run(_finished_colour_run: Path, colour_data: Dataset, tmp_path: Path) -> Run:
    """A copy of a finished run on `colour_data`, trained once per test session."""
    from mnist_dist import load_run
    from tests.colour import CODE

    return load_run(shutil.copytree(_finished_colour_run, tmp_path / "colour_run"), "last", CODE)


@pytest.fixture
def refused() -> Callable[[Callable[[], object]], list[tuple[str, str]]]:
    """Calls an action that must raise RecipeError; returns (key, kind) of each problem."""
    from mnist_dist.errors import RecipeError

    def call(action: Callable[[], object]) -> list[tuple[str, str]]:
        with pytest.raises(RecipeError) as found:
            action()
        return [(problem.key, problem.kind) for problem in found.value.problems]

    return call
