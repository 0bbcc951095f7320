"""The checks of the doctor: each runs a measurement on all ranks and turns the results into findings.

Every rank computes the same findings; rank 0 prints them.
"""

from __future__ import annotations

import platform
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mnist_dist.distributed.devices import device_name
from mnist_dist.distributed.launcher import check_size, launch_settings
from mnist_dist.doctor.gpu import query_gpu
from mnist_dist.doctor.measurements import (
    SHARED_MEMORY,
    SIZES,
    WANDB_SECONDS,
    FolderMeasurement,
    clock_offset,
    free_space,
    limits,
    measure_all_reduce,
    measure_links,
    read_clock,
    time_request,
)
from mnist_dist.doctor.ranks import ActionFailed, Ranks
from mnist_dist.errors import RecipeError
from mnist_dist.run.provenance import git_commit, versions
from mnist_dist.tracking import resolve_mode, server_url

OK, NOTE, SLOW, WARN, FAIL = "ok", "note", "slow", "warn", "FAIL"


class Finding(NamedTuple):
    """One result of a check."""

    verdict: str
    figure: str
    """The measured value or what is wrong."""
    ranks: str = ""
    """The ranks concerned."""
    seconds: dict[str, float] | None = None
    """Times of the slowest rank, which a later examination can be compared with."""


Findings = Iterator[Finding]


@dataclass(frozen=True)
class Row:
    """A finding with the name of its check: one row of the table."""

    check: str
    verdict: str
    figure: str
    ranks: str
    seconds: dict[str, float] | None = None


# --- figures ------------------------------------------------------------------------------------------------------


SLOW_FACTOR = 3.0
"""A rank is slow if it takes this many times the median time. Equal ranks differ by about ten percent, on shared
machines or with short messages by up to a factor of two. A worn cable, a throttled GPU or another job on the same cores
costs more."""


def slow_positions(seconds: Sequence[float]) -> list[int]:
    """Returns the positions of the times above SLOW_FACTOR times the median (of two times: the shorter one)."""
    return [i for i, each in enumerate(seconds) if each > SLOW_FACTOR * statistics.median_low(seconds)]


def most_common(values: Sequence[Any]) -> tuple[Any, list[int]]:
    """Returns the most frequent value (of several: that of the lowest rank) and the positions of all other values."""
    common = Counter(values).most_common(1)[0][0]
    return common, [i for i, each in enumerate(values) if each != common]


def format_ranks(ranks: Iterable[int]) -> str:
    """Formats ranks as ranges: "0–3, 7"."""
    ranges: list[list[int]] = []
    for rank in sorted(ranks):
        if ranges and rank == ranges[-1][1] + 1:
            ranges[-1][1] = rank
        else:
            ranges.append([rank, rank])
    return ", ".join(f"{first}–{last}" if last > first else str(first) for first, last in ranges)


def format_bytes(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"


def format_milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"


def format_speeds(seconds: dict[str, float]) -> str:
    """Formats the time of small messages and the bandwidth of large ones.

    Args:
        seconds: by message size, a key of `SIZES`.
    """
    return ", ".join(
        f"{size} {format_milliseconds(each)}" if SIZES[size] < 2**20 else f"{size} {format_bytes(SIZES[size] / each)}/s"
        for size, each in seconds.items()
    )


# --- checks of each machine ---------------------------------------------------------------------------------------


def check_world(ranks: Ranks, expected: int | None) -> Findings:
    """Reports the number of processes, their nodes and devices. Fails if the number differs from the expected one."""

    def describe() -> dict[str, Any]:
        try:
            check_size(ranks.state, expected)
            problem = ""
        except RecipeError as error:
            problem = error.problems[0].message.replace("mnist_dist.train", "mnist_dist.doctor")
        return {"node": platform.node(), "device": device_name(ranks.device), "problem": problem} | launch_settings()

    results = ranks.run(describe)
    nodes: dict[str, list[int]] = {}
    for rank, result in enumerate(results):
        nodes.setdefault(result["node"], []).append(rank)
    devices = Counter(result["device"] for result in results)
    size = "1 process" if ranks.size == 1 else f"{ranks.size} processes"
    where = ", ".join(node if ranks.size == 1 else f"{node}: {format_ranks(own)}" for node, own in nodes.items())
    others = most_common([result["device"] for result in results])[1]
    yield Finding(
        WARN if others else OK,
        f"{size}, started by {results[0]['launcher']}, on {len(nodes)} node{'s'[: len(nodes) > 1]} ({where}); "
        + ", ".join(f"{count} × {device}" for device, count in devices.items()),
        format_ranks(others),
    )
    for problem in sorted({result["problem"] for result in results} - {""}):
        yield Finding(FAIL, problem)


def check_versions(ranks: Ranks) -> Findings:
    """Fails if Python, a package, CUDA, NCCL or the commit is not the same on all ranks."""

    def describe() -> dict[str, str]:
        commit, dash, dirty = (git_commit() or "unknown").partition("-")
        nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "none"
        cuda = torch.version.cuda or "none"
        return {**versions(), "cuda": cuda, "nccl": nccl, "commit": commit[:12] + dash + dirty}

    results, equal = ranks.run(describe), True
    for name in results[0]:
        common, others = most_common([result.get(name) for result in results])
        if others:
            equal = False
            found = ", ".join(sorted({str(results[rank].get(name)) for rank in others}))
            yield Finding(FAIL, f"{name} {found} instead of {common}", format_ranks(others))
    if equal:
        yield Finding(OK, ", ".join(f"{name} {version}" for name, version in results[0].items()))


LOW_SPACE, LOW_SHARED_MEMORY = 1e9, 2.5e8
"""Free bytes below which a rank is reported: about what the largest bundled network needs with its optimizer, and four
times what Docker gives a container, which is too little for NCCL."""


def check_limits(ranks: Ranks) -> Findings:
    """Reports the cores that each rank may use and the memory limit of its control groups."""
    results = ranks.run(limits)
    cores = [result["cores"] for result in results]
    few = [rank for rank, result in enumerate(results) if result["cores"] < result["machine"]]
    spread = f"{min(cores)}" + (f" to {max(cores)}" if max(cores) > min(cores) else "")
    memory = min((result["memory"] for result in results if result["memory"]), default=None)
    figure = f"{spread} of {max(result['machine'] for result in results)} cores, "
    yield Finding(
        OK, figure + (f"memory limit {format_bytes(memory)}" if memory else "no memory limit"), format_ranks(few)
    )


def check_gpus(ranks: Ranks) -> Findings:
    """Reports drivers, uncorrected memory errors and throttled clocks, if nvidia-smi can be run."""
    results = dict(enumerate(ranks.run(partial(query_gpu, ranks.device))))
    if not any(results.values()):
        yield Finding(OK, "no NVIDIA GPU")
        return
    known = {rank: result for rank, result in results.items() if "driver" in result}
    for key, verdict in (("unused", WARN), ("problem", NOTE)):
        for text in dict.fromkeys(result[key] for result in results.values() if key in result):
            yield Finding(verdict, text, format_ranks(r for r, each in results.items() if each.get(key) == text))
    faults = {
        (WARN, "uncorrected ECC errors since the driver was loaded"): [r for r in known if known[r]["ecc_errors"]],
        (WARN, "memory pages wait for their replacement: reset the GPU"): [r for r in known if known[r]["needs_reset"]],
    }
    for reason in dict.fromkeys(reason for each in known.values() for reason in each["throttling"]):
        faults[SLOW, f"clocks are throttled ({reason})"] = [r for r in known if reason in known[r]["throttling"]]
    drivers = Counter(each["driver"] for each in known.values())
    if len(drivers) > 1:
        common = drivers.most_common(1)[0][0]
        faults[WARN, f"a driver other than {common}"] = [r for r in known if known[r]["driver"] != common]
    for (verdict, message), found in faults.items():
        if found:
            yield Finding(verdict, message, format_ranks(found))
    if known and not any(faults.values()):
        hottest = max((each["temperature"] or 0 for each in known.values()), default=0)
        yield Finding(OK, f"driver {next(iter(drivers))}, no ECC errors, not throttled, at most {hottest} °C")


def check_space(ranks: Ranks, run_dir: Path) -> Findings:
    """Reports free memory of the host and the GPU, free shared memory, and free disk space for the run folder."""
    results = ranks.run(partial(free_space, ranks.device, run_dir))
    for name in results[0]:
        free = [result.get(name, 0) for result in results]
        lowest = LOW_SHARED_MEMORY if name == str(SHARED_MEMORY) else LOW_SPACE
        low = [rank for rank, each in enumerate(free) if each < lowest]
        yield Finding(WARN if low else OK, f"{name}: at least {format_bytes(min(free))} free", format_ranks(low))


def check_folder(ranks: Ranks, run_dir: Path) -> Findings:
    """Writes a file on every rank in the same way as a checkpoint; then every rank checks that it sees all files."""
    folder = FolderMeasurement(run_dir)
    try:
        files = ranks.run(folder.write)
        missing = ranks.run(lambda: folder.find_missing([file["name"] for file in files]))
    finally:
        for remove in (folder.remove_file, folder.remove_folders):
            with suppress(ActionFailed):
                ranks.run(remove)
    nodes = [file["node"] for file in files]
    pairs = {(rank, other) for rank, others in enumerate(missing) for other in others}
    if same_node := {rank for pair in pairs if nodes[pair[0]] == nodes[pair[1]] for rank in pair}:
        yield Finding(FAIL, f"{run_dir}: a file of another rank on the same node is missing", format_ranks(same_node))
    elif pairs:
        message = f"{run_dir}: the nodes do not share this folder; runs on several nodes need a shared one"
        yield Finding(WARN, message, format_ranks(most_common([str(others) for others in missing])[1]))
    seconds = [file["seconds"] for file in files]
    slow = [rank for rank, each in enumerate(seconds) if each > 1.0]  # absolute: other writes delay a flush
    visible = "" if pairs or ranks.size == 1 else f"; all {ranks.size} ranks see all files"
    figure = f"{run_dir}: write, flush and rename in {format_milliseconds(max(seconds))}{visible}"
    yield Finding(SLOW if slow else OK, figure, format_ranks(slow), {"write": max(seconds)})


def check_wandb(ranks: Ranks) -> Findings:
    """Contacts the W&B server from rank 0, the only rank that logs. Never fails: runs are logged offline without it."""
    server = server_url()
    try:
        # The action has its own time limit, because that of a request does not include the DNS look-up.
        action = partial(time_request, server) if ranks.rank == 0 else lambda: (0.0, "")
        seconds, problem = ranks.run(action, timeout=2 * WANDB_SECONDS)[0]
    except ActionFailed as failure:
        seconds, problem = failure.results.get(0, (0.0, failure.errors.get(0, "")))
    answer = f"{server} answers in {format_milliseconds(seconds)}"
    if problem:
        answer = f"no answer from {server} ({problem})"
    yield Finding(NOTE if problem else OK, f"{answer}; a run here would be {resolve_mode('auto')[1]}")


# --- checks between ranks: these need at least two ----------------------------------------------------------------


def check_clocks(ranks: Ranks) -> Findings:
    """Compares the clock of each rank with rank 0's. A difference above 1 s only makes logs hard to read."""
    stamps = ranks.run(partial(read_clock, ranks.device), collective=True)
    offsets = {rank: clock_offset(stamps[rank], stamps[0]) for rank in range(1, ranks.size)}
    wrong = [rank for rank, (offset, uncertainty) in offsets.items() if abs(offset) - uncertainty > 1.0]
    worst = max(offsets, key=lambda rank: abs(offsets[rank][0]))
    offset, uncertainty = map(format_milliseconds, offsets[worst])
    figure = f"largest difference from rank 0: {offset} ± {uncertainty} (rank {worst})"
    yield Finding(WARN if wrong else OK, figure, format_ranks(wrong))


def check_links(ranks: Ranks) -> Findings:
    """Measures round trips from every rank to the next. Fails if the received bytes differ from the sent bytes."""
    results = ranks.run(partial(measure_links, ranks), collective=True)
    yield from _wrong_sizes("the received bytes differ from the sent bytes", [result["damaged"] for result in results])
    groups: dict[str, list[int]] = {}  # compared separately: links between nodes are slower than links within one
    for rank, result in enumerate(results):
        same = result["node"] == results[(rank + 1) % ranks.size]["node"]
        groups.setdefault("within a node" if same else "between nodes", []).append(rank)
    for kind, links in groups.items():
        table = {size: [results[rank]["seconds"][size] for rank in links] for size in SIZES}
        # Of several sizes at which a link is slow, the largest is shown.
        slow = {links[i]: {size: seconds[i]} for size, seconds in table.items() for i in slow_positions(seconds)}
        named = ", ".join(f"{rank}→{(rank + 1) % ranks.size} ({format_speeds(own)})" for rank, own in slow.items())
        median = {size: statistics.median_low(seconds) for size, seconds in table.items()}
        slowest = {f"{kind}, {size}": max(seconds) for size, seconds in table.items()}
        yield Finding(SLOW if slow else OK, f"{kind}: {format_speeds(median)}", named, slowest)


def check_all_reduce(ranks: Ranks) -> Findings:
    """Measures sums over all ranks. A slow sum cannot be assigned to a rank. A wrong sum fails and names its ranks."""
    results = ranks.run(partial(measure_all_reduce, ranks), collective=True)
    yield from _wrong_sizes("wrong sums", [result["wrong"] for result in results])
    median = {size: statistics.median(result["seconds"][size] for result in results) for size in SIZES}
    yield Finding(OK, format_speeds(median), "", {size: max(r["seconds"][size] for r in results) for size in SIZES})


def _wrong_sizes(message: str, sizes: list[list[str]]) -> Findings:
    """Yields a failure if any rank has message sizes with wrong results.

    Args:
        sizes: by rank.
    """
    wrong = {rank: own for rank, own in enumerate(sizes) if own}
    if wrong:
        found = ", ".join(sorted({size for own in wrong.values() for size in own}))
        yield Finding(FAIL, f"{message} ({found})", format_ranks(wrong))
