"""Runs an action on every rank and collects all results, even if a rank raises, hangs or is killed."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState

from mnist_dist.errors import RunError

TIMEOUT = 45.0
"""Seconds that an action may take."""

GRACE_SECONDS = 5.0
"""Seconds that the other ranks continue to wait in a collective action after one rank has failed in it."""


class ActionFailed(Exception):
    """Raised on every rank if an action failed on at least one rank.

    Attributes:
        errors: message by rank. A rank that only waited for a failed rank is not included.
        results: results of the ranks that succeeded.
    """

    def __init__(self, errors: dict[int, str], results: dict[int, Any] | None = None):
        super().__init__("; ".join(f"rank {rank}: {message}" for rank, message in errors.items()))
        self.errors, self.results = errors, results or {}


class Ranks:
    """Runs actions on all ranks of a world.

    Results are sent through the launcher's rendezvous store, not through collectives. So they arrive even if the
    network between the devices does not work, which is one of the things to be checked.

    Args:
        state: from `launched_world`.
    """

    def __init__(self, state: PartialState):
        self.state, self.rank, self.size, self.device = state, state.process_index, state.num_processes, state.device
        self.collectives_work = True
        """False after a collective action has failed: the next one would hang."""
        self._hangs = False
        self._unreachable: set[int] = set()
        self._round = 0
        if self.size > 1:
            store = dist.distributed_c10d._get_default_store()
            # A separate connection: a collective that waits in the store blocks the shared connection.
            self._store = dist.PrefixStore(
                "mnist_dist.doctor.ranks", store.clone() if hasattr(store, "clone") else store
            )

    def run(self, action: Callable[[], Any], *, collective: bool = False, timeout: float | None = None) -> list[Any]:
        """Runs `action` on every rank, in a thread that may hang. Collective: call on every rank.

        Args:
            action: returns a JSON-serializable result.
            collective: the ranks wait for one another inside `action`.
            timeout: seconds that `action` may take; None for TIMEOUT.

        Returns:
            The results in the order of the ranks, the same on every rank.

        Raises:
            ActionFailed: on every rank, if a rank raised, hung or did not report.
            RunError: rank 0, which collects the results, does not report.
        """
        if collective and not self.collectives_work:
            raise ActionFailed(dict.fromkeys(range(self.size), "not run: an earlier collective failed"))
        timeout = TIMEOUT if timeout is None else timeout
        self._round += 1
        outcomes = self._exchange(self._run_here(action, collective, timeout), timeout)
        results = {rank: outcome["result"] for rank, outcome in enumerate(outcomes) if "result" in outcome}
        failures = {rank: outcome for rank, outcome in enumerate(outcomes) if rank not in results}
        if failures:
            self.collectives_work = self.collectives_work and not collective
            causes = {rank: outcome for rank, outcome in failures.items() if not outcome.get("waits")} or failures
            raise ActionFailed({rank: outcome["error"] for rank, outcome in causes.items()}, results)
        return [outcome["result"] for outcome in outcomes]

    def finish(self, code: int) -> int:
        """Waits until no other rank needs this one, then returns `code`. Collective: call on every rank.

        Ends the process with `code` if a thread still hangs or collectives do not work.
        """
        if self.size > 1 and self.rank:
            self._store.set(f"finished/{self.rank}", "")
        for rank in range(1, self.size if self.rank == 0 else 0):  # the store may live in rank 0
            if rank not in self._unreachable:
                self._receive(f"finished/{rank}", GRACE_SECONDS)
        # A regular exit would wait for the hanging thread, and cannot close a connection that this thread still uses.
        if self._hangs or (self.size > 1 and not self.collectives_work):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        self.state.destroy_process_group()
        return code

    def _run_here(self, action: Callable[[], Any], collective: bool, timeout: float) -> dict[str, Any]:
        """Runs the action on this rank.

        Returns:
            `result`, or `error` and, after a timeout, whether the thread `waits` for other ranks.
        """
        outcome: dict[str, Any] = {}
        # The current device is per thread, and the device of a single process has no index.
        is_used = self.device.type == "cuda" and torch.cuda.is_initialized()
        gpu = torch.cuda.current_device() if is_used and self.device.index is None else self.device.index

        def work() -> None:
            try:
                if self.device.type == "cuda" and gpu is not None:
                    torch.cuda.set_device(gpu)
                outcome["result"] = json.loads(json.dumps(action()))
            except BaseException as error:
                outcome["error"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        deadline = time.monotonic() + timeout
        while thread.is_alive() and time.monotonic() < deadline:
            thread.join(0.2)
            if collective and thread.is_alive() and self._another_rank_failed():
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if thread.is_alive():
            self._hangs = True
            position, waits = _position(thread)
            return {"error": f"no result after {timeout:g} s, in {position}", "waits": waits}
        if "error" in outcome and collective and self.size > 1:
            self._store.set(f"{self._round}/failed", "")
        return outcome

    def _another_rank_failed(self) -> bool:
        return self.size > 1 and self._store.check([f"{self._round}/failed"])

    def _exchange(self, outcome: dict[str, Any], timeout: float) -> list[dict[str, Any]]:
        """Returns the outcomes of all ranks. Rank 0 publishes them as one list: n messages, not n²."""
        text = json.dumps(outcome)
        if self.size == 1:
            return [json.loads(text)]
        self._store.set(f"{self._round}/{self.rank}", text)
        if self.rank:
            received = self._receive(f"{self._round}/all", 2 * (timeout + GRACE_SECONDS))
            if received is None:
                raise RunError("rank 0 does not report any more")
            return json.loads(received)
        deadline, outcomes = time.monotonic() + timeout + GRACE_SECONDS, []
        for rank in range(self.size):
            received = None
            if rank not in self._unreachable:
                received = self._receive(f"{self._round}/{rank}", max(0.1, deadline - time.monotonic()))
            if received is None:
                self._unreachable.add(rank)
                received = '{"error": "does not report any more"}'
            outcomes.append(json.loads(received))
        self._store.set(f"{self._round}/all", json.dumps(outcomes))
        return outcomes

    def _receive(self, key: str, seconds: float) -> bytes | str | None:
        """Returns the value of `key` in the store, or None if no rank sets it within this time."""
        try:
            self._store.wait([key], timedelta(seconds=seconds))
            return self._store.get(key)
        except RuntimeError:
            return None


def _position(thread: threading.Thread) -> tuple[str, bool]:
    """Returns the function and line of this package in which a thread is, and whether it waits for other ranks."""
    frame = sys._current_frames().get(thread.ident or 0)
    stack = list(traceback.extract_stack(frame)) if frame else []
    own = [entry for entry in stack if "mnist_dist" in entry.filename] or stack
    position = f"{own[-1].name} ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else "an unknown function"
    # Data parallel exchanges gradients in the backward pass.
    waits = any(entry.filename.endswith(("distributed_c10d.py", "autograd/graph.py")) for entry in stack[-6:])
    return position, waits
