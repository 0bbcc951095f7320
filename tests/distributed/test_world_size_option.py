"""The expected number of processes: one number, or a range for an elastic run."""

from __future__ import annotations

import argparse
from types import SimpleNamespace

import pytest
import torch

from mnist_dist.cli import parse
from mnist_dist.distributed.launcher import check_size
from mnist_dist.distributed.world_size_option import describe_world_size, is_elastic, parse_world_size


@pytest.mark.parametrize(("text", "accepted"), [("1", [1]), ("4", [4]), ("1:4", [1, 2, 3, 4]), ("2:2", [2])])
def test_a_number_or_a_range_is_accepted(text, accepted):
    found = parse_world_size(text)
    assert list(found) == accepted
    assert parse_world_size(describe_world_size(found)) == found


@pytest.mark.parametrize("text", ["0", "4:1", "0:2", "1:", ":4", "two", "1:2:3", "-1"])
def test_another_text_is_refused(text, refused):
    with pytest.raises(argparse.ArgumentTypeError):
        parse_world_size(text)
    assert refused(lambda: parse("train", ["--recipe", "debug", f"--world-size={text}"])) == [("--world-size", "usage")]


@pytest.mark.parametrize(("processes", "accepted"), [(1, True), (3, True), (4, True), (5, False)])
def test_the_number_of_processes_must_be_in_the_range(processes, accepted, refused):
    state = SimpleNamespace(num_processes=processes, device=torch.device("cpu"))
    if accepted:
        check_size(state, range(1, 5))
    else:
        assert refused(lambda: check_size(state, range(1, 5))) == [("--world-size", "world")]


@pytest.mark.parametrize(("restarts", "elastic"), [(None, False), ("0", False), ("3", True)])
def test_a_run_is_elastic_if_torchrun_restarts_its_processes(restarts, elastic, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_MAX_RESTARTS", raising=False)
    if restarts is not None:
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
    assert is_elastic() == elastic
