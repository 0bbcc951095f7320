"""What one would write instead of this trainer, with a DataLoader: plain PyTorch, Accelerate, Lightning.

Each is written from its own documentation and tuned as that advises: workers, as many as are fastest here, that
persist; pinned memory and transfers that nobody waits for; kernels chosen by trial.
"""

from __future__ import annotations

import importlib.util
import itertools
import logging
import math
import os
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

from mnist_dist.benchmark.baselines import BenchmarkSetup, TimedLoop, fastest_kernels, plain_step
from mnist_dist.data import Images
from mnist_dist.recipe.schema import Recipe

HAS_LIGHTNING = importlib.util.find_spec("lightning") is not None


def plain_loader(task: BenchmarkSetup, workers: int, name: str = "PyTorch + DataLoader") -> TimedLoop:
    """PyTorch's own training loop with a DataLoader, as its quickstart and its tuning guide have it."""
    loader = _loader(task, workers, distributed=task.state.num_processes > 1)

    def batches() -> Iterator[list[Tensor]]:
        for epoch in itertools.count():
            if isinstance(loader.sampler, DistributedSampler):
                loader.sampler.set_epoch(epoch)
            for batch in loader:
                yield [tensor.to(task.state.device, non_blocking=True) for tensor in batch]

    return task.peer(name, plain_step(task), batches())


def accelerate_loader(task: BenchmarkSetup, workers: int) -> TimedLoop:
    """Accelerate with a prepared model, optimizer and DataLoader, as its quick tour has it."""
    transfers = DataLoaderConfiguration(non_blocking=True)
    accelerator, module = Accelerator(mixed_precision=task.precision, dataloader_config=transfers), task.module()
    model, optimizer, loader = accelerator.prepare(module, task.optimizer(module), _loader(task, workers))

    def step(images: Tensor, labels: Tensor) -> None:
        optimizer.zero_grad()
        accelerator.backward(task.loss(model(images), labels))
        if task.recipe.clip_grad_norm is not None:
            accelerator.clip_grad_norm_(model.parameters(), task.recipe.clip_grad_norm)
        optimizer.step()

    source = (batch for _ in itertools.count() for batch in loader)
    return task.peer("Accelerate + DataLoader", step, source)


def lightning_loader(task: BenchmarkSetup, workers: int) -> TimedLoop:
    """Lightning's Trainer with all that costs time switched off: its `barebones` mode, made for such measurements.

    `fit` cannot be left and taken up again, so it has a thread of its own, which waits from one round to the next.
    """
    import lightning

    # It advises against what is meant so.
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    asked: SimpleQueue[int] = SimpleQueue()
    answers: SimpleQueue[float | BaseException] = SimpleQueue()

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = task.module()

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            images, labels = batch
            return task.loss(self.network(images), labels)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return task.optimizer(self.network)

        def configure_gradient_clipping(self, *_: Any, gradient_clip_val: float | None = None, **__: Any) -> None:
            # Lightning's own refuses fused optimizers under autocast, also where no gradient is scaled.
            if gradient_clip_val is not None:
                nn.utils.clip_grad_norm_(self.network.parameters(), gradient_clip_val)

    class Rounds(lightning.Callback):
        def on_train_start(self, trainer: Any, *_: Any) -> None:
            self.left = asked.get()
            trainer.should_stop = self.left == 0
            self.started = time.perf_counter()

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            self.left -= 1
            if self.left == 0:
                task.wait()
                answers.put(time.perf_counter() - self.started)
                self.on_train_start(trainer)

    device, world_size = task.state.device, task.state.num_processes
    of_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    trainer = lightning.Trainer(
        accelerator="gpu" if device.type == "cuda" else device.type,
        devices=[device.index or 0] if device.type == "cuda" and world_size == 1 else of_this_machine,
        num_nodes=world_size // of_this_machine,
        strategy="ddp" if world_size > 1 else "auto",
        precision="bf16-mixed" if task.precision == "bf16" else "32-true",
        gradient_clip_val=task.recipe.clip_grad_norm,
        max_epochs=-1,
        callbacks=[Rounds()],
        barebones=True,
    )

    def fit() -> None:
        try:
            trainer.fit(Classifier(), _loader(task, workers))
        except BaseException as error:
            answers.put(error)

    thread = threading.Thread(target=fit, name="lightning", daemon=True)
    thread.start()

    @fastest_kernels()
    def run(steps: int) -> float:
        asked.put(steps)
        if isinstance(answer := answers.get(), BaseException):
            raise answer
        return answer

    def close() -> None:
        asked.put(0)
        thread.join()

    return TimedLoop("Lightning + DataLoader", run, close)


def best_workers(task: BenchmarkSetup, steps: int) -> int:
    """The number of DataLoader workers with which the plain loop is fastest here, so that no peer is badly tuned."""
    cores = max(1, (os.cpu_count() or 1) // task.state.num_processes)
    seconds = {}
    for workers in sorted({0, 1, *(min(count, cores) for count in (2, 4, 8, 16))}):
        loop = plain_loader(task, workers)
        loop.run(3)  # the workers start
        seconds[workers] = loop.run(steps)
    return broadcast_object_list([min(seconds, key=seconds.__getitem__)])[0]


def _loader(task: BenchmarkSetup, workers: int, *, distributed: bool = False) -> DataLoader:
    data = _PerImage(task.recipe, task.dataset.train)
    return DataLoader(
        data,
        batch_size=task.share,
        shuffle=not distributed,
        sampler=DistributedSampler(data) if distributed else None,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=task.state.device.type == "cuda",
    )


class _PerImage(TorchDataset):
    """torchvision's usual pipeline, image by image: PIL, random affine, ToTensor, Normalize."""

    def __init__(self, recipe: Recipe, data: Images):
        augment = recipe.data.augment
        steps: list[Any] = [transforms.ToPILImage()]
        if not augment.build().is_identity:
            steps.append(
                transforms.RandomAffine(
                    augment.rotation,
                    translate=(augment.translation, augment.translation) if augment.translation else None,
                    scale=tuple(augment.scale) if augment.scale else None,
                    shear=augment.shear or None,
                    interpolation=InterpolationMode(augment.interpolation),
                    fill=int(augment.fill),
                )
            )
        steps.append(transforms.ToTensor())
        if augment.elastic:
            sigma = min(augment.elastic_sigma, 6.5)  # torchvision mirrors four of them beyond the edge
            # Its alpha is in half pixels, of uniform noise in ±1 before it is smoothed.
            alpha = augment.elastic * 4 * sigma * math.sqrt(3 * math.pi)
            steps.append(transforms.ElasticTransform(alpha, sigma))
        steps.append(transforms.Normalize((data.mean,), (data.std,)))
        self._data, self._transform = data, transforms.Compose(steps)

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._transform(self._data.images[index]), int(self._data.labels[index])
