"""The checks of training: the losses of the reference trainings, on each rank alone and distributed over all ranks."""

from __future__ import annotations

from functools import partial

from mnist_dist.distributed.devices import emulates_bf16, supports_precision
from mnist_dist.doctor.checks import (
    FAIL,
    NOTE,
    OK,
    SLOW,
    WARN,
    Finding,
    Findings,
    format_ranks,
    most_common,
    slow_positions,
)
from mnist_dist.doctor.ranks import Ranks
from mnist_dist.doctor.reference import EARLY_STEPS, REFERENCES, reference_losses, train_alone, train_distributed


def check_training_alone(ranks: Ranks) -> Findings:
    """Trains complete batches on every rank separately, because a mean over ranks could hide a wrong or slow rank."""
    results = ranks.run(partial(train_alone, ranks.device))
    yield from compare_losses([result["losses"] for result in results], _losses(ranks, "lenet5"))
    seconds = [result["seconds"] for result in results]
    slow = slow_positions(seconds)
    spread = f"{1000 * min(seconds):.1f}" + (f" to {1000 * max(seconds):.1f}" if ranks.size > 1 else "")
    fastest = {"step": max(result["fastest"] for result in results)}
    yield Finding(SLOW if slow else OK, f"{spread} ms per step of 128 images", format_ranks(slow), fastest)


def check_training_other(ranks: Ranks, name: str) -> Findings:
    """Trains another reference, a key of `REFERENCES`, on every rank separately. Its times are not checked."""
    precision = REFERENCES[name].precision
    if not all(ranks.run(partial(supports_precision, ranks.device, precision))):
        yield Finding(OK, f"a device does not compute in {precision}: nothing to measure")
        return
    results = ranks.run(partial(train_alone, ranks.device, name))
    yield from compare_losses([result["losses"] for result in results], _losses(ranks, name), name)
    if precision != "bf16":
        return
    emulated = {rank for rank, found in enumerate(ranks.run(partial(emulates_bf16, ranks.device))) if found}
    if emulated:
        yield Finding(NOTE, "the CPU emulates bf16, many times slower than fp32: train in fp32", format_ranks(emulated))


def check_training_distributed(ranks: Ranks) -> Findings:
    """Runs the same training with the trainer's own update: batches split over the ranks, gradients reduced."""
    results = ranks.run(partial(train_distributed, ranks.device), collective=True)
    yield from compare_losses([result["losses"] for result in results], _losses(ranks, "lenet5"))
    others = most_common([result["weights"] for result in results])[1]
    if others:  # GPUs of different kinds may round differently, so this alone does not fail
        yield Finding(WARN, "the weights after training are not identical on all ranks", format_ranks(others))


def check_training_captured(ranks: Ranks) -> Findings:
    """Runs the same training as a replayed CUDA graph, where this world can capture its steps."""
    results = ranks.run(partial(train_distributed, ranks.device, "step"), collective=True)
    if not results[0]["losses"]:
        yield Finding(OK, f"nothing to measure: {results[0]['obstacle']}")
        return
    yield from compare_losses([result["losses"] for result in results], _losses(ranks, "lenet5"))
    failed = {rank: result["obstacle"] for rank, result in enumerate(results) if result["obstacle"]}
    if failed:
        yield Finding(WARN, next(iter(failed.values())), format_ranks(failed))


def _losses(ranks: Ranks, name: str) -> list[float]:
    return ranks.run(partial(reference_losses, name))[0]


def compare_losses(curves: list[list[float]], reference: list[float], name: str = "lenet5") -> Findings:
    """Compares the losses of every rank with the reference losses. NaN fails.

    Args:
        curves: losses by rank and step.
        reference: losses by step.
        name: a key of `REFERENCES`, which has the tolerances.
    """
    early, late = REFERENCES[name].early_tolerance, REFERENCES[name].tolerance
    wrong: dict[str, list[int]] = {}
    largest = 0.0
    for rank, losses in enumerate(curves):
        for step, (loss, expected) in enumerate(zip(losses, reference, strict=True), start=1):
            deviation = abs(loss / expected - 1)
            if not deviation <= (early if step <= EARLY_STEPS else late):
                message = f"step {step}: loss {loss:.6f}, reference {expected:.6f} (deviation {deviation:.1e})"
                wrong.setdefault(message, []).append(rank)
                break
            largest = max(largest, deviation)
    for message, failed in wrong.items():
        yield Finding(FAIL, message, format_ranks(failed))
    if not wrong:
        tolerance = f"allowed {early:.0e}, after step {EARLY_STEPS} {late:.0e}"
        yield Finding(OK, f"{len(reference)} losses within {largest:.1e} of the reference ({tolerance})")
