"""The checks: each asks all ranks and turns their answers into findings."""

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
from mnist_dist.doctor.measurements import (
    SIZES,
    WANDB_SECONDS,
    FolderProbe,
    clock_offset,
    free_room,
    measure_all_reduce,
    measure_links,
    reach,
    read_clock,
    recorded_losses,
    train_alone,
    train_together,
)
from mnist_dist.doctor.ranks import Failed, Ranks
from mnist_dist.errors import RecipeError
from mnist_dist.run.provenance import git_commit, versions
from mnist_dist.tracking import resolve_mode, server_url

OK, NOTE, SLOW, WARN, FAIL = "ok", "note", "slow", "warn", "FAIL"


ALONE = "one process: nothing to measure"


class Finding(NamedTuple):
    verdict: str
    figure: str
    ranks: str = ""
    """Which are meant."""


Findings = Iterator[Finding]


@dataclass(frozen=True)
class Row:
    check: str
    verdict: str
    figure: str
    ranks: str


# --- judging ------------------------------------------------------------------------------------------------------


SLOW_FACTOR = 3.0
"""A rank is slow that takes so many times what the middle one takes. Ranks of one kind differ by some ten percent, on
shared machines and with short messages by a factor of two now and then; a worn cable, a throttled GPU or a neighbour's
job on the same cores costs more."""


def slow_ones(seconds: Sequence[float]) -> list[int]:
    """Positions of the figures above SLOW_FACTOR times the middle one (of two: the quicker)."""
    return [i for i, each in enumerate(seconds) if each > SLOW_FACTOR * statistics.median_low(seconds)]


def odd_ones(values: Sequence[Any]) -> tuple[Any, list[int]]:
    """The most frequent value, rank 0's where several are, and the positions of all others."""
    usual = Counter(values).most_common(1)[0][0]
    return usual, [i for i, each in enumerate(values) if each != usual]


def name_ranks(ranks: Iterable[int]) -> str:
    """Ranks as spans: 0–3, 7."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return ", ".join(f"{first}–{last}" if last > first else str(first) for first, last in spans)


def amount(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"


def speeds(seconds: dict[str, float]) -> str:
    """The time of small messages, the bandwidth of large ones."""
    return ", ".join(
        f"{size} {milliseconds(each)}" if SIZES[size] < 2**20 else f"{size} {amount(SIZES[size] / each)}/s"
        for size, each in seconds.items()
    )


# --- checks: the machines -----------------------------------------------------------------------------------------


def check_world(ranks: Ranks, expected: int | None) -> Findings:
    """How many processes, where, on what; a number other than the one expected fails."""

    def look() -> dict[str, Any]:
        try:
            check_size(ranks.state, expected)
            problem = ""
        except RecipeError as error:
            problem = error.problems[0].message.replace("mnist_dist.train", "mnist_dist.doctor")
        return {"node": platform.node(), "device": device_name(ranks.device), "problem": problem} | launch_settings()

    answers = ranks.ask(look)
    nodes: dict[str, list[int]] = {}
    for rank, answer in enumerate(answers):
        nodes.setdefault(answer["node"], []).append(rank)
    devices = Counter(answer["device"] for answer in answers)
    size = "1 process" if ranks.size == 1 else f"{ranks.size} processes"
    where = ", ".join(node if ranks.size == 1 else f"{node}: {name_ranks(own)}" for node, own in nodes.items())
    odd = odd_ones([answer["device"] for answer in answers])[1]
    yield Finding(
        WARN if odd else OK,
        f"{size} by {answers[0]['launcher']} on {len(nodes)} node{'s'[: len(nodes) > 1]} ({where}); "
        + ", ".join(f"{count} × {device}" for device, count in devices.items()),
        name_ranks(odd),
    )
    for problem in sorted({answer["problem"] for answer in answers} - {""}):
        yield Finding(FAIL, problem)


def check_versions(ranks: Ranks) -> Findings:
    """Equal Python, packages, CUDA and commit on all ranks."""

    def look() -> dict[str, str]:
        commit, dash, dirty = (git_commit() or "unknown").partition("-")
        return {**versions(), "cuda": torch.version.cuda or "none", "commit": commit[:12] + dash + dirty}

    answers, equal = ranks.ask(look), True
    for name in answers[0]:
        usual, odd = odd_ones([answer.get(name) for answer in answers])
        if odd:
            equal = False
            others = ", ".join(sorted({str(answers[rank].get(name)) for rank in odd}))
            yield Finding(FAIL, f"{name} {others} instead of {usual}", name_ranks(odd))
    if equal:
        yield Finding(OK, ", ".join(f"{name} {version}" for name, version in answers[0].items()))


def check_clocks(ranks: Ranks) -> Findings:
    """Each rank's clock against rank 0's. A second makes logs and file times hard to read; training does not mind."""
    if ranks.size == 1:
        yield Finding(OK, ALONE)
        return
    stamps = ranks.ask(partial(read_clock, ranks.device), meets=True)
    offsets = {rank: clock_offset(stamps[rank], stamps[0]) for rank in range(1, ranks.size)}
    wrong = [rank for rank, (offset, within) in offsets.items() if abs(offset) - within > 1.0]
    worst = max(offsets, key=lambda rank: abs(offsets[rank][0]))
    offset, within = map(milliseconds, offsets[worst])
    yield Finding(WARN if wrong else OK, f"at most {offset} ± {within} from rank 0's (rank {worst})", name_ranks(wrong))


LITTLE = 1e9
"""Free bytes below which a rank is named: about what the largest bundled network takes with its optimizer."""


def check_room(ranks: Ranks, run_dir: Path) -> Findings:
    """Free memory of host and GPU, free disk under the run folder."""
    answers = ranks.ask(partial(free_room, ranks.device, run_dir))
    for name in answers[0]:
        free = [answer.get(name, 0) for answer in answers]
        low = [rank for rank, each in enumerate(free) if each < LITTLE]
        yield Finding(WARN if low else OK, f"{name}: at least {amount(min(free))} free", name_ranks(low))


def check_folder(ranks: Ranks, run_dir: Path) -> Findings:
    """What a checkpoint does, from every rank; then all look for one another's file."""
    probe = FolderProbe(run_dir)
    try:
        answers = ranks.ask(probe.write)
        sights = ranks.ask(lambda: probe.look([answer["name"] for answer in answers]))
    finally:
        for tidy in (probe.clear, probe.remove_folders):
            with suppress(Failed):
                ranks.ask(tidy)
    nodes = [answer["node"] for answer in answers]
    blind = {(rank, other) for rank, unseen in enumerate(sights) for other in unseen}
    if broken := {rank for pair in blind if nodes[pair[0]] == nodes[pair[1]] for rank in pair}:
        yield Finding(FAIL, f"{run_dir}: files written on the same node are not seen", name_ranks(broken))
    elif blind:
        apart = "not shared: checkpoints of a multi-node run need a shared folder"
        yield Finding(WARN, f"{run_dir}: {apart}", name_ranks(odd_ones([str(unseen) for unseen in sights])[1]))
    seconds = [answer["seconds"] for answer in answers]
    slow = [rank for rank, each in enumerate(seconds) if each > 1.0]  # by itself: flushing differs by what else is due
    seen = "" if blind or ranks.size == 1 else f", and all {ranks.size} ranks see all files"
    figure = f"{run_dir}: written, flushed and renamed in {milliseconds(max(seconds))}{seen}"
    yield Finding(SLOW if slow else OK, figure, name_ranks(slow))


# --- checks: between them, and out --------------------------------------------------------------------------------


def check_links(ranks: Ranks) -> Findings:
    """Round trips from every rank to the next; what comes back must be what was sent."""
    if ranks.size == 1:
        yield Finding(OK, ALONE)
        return
    answers = ranks.ask(partial(measure_links, ranks), meets=True)
    damaged = {rank: answer["damaged"] for rank, answer in enumerate(answers) if answer["damaged"]}
    if damaged:
        what = ", ".join(sorted({size for sizes in damaged.values() for size in sizes}))
        yield Finding(FAIL, f"other bytes arrived than were sent ({what})", name_ranks(damaged))
    groups: dict[str, list[int]] = {}  # links within a node and between nodes are never equally fast
    for rank, answer in enumerate(answers):
        same = answer["node"] == answers[(rank + 1) % ranks.size]["node"]
        groups.setdefault("within a node" if same else "between nodes", []).append(rank)
    for kind, links in groups.items():
        table = {size: [answers[rank]["seconds"][size] for rank in links] for size in SIZES}
        slow = {links[i]: {size: seconds[i]} for size, seconds in table.items() for i in slow_ones(seconds)}
        named = ", ".join(f"{rank}→{(rank + 1) % ranks.size} ({speeds(what)})" for rank, what in slow.items())
        middle = {size: statistics.median_low(seconds) for size, seconds in table.items()}
        yield Finding(SLOW if slow else OK, f"{kind}: {speeds(middle)}", named)


def check_all_reduce(ranks: Ranks) -> Findings:
    """Sums over all ranks; their time belongs to no rank, but a wrong sum does."""
    if ranks.size == 1:
        yield Finding(OK, ALONE)
        return
    answers = ranks.ask(partial(measure_all_reduce, ranks), meets=True)
    wrong = {rank: answer["wrong"] for rank, answer in enumerate(answers) if answer["wrong"]}
    if wrong:
        what = ", ".join(sorted({size for sizes in wrong.values() for size in sizes}))
        yield Finding(FAIL, f"wrong sums ({what})", name_ranks(wrong))
    yield Finding(
        OK, speeds({size: statistics.median(answer["seconds"][size] for answer in answers) for size in SIZES})
    )


def check_wandb(ranks: Ranks) -> Findings:
    """From rank 0, which alone logs. Never a failure: without the server runs are logged offline."""
    server = server_url()
    try:
        # The time limit of a request does not hold for the look-up of the server's name.
        seconds, problem = ranks.ask(lambda: [0, ""] if ranks.rank else reach(server), limit=2 * WANDB_SECONDS)[0]
    except Failed as failure:
        seconds, problem = failure.values.get(0, (0.0, failure.errors.get(0, "")))
    found = f"{server} cannot be reached ({problem})" if problem else f"{server} answers in {milliseconds(seconds)}"
    yield Finding(NOTE if problem else OK, f"{found}; a run here would be {resolve_mode('auto')[1]}")


# --- checks: training ---------------------------------------------------------------------------------------------


EARLY_STEPS, EARLY_TOLERANCE, TOLERANCE = 5, 1e-5, 1e-3
"""Relative. Other processors, kernels and numbers of processes add up in another order. Measured with 1 to 4 processes,
other kernels, float64, and weights disturbed by up to 1e-6: the first five losses agree to 3e-7. Later a ReLU falls to
the other side of zero, of which Adam makes much: 3e-4 at most. What must be found leaves the early tolerance: TF32
(5e-5), a learning rate off by 0.1 % (3e-5), one wrong pixel in every batch (2e-5), one weight off by 0.01 (2e-4)."""


def check_each_alone(ranks: Ranks) -> Findings:
    """Every rank trains the whole batches by itself: one that computes wrongly or slowly cannot hide in a mean."""
    recorded = ranks.ask(recorded_losses)[0]
    answers = ranks.ask(partial(train_alone, ranks.device))
    yield from judge_losses([answer["losses"] for answer in answers], recorded)
    seconds = [answer["seconds"] for answer in answers]
    slow = slow_ones(seconds)
    spread = f"{1000 * min(seconds):.1f}" + (f" to {1000 * max(seconds):.1f}" if ranks.size > 1 else "")
    yield Finding(SLOW if slow else OK, f"{spread} ms a step of 128 images", name_ranks(slow))


def check_together(ranks: Ranks) -> Findings:
    """The same training by the trainer's own update, the batch shared, the gradients exchanged."""
    recorded = ranks.ask(recorded_losses)[0]
    answers = ranks.ask(partial(train_together, ranks.device), meets=True)
    yield from judge_losses([answer["losses"] for answer in answers], recorded)
    odd = odd_ones([answer["weights"] for answer in answers])[1]
    if odd:  # GPUs of different kinds may round differently, so this alone does not fail
        yield Finding(WARN, "weights differ after training, in their last bits at least", name_ranks(odd))


def judge_losses(curves: list[list[float]], recorded: list[float]) -> Findings:
    """The ranks' losses against the recorded ones; NaN leaves every tolerance."""
    wrong: dict[str, list[int]] = {}
    largest = 0.0
    for rank, losses in enumerate(curves):
        for step, (loss, expected) in enumerate(zip(losses, recorded, strict=True), start=1):
            deviation = abs(loss / expected - 1)
            if not deviation <= (EARLY_TOLERANCE if step <= EARLY_STEPS else TOLERANCE):
                what = f"leaves the recorded losses at step {step}: {loss:.6f} instead of {expected:.6f}"
                wrong.setdefault(f"{what} ({deviation:.1e})", []).append(rank)
                break
            largest = max(largest, deviation)
    for what, guilty in wrong.items():
        yield Finding(FAIL, what, name_ranks(guilty))
    if not wrong:
        tolerance = f"allowed {EARLY_TOLERANCE:.0e}, after step {EARLY_STEPS} {TOLERANCE:.0e}"
        yield Finding(OK, f"{len(recorded)} losses within {largest:.1e} of the recorded ones ({tolerance})")
