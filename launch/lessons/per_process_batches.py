"""Trains one epoch of 640 images with the loop of Accelerate's tutorial: `torchrun … per_process_batches.py`.

`--split-batches` makes the batch of the DataLoader the batch of all processes together.
"""

import sys

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from mnist_dist import build_model
from mnist_dist.data import load_dataset

train = load_dataset("synthetic", limit_train=640).train
dataset = TensorDataset(train.normalize(train.images), train.labels)
torch.manual_seed(0)  # the same weights in every process
model = build_model("small_cnn")
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.1, total_iters=10)
loader = DataLoader(dataset, batch_size=64, shuffle=True, generator=torch.Generator().manual_seed(0))

settings = DataLoaderConfiguration(split_batches="--split-batches" in sys.argv)
accelerator = Accelerator(dataloader_config=settings, step_scheduler_with_optimizer=True)
model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
accelerator.print(f"{len(loader)} updates of an epoch\nupdate  images  learning rate    loss")
for update, (images, labels) in enumerate(loader, start=1):
    rate = optimizer.param_groups[0]["lr"]
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(images), labels)
    accelerator.backward(loss)
    optimizer.step()
    scheduler.step()
    count, mean = accelerator.gather(torch.tensor([len(images)])).sum(), accelerator.gather(loss.detach()).mean()
    accelerator.print(f"{update:6} {count:7} {rate:14.4f} {mean:7.4f}")
accelerator.end_training()
