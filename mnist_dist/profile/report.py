"""Writes a profile as tables, and gives advice where a phase takes a large share of the step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from mnist_dist.plots.style import shorten
from mnist_dist.profile.measurement import Profile, RankProfile
from mnist_dist.profile.phases import DATA, IDLE, LOGGING, OPTIMIZER, PHASES, WAITING
from mnist_dist.recipe.schema import Recipe

LARGE = 0.2
"""A phase with a larger share of the step gets advice."""
LESSON = "launch/lessons, lesson 6"
LARGE_LOGGING = 0.1
LARGE_OVERHEAD = 0.5
UNEVEN = 0.1
"""If the own times of the ranks differ by more than this share, one rank is slow."""
MOST_OPERATIONS = 12
LONGEST_NAME = 70

# --- figures ------------------------------------------------------------------------------------------------------


def step_seconds(rank: RankProfile) -> float:
    """Returns the duration of a step of a rank."""
    return sum(rank.seconds.values())


def share(rank: RankProfile, phase: str) -> float:
    """Returns the share of a phase in the step of a rank."""
    return rank.seconds.get(phase, 0.0) / step_seconds(rank)


def mean_share(profile: Profile, phase: str) -> float:
    """Returns the mean share of a phase over the ranks."""
    return sum(share(rank, phase) for rank in profile.ranks) / len(profile.ranks)


def own_seconds(rank: RankProfile) -> float:
    """Returns the time of a rank's own work in a step: all ranks take equally long, but the fast ones wait."""
    return step_seconds(rank) - rank.seconds.get(WAITING, 0.0) - rank.seconds.get(IDLE, 0.0)


def slowest(profile: Profile) -> RankProfile:
    """Returns the rank with the most work of its own in a step."""
    return max(profile.ranks, key=own_seconds)


def unevenness(profile: Profile) -> float:
    """Returns by which share the slowest rank's own time is longer than that of the fastest rank."""
    return own_seconds(slowest(profile)) / min(map(own_seconds, profile.ranks)) - 1


def overhead(profile: Profile) -> float:
    """Returns by which share a profiled step is longer than one without the profiler."""
    return profile.profiled_seconds / profile.plain_seconds - 1


# --- advice -------------------------------------------------------------------------------------------------------


def advise(profile: Profile, recipe: Recipe) -> list[str]:
    """Returns one line of advice for each share that stands out."""
    return list(_advice(profile, recipe))


def _advice(profile: Profile, recipe: Recipe) -> Iterator[str]:
    if (waiting := mean_share(profile, WAITING)) > LARGE:
        yield f"{WAITING} takes {waiting:.0%} of a step: {_waiting_advice(profile)}; see {LESSON}"
    if (data := mean_share(profile, DATA)) > LARGE:
        place = "" if recipe.data.place == "device" else " data.place=device keeps the images on the device;"
        yield f"{DATA} takes {data:.0%} of a step:{place} a lighter data.augment costs less"
    if (optimizer := mean_share(profile, OPTIMIZER)) > LARGE:
        yield f"{OPTIMIZER} takes {optimizer:.0%} of a step: a larger batch_size makes fewer updates per epoch"
    if (logging := mean_share(profile, LOGGING)) > LARGE_LOGGING:
        yield f"{LOGGING} takes {logging:.0%} of a step: a larger log_every than {recipe.log_every} costs less"
    if (idle := mean_share(profile, IDLE)) > LARGE:
        yield f"the GPU is idle for {idle:.0%} of a step, {_idle_advice(profile)}"
    if overhead(profile) > LARGE_OVERHEAD:
        message = "the shares of phases with many short operations are too large"
        yield f"the profiler makes a step {overhead(profile):.0%} longer: {message}"


def _waiting_advice(profile: Profile) -> str:
    if len(profile.ranks) == 1:
        return "see the trace"
    hosts = Counter(rank.host for rank in profile.ranks)
    for rank in profile.ranks:
        if not rank.on_device and hosts[rank.host] > rank.cores:
            cores = "1 core" if rank.cores == 1 else f"{rank.cores} cores"
            return f"the {hosts[rank.host]} processes on {rank.host} share {cores}; start fewer"
    if unevenness(profile) > UNEVEN:
        rank = slowest(profile)
        return f"the other ranks wait for rank {rank.rank} on {rank.host}; mnist-dist doctor measures each rank alone"
    if len(hosts) == 1:
        return "the ranks are equally fast and exchange gradients; try a larger batch_size"
    return "the ranks are equally fast and wait for the network; try a larger batch_size or ddp.comm_hook=bf16"


def _idle_advice(profile: Profile) -> str:
    waits: dict[str, float] = {}
    for rank in profile.ranks:
        for phase, seconds in rank.idle_seconds.items():
            waits[phase] = waits.get(phase, 0.0) + seconds
    phase = max(waits, key=lambda each: waits[each], default="")
    if phase in (DATA, LOGGING):
        return f"most of it while the host is in the phase {phase}: the host is too slow there"
    remedies = "engine.capture, which is off in a profile, compile=true and a larger batch_size help"
    return f"because the host launches kernels too slowly; {remedies}"


# --- tables -------------------------------------------------------------------------------------------------------


def print_report(profile: Profile, recipe: Recipe, console: Console) -> None:
    """Prints the tables, the overhead of the profiler, and the advice."""
    for table in (shares_table(profile), operations_table(profile), memory_table(profile)):
        console.print(table)
        console.print()
    advice = [f"advice: {line}" for line in advise(profile, recipe)]
    for line in [slowest_line(profile), overhead_line(profile), *advice]:
        console.print(line, highlight=False)


def shares_table(profile: Profile) -> Table:
    """Returns the share of each phase in a step, for each rank and in the mean."""
    table = _table(f"Share of a step, mean of {profile.steps} steps", "rank", "ms/step", *PHASES, left=1)
    several = len(profile.ranks) > 1
    for rank in profile.ranks:
        name = f"{rank.rank} (slowest)" if several and rank is slowest(profile) else str(rank.rank)
        table.add_row(name, f"{1000 * step_seconds(rank):,.2f}", *(_cell(rank, phase) for phase in PHASES))
    if several:
        means = [_percent(mean_share(profile, phase)) for phase in PHASES[:-1]]
        table.add_row("mean", "", *means, _percent(mean_share(profile, IDLE)) if profile.ranks[0].on_device else "-")
    return table


def _cell(rank: RankProfile, phase: str) -> str:
    # Without a GPU the host executes all operations: it is in one of the phases at every instant.
    return "-" if phase == IDLE and not rank.on_device else _percent(share(rank, phase))


def operations_table(profile: Profile) -> Table:
    """Returns the operations or kernels that take the most time on the slowest rank."""
    rank = slowest(profile)
    total = sum(usage.time for usage in rank.operations.values()) or 1.0
    kind = "Kernels of the GPU" if rank.on_device else "Operations, without those that they call"
    table = _table(f"{kind}, rank {rank.rank}", "name", "share", "ms/step", "calls/step", left=1)
    for name, (calls, time) in _longest(rank):
        figures = _percent(time / total), f"{time / 1000 / profile.steps:,.3f}", f"{calls / profile.steps:,.1f}"
        table.add_row(shorten(name, LONGEST_NAME), *figures)
    return table


def _longest(rank: RankProfile) -> list[tuple[str, Any]]:
    return sorted(rank.operations.items(), key=lambda item: -item[1][1])[:MOST_OPERATIONS]


def memory_table(profile: Profile) -> Table:
    """Returns the memory by kind, of the rank that needs most of it."""
    table = _table("Memory", "kind", "MB", "rank", left=1)
    kinds = dict.fromkeys(kind for rank in profile.ranks for kind in rank.bytes)
    for kind in kinds:
        rank = max(profile.ranks, key=lambda each: each.bytes.get(kind, 0))
        table.add_row(kind, f"{rank.bytes[kind] / 2**20:,.2f}", str(rank.rank))
    rank = max(profile.ranks, key=lambda each: each.peak_mb)
    name = "all tensors, measured peak" if rank.on_device else "the process, with its libraries"
    table.add_row(name, f"{rank.peak_mb:,.0f}", str(rank.rank))
    return table


def _table(title: str, *headings: str, left: int) -> Table:
    """Returns an empty table whose columns are aligned to the right, except for the first `left` ones."""
    table = Table(title=title, title_justify="left", box=None)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number < left else "right")
    return table


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def slowest_line(profile: Profile) -> str:
    """Returns which rank is the slowest, and by how much."""
    rank = slowest(profile)
    if len(profile.ranks) == 1:
        return f"1 process: {1000 * step_seconds(rank):,.2f} ms per step"
    own = f"{1000 * own_seconds(rank):,.2f} ms of its own work per step"
    return f"slowest: rank {rank.rank} on {rank.host}, {own}, {unevenness(profile):.0%} more than the fastest rank"


def overhead_line(profile: Profile) -> str:
    """Returns the duration of a step without the profiler and with it."""
    plain, profiled = 1000 * profile.plain_seconds, 1000 * profile.profiled_seconds
    return (
        f"{plain:,.2f} ms per step without the profiler, {profiled:,.2f} ms with it: overhead {overhead(profile):+.0%}"
    )
