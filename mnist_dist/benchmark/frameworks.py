"""Builds the training loops of other frameworks, each with a DataLoader: plain PyTorch, Accelerate, Lightning.

Each loop follows its framework's documentation and is tuned as that documentation advises: the fastest number of
persistent workers on this machine, pinned memory, non-blocking transfers, and kernels chosen by trial.
"""

from __future__ import annotations

import importlib.util
import itertools
import logging
import math
import threading
import time
import warnings
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler
from torch.utils.data import Dataset as TorchDataset
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from mnist_dist.benchmark.baselines import BenchmarkSetup, TimedLoop, fastest_kernels, plain_step, training_step
from mnist_dist.data import Images
from mnist_dist.data.images import as_numbers
from mnist_dist.distributed.devices import count_local_processes
from mnist_dist.machine.limits import count_cores
from mnist_dist.recipe.schema import Recipe

HAS_LIGHTNING = importlib.util.find_spec("lightning") is not None

# --- PyTorch and Accelerate ---------------------------------------------------------------------------------------


def plain_loader(setup: BenchmarkSetup, workers: int, name: str = "PyTorch + DataLoader") -> TimedLoop:
    """Builds the training loop of PyTorch's quickstart and performance guide."""
    loader = _loader(setup, workers, distributed=setup.state.num_processes > 1)

    def batches() -> Iterator[list[Tensor]]:
        for epoch in itertools.count():
            if isinstance(loader.sampler, DistributedSampler):
                loader.sampler.set_epoch(epoch)
            for batch in loader:
                yield [tensor.to(setup.state.device, non_blocking=True) for tensor in batch]

    return setup.baseline(name, plain_step(setup), batches())


def accelerate_loader(setup: BenchmarkSetup, workers: int) -> TimedLoop:
    """Builds the training loop of Accelerate's quick tour: a prepared model, optimizer and DataLoader."""
    transfers = DataLoaderConfiguration(non_blocking=True)
    accelerator, module = Accelerator(mixed_precision=setup.precision, dataloader_config=transfers), setup.module()
    model, optimizer, loader = accelerator.prepare(module, setup.optimizer(module), _loader(setup, workers))
    limit = setup.recipe.clip_grad_norm
    step = training_step(
        optimizer,
        lambda images, labels: setup.loss(model(images), labels),
        backward=accelerator.backward,
        clip=None if limit is None else lambda: accelerator.clip_grad_norm_(model.parameters(), limit),
    )
    batches = (batch for _ in itertools.count() for batch in loader)
    return setup.baseline("Accelerate + DataLoader", step, batches)


# --- Lightning ----------------------------------------------------------------------------------------------------


def lightning_loader(setup: BenchmarkSetup, workers: int) -> TimedLoop:
    """Builds Lightning's Trainer in its `barebones` mode, which switches off everything that costs time.

    Lightning's `fit` cannot pause between rounds, so it runs in a thread that waits for the next round.
    """
    rounds: SimpleQueue[int] = SimpleQueue()
    results: SimpleQueue[float | BaseException] = SimpleQueue()
    trainer = _lightning_trainer(setup, _rounds_callback(setup, rounds, results))

    def fit() -> None:
        try:
            trainer.fit(_lightning_module(setup), _loader(setup, workers))
        except BaseException as error:
            results.put(error)

    thread = threading.Thread(target=fit, name="lightning", daemon=True)
    thread.start()

    @fastest_kernels()
    def run(count: int) -> float:
        rounds.put(count)
        if isinstance(result := results.get(), BaseException):
            raise result
        return result

    def close() -> None:
        rounds.put(0)
        thread.join()

    return TimedLoop("Lightning + DataLoader", run, close)


def _lightning_module(setup: BenchmarkSetup) -> Any:
    """Returns the network, loss and optimizer as a LightningModule."""
    import lightning

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = setup.module()

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            images, labels = batch
            return setup.loss(self.network(images), labels)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return setup.optimizer(self.network)

        def configure_gradient_clipping(self, *_: Any, gradient_clip_val: float | None = None, **__: Any) -> None:
            # Lightning's own method refuses fused optimizers under autocast, even if no gradient is scaled.
            if gradient_clip_val is not None:
                nn.utils.clip_grad_norm_(self.network.parameters(), gradient_clip_val)

    return Classifier()


def _rounds_callback(
    setup: BenchmarkSetup, rounds: SimpleQueue[int], results: SimpleQueue[float | BaseException]
) -> Any:
    """Returns a Lightning callback that runs one round for each number of steps that it takes from `rounds`.

    After a round it puts the duration in seconds into `results`. A round of 0 steps ends the training.
    """
    import lightning

    class Rounds(lightning.Callback):
        def on_train_start(self, trainer: Any, *_: Any) -> None:
            self.left = rounds.get()
            trainer.should_stop = self.left == 0
            self.started = time.perf_counter()

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            self.left -= 1
            if self.left == 0:
                setup.synchronize()
                results.put(time.perf_counter() - self.started)
                self.on_train_start(trainer)

    return Rounds()


def _lightning_trainer(setup: BenchmarkSetup, callback: Any) -> Any:
    """Returns a Trainer for the processes that the launcher started."""
    import lightning

    # Lightning warns about barebones mode, which is intended here. The level is set after
    # the import, because the import sets it too.
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    device, world_size = setup.state.device, setup.state.num_processes
    local_world_size = count_local_processes(world_size)
    return lightning.Trainer(
        accelerator="gpu" if device.type == "cuda" else device.type,
        devices=[device.index or 0] if device.type == "cuda" and world_size == 1 else local_world_size,
        num_nodes=world_size // local_world_size,
        strategy="ddp" if world_size > 1 else "auto",
        precision="bf16-mixed" if setup.precision == "bf16" else "32-true",
        gradient_clip_val=setup.recipe.clip_grad_norm,
        max_epochs=-1,
        callbacks=[callback],
        barebones=True,
    )


# --- the DataLoader -----------------------------------------------------------------------------------------------


def best_workers(setup: BenchmarkSetup, steps: int) -> int:
    """Returns the number of DataLoader workers with which PyTorch's loop is fastest. Collective: call on every rank."""
    cores = max(1, count_cores() // setup.state.num_processes)
    seconds = {}
    for workers in sorted({0, 1, *(min(count, cores) for count in (2, 4, 8, 16))}):
        loop = plain_loader(setup, workers)
        loop.run(3)  # starts the workers
        seconds[workers] = loop.run(steps)
    return broadcast_object_list([min(seconds, key=seconds.__getitem__)])[0]


def _loader(setup: BenchmarkSetup, workers: int, *, distributed: bool = False) -> DataLoader:
    data = _PerImage(setup.recipe, setup.dataset.train)
    return DataLoader(
        data,
        batch_size=setup.local_batch_size,
        shuffle=not distributed,
        sampler=DistributedSampler(data) if distributed else None,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=setup.state.device.type == "cuda",
    )


class _PerImage(TorchDataset):
    """Applies torchvision's usual transforms to one image at a time: those of PIL images, ToTensor, Normalize."""

    def __init__(self, recipe: Recipe, data: Images):
        augment, fill = recipe.data.augment, [int(level) for level in as_numbers(recipe.data.augment.fill)]
        steps: list[Any] = [transforms.ToPILImage()]
        if augment.crop_padding:
            steps.append(transforms.RandomCrop(data.shape[1:], augment.crop_padding, padding_mode="reflect"))
        if augment.flip:
            steps.append(transforms.RandomHorizontalFlip())
        if augment.build().warps_images:
            steps.append(
                transforms.RandomAffine(
                    augment.rotation,
                    translate=(augment.translation, augment.translation) if augment.translation else None,
                    scale=tuple(augment.scale) if augment.scale else None,
                    shear=augment.shear or None,
                    interpolation=InterpolationMode(augment.interpolation),
                    fill=fill,
                )
            )
        if augment.brightness or augment.contrast or augment.saturation:
            steps.append(transforms.ColorJitter(augment.brightness, augment.contrast, augment.saturation))
        if augment.randaugment:
            steps.append(transforms.RandAugment(*augment.randaugment, fill=fill))
        steps.append(transforms.ToTensor())
        if augment.elastic:
            # torchvision pads by reflection with 4 sigma pixels, which must be fewer than the image has.
            sigma = min(augment.elastic_sigma, 6.5)
            # torchvision's alpha counts half pixels and scales uniform noise in ±1 before smoothing.
            alpha = augment.elastic * 4 * sigma * math.sqrt(3 * math.pi)
            steps.append(transforms.ElasticTransform(alpha, sigma))
        if augment.cutout:  # this square lies inside the image
            share = augment.cutout**2 / (data.shape[1] * data.shape[2])
            value = [level / 255 for level in fill] * (data.shape[0] if len(fill) == 1 else 1)
            steps.append(transforms.RandomErasing(1.0, scale=(share, share), ratio=(1.0, 1.0), value=value))
        steps.append(transforms.Normalize(data.mean, data.std))
        self._data, self._transform = data, transforms.Compose(steps)

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._transform(self._data.images[index]), int(self._data.labels[index])
