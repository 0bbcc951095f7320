"""Asks all processes the same question and hears every answer, whatever breaks in one of them or between them."""

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

LIMIT = 45.0
"""Seconds that an action may take."""

GRACE = 5.0
"""Seconds that the others still wait in an action that one of them could not finish."""


class Failed(Exception):
    """An action that could not be done, on some ranks at least; raised on all of them alike.

    `errors`: what happened, by rank; ranks that only waited for these are not among them. `values`: the other answers.
    """

    def __init__(self, errors: dict[int, str], values: dict[int, Any] | None = None):
        super().__init__("; ".join(f"rank {rank}: {what}" for rank, what in errors.items()))
        self.errors, self.values = errors, values or {}


class Ranks:
    """The processes of a world, to be asked together.

    Answers travel through the launcher's rendezvous store, not through collectives: they arrive where the network
    between the devices, which may be what is asked about, does not work.

    Args:
        state: from `launched_world`.
    """

    def __init__(self, state: PartialState):
        self.state, self.rank, self.size, self.device = state, state.process_index, state.num_processes, state.device
        self.can_meet = True
        """False once an action in which all must meet has failed: those that follow would hang."""
        self._stuck = False
        self._silent: set[int] = set()
        self._round = 0
        if self.size > 1:
            store = dist.distributed_c10d._get_default_store()
            # A connection of its own: a collective that waits for its frameworks in the store blocks the shared one.
            self._store = dist.PrefixStore(
                "mnist_dist.doctor.ranks", store.clone() if hasattr(store, "clone") else store
            )

    def ask(self, action: Callable[[], Any], *, meets: bool = False, limit: float | None = None) -> list[Any]:
        """Runs `action` in a thread on every rank, so that one that hangs is an answer too.

        Args:
            action: returns what JSON can carry.
            meets: the ranks wait for one another in it.
            limit: seconds it may take; None for LIMIT.

        Returns:
            the answers in the order of the ranks, on every rank.

        Raises:
            Failed: on every rank, where one raised, hung or was not heard of.
            RunError: rank 0, which collects the answers, is gone.
        """
        if meets and not self.can_meet:
            raise Failed(dict.fromkeys(range(self.size), "not tried: an earlier meeting of all processes failed"))
        limit = LIMIT if limit is None else limit
        self._round += 1
        answers = self._exchange(self._attempt(action, meets, limit), limit)
        values = {rank: answer["value"] for rank, answer in enumerate(answers) if "value" in answer}
        failures = {rank: answer for rank, answer in enumerate(answers) if rank not in values}
        if failures:
            self.can_meet = self.can_meet and not meets
            guilty = {rank: answer for rank, answer in failures.items() if not answer.get("waited")} or failures
            raise Failed({rank: answer["error"] for rank, answer in guilty.items()}, values)
        return [answer["value"] for answer in answers]

    def leave(self, code: int) -> int:
        """Returns `code` when no other rank needs this one; ends the process at once where one still hangs."""
        if self.size > 1 and self.rank:
            self._store.set(f"left/{self.rank}", "")
        for rank in range(1, self.size if self.rank == 0 else 0):  # rank 0 may hold the store
            if rank not in self._silent:
                self._hear(f"left/{rank}", GRACE)
        # No regular exit could wait for a thread that hangs, or take down connections that somebody still waits on.
        if self._stuck or (self.size > 1 and not self.can_meet):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        self.state.destroy_process_group()
        return code

    def _attempt(self, action: Callable[[], Any], meets: bool, limit: float) -> dict[str, Any]:
        """The value of the action, or its error, with `waited` where that is only another rank's error felt here."""
        answer: dict[str, Any] = {}

        def work() -> None:
            try:
                if self.device.type == "cuda" and self.device.index is not None:  # a thread has its own current one
                    torch.cuda.set_device(self.device)
                answer["value"] = json.loads(json.dumps(action()))
            except BaseException as error:
                answer["error"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        deadline = time.monotonic() + limit
        while thread.is_alive() and time.monotonic() < deadline:
            thread.join(0.2)
            if meets and thread.is_alive() and self._somebody_failed():
                deadline = min(deadline, time.monotonic() + GRACE)
        if thread.is_alive():
            self._stuck = True
            place, waits = _where(thread)
            return {"error": f"no answer within {limit:g} s, in {place}", "waited": waits}
        if "error" in answer and meets and self.size > 1:
            self._store.set(f"{self._round}/failed", "")
        return answer

    def _somebody_failed(self) -> bool:
        return self.size > 1 and self._store.check([f"{self._round}/failed"])

    def _exchange(self, answer: dict[str, Any], limit: float) -> list[dict[str, Any]]:
        """Rank 0 collects the answers and publishes them as one list, so the store's work grows with the world only."""
        text = json.dumps(answer)
        if self.size == 1:
            return [json.loads(text)]
        self._store.set(f"{self._round}/{self.rank}", text)
        if self.rank:
            heard = self._hear(f"{self._round}/all", 2 * (limit + GRACE))
            if heard is None:
                raise RunError("rank 0 is not heard of any more")
            return json.loads(heard)
        deadline, answers = time.monotonic() + limit + GRACE, []
        for rank in range(self.size):
            heard = None
            if rank not in self._silent:
                heard = self._hear(f"{self._round}/{rank}", max(0.1, deadline - time.monotonic()))
            if heard is None:
                self._silent.add(rank)
                heard = '{"error": "not heard of any more"}'
            answers.append(json.loads(heard))
        self._store.set(f"{self._round}/all", json.dumps(answers))
        return answers

    def _hear(self, key: str, seconds: float) -> bytes | str | None:
        """What somebody wrote, or None if nobody did in that time."""
        try:
            self._store.wait([key], timedelta(seconds=seconds))
            return self._store.get(key)
        except RuntimeError:
            return None


def _where(thread: threading.Thread) -> tuple[str, bool]:
    """The place in our own code where a thread stands, and whether it waits for other processes there."""
    frame = sys._current_frames().get(thread.ident or 0)
    stack = list(traceback.extract_stack(frame)) if frame else []
    own = [entry for entry in stack if "mnist_dist" in entry.filename] or stack
    place = f"{own[-1].name} ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else "an unknown place"
    # The backward pass is where data parallel exchanges gradients.
    waits = any(entry.filename.endswith(("distributed_c10d.py", "autograd/graph.py")) for entry in stack[-6:])
    return place, waits
