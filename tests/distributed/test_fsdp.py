"""Which modules FSDP2 shards. tests/launch trains with sharded parameters."""

from __future__ import annotations

from torch import nn

from mnist_dist.distributed.fsdp import _callable_children
from mnist_dist.models import build_model


def test_the_entries_of_a_module_list_are_sharded_separately():
    """FSDP2 refuses a list of modules, because it is never called."""
    network = build_model("separable_cnn")
    children = list(_callable_children(network))
    assert not any(isinstance(child, nn.ModuleList) for child in children)
    sharded = {id(parameter) for child in children for parameter in child.parameters()}
    assert sharded == {id(parameter) for parameter in network.parameters()}
