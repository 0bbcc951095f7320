"""Asks nvidia-smi about a GPU: driver, memory errors (ECC), and whether its clocks are throttled."""

from __future__ import annotations

import subprocess
from typing import Any

import torch

from mnist_dist.distributed.devices import unused_gpu

FIELDS = (
    "driver_version",
    "ecc.errors.uncorrected.volatile.total",
    "retired_pages.pending",
    "clocks_throttle_reasons.active",
    "temperature.gpu",
)

THROTTLING = {0x8: "hardware slowdown", 0x20: "heat, by software", 0x40: "heat, by hardware", 0x80: "power brake"}
"""Bits of clocks_throttle_reasons.active that mean a fault. An idle GPU and the usual power limit have other bits."""

SECONDS = 20.0
"""Time limit of nvidia-smi."""


def query_gpu(device: torch.device) -> dict[str, Any]:
    """Returns what nvidia-smi reports about this rank's GPU (see `parse_gpu`), or {} without an NVIDIA GPU.

    If the rank uses the CPU although its machine has a GPU, returns the reason as `unused`.
    """
    if reason := unused_gpu(device):
        return {"unused": f"an NVIDIA GPU is not used: {reason}"}
    if device.type != "cuda" or torch.version.hip:
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits"]
    command.append(f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"problem": f"nvidia-smi cannot be run: {error}"}
    if done.returncode:
        return {"problem": f"nvidia-smi: {(done.stdout + done.stderr).strip().splitlines()[:1]}"}
    return parse_gpu(done.stdout)


def parse_gpu(text: str) -> dict[str, Any]:
    """Returns the values of a line of nvidia-smi.

    Returns:
        `driver`, `ecc_errors` (uncorrected, since the driver was loaded; None without ECC), `needs_reset` (memory pages
        are replaced at the next reset), `throttling` (reasons), `temperature` (°C or None). For a text of another form:
        `problem`.
    """
    values = [each.strip() for each in text.strip().splitlines()[0].split(",")] if text.strip() else []
    if len(values) != len(FIELDS):
        return {"problem": f"nvidia-smi: unexpected output {text.strip()[:80]!r}"}
    driver, errors, pending, reasons, temperature = values
    bits = _number(reasons, 16) or 0
    return {
        "driver": driver,
        "ecc_errors": _number(errors),
        "needs_reset": pending == "Yes",
        "throttling": [name for bit, name in THROTTLING.items() if bits & bit],
        "temperature": _number(temperature),
    }


def _number(text: str, base: int = 10) -> int | None:
    """Returns a number, or None for a text such as "[N/A]" or "[Not Supported]"."""
    try:
        return int(text, base)
    except ValueError:
        return None
