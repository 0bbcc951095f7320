"""Prints what each process stores and sends for ResNet-18: `torchrun --nproc_per_node 2 launch/lessons/sharded.py`."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mnist_dist import build_model
from mnist_dist.distributed.fsdp import shard_parameters


class Traffic(TorchDispatchMode):
    """Adds up what a process sends if the processes pass the data around in a ring, as NCCL does."""

    sent = 0.0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        others = (dist.get_world_size() - 1) / dist.get_world_size()
        if function.name() == "c10d::allreduce_":
            self.sent += 2 * others * megabytes(args[0])  # every piece travels twice: to be summed, and as a sum
        elif function.name() in ("c10d::_allgather_base_", "c10d::_reduce_scatter_base_"):
            self.sent += others * max(megabytes([args[0]]), megabytes([args[1]]))
        return function(*args, **(kwargs or {}))


def megabytes(tensors: Iterable[Tensor]) -> float:
    """Returns the size of tensors; of a sharded tensor only the part that this process stores."""
    local = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
    return sum(tensor.numel() * tensor.element_size() for tensor in local) / 1e6


def measure(way: str) -> dict[str, float]:
    """Trains two steps and measures the second one."""
    torch.manual_seed(0)
    model = build_model("resnet18")
    if way != "copied":
        shard_parameters(model, torch.device("cpu"), smallest=1_000_000, reshard=way == "sharded")
    optimizer = torch.optim.Adam(model.parameters())
    images, labels = torch.rand(8, 1, 28, 28), torch.arange(8)
    for _ in range(2):
        optimizer.zero_grad()
        with Traffic() as traffic:
            nn.functional.cross_entropy(model(images), labels).backward()
            if way == "copied":
                for parameter in model.parameters():
                    dist.all_reduce(parameter.grad)
        optimizer.step()
    return {
        "parameters": megabytes(model.parameters()),
        "gradients": megabytes(each.grad for each in model.parameters() if each.grad is not None),
        "state of Adam": megabytes(each for state in optimizer.state.values() for each in state.values()),
        "sent in each step": traffic.sent,
    }


if __name__ == "__main__":
    dist.init_process_group("gloo")
    columns = {way: measure(way) for way in ("copied", "sharded", "kept")}
    if dist.get_rank() == 0:
        print(f"{'megabytes of each process':26}", *(f"{way:>8}" for way in columns))
        for row in columns["copied"]:
            print(f"{row:26}", *(f"{column[row]:8.1f}" for column in columns.values()))
    dist.destroy_process_group()
