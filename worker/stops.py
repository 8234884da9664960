"""Cancel and deadline reach what runs: the worker's parent process interrupts the bodies of steps whose flows are to
end, and ends the processes of those that do not heed it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import NamedTuple

from celery.worker import state

from celery_flows.store import dispatch
from celery_flows.store.clock import boottime
from celery_flows.store.dispatch import Held
from celery_flows.tasks.interrupts import SIGNAL, Mark
from celery_flows.tasks.runtime import Runtime
from celery_flows.tasks.steps import cancel_stopped
from celery_flows.worker.processes import held_by, standing_still

log = logging.getLogger("celery_flows.leases")

HEED_SECONDS = 10.0  # that a body has to end once it was interrupted, before its process is ended

EndProcess = Callable[[int], object]


class Body(NamedTuple):
    """A step's body that one of our processes is in the midst of."""

    token: str  # of the process and its request
    pid: int
    mark: Mark

    @property
    def worker(self) -> str:
        """The token of its claim."""
        return f"{self.token}/{self.mark.claim}"


class Stops:
    """What one worker's process tree runs of flows that are to end."""

    def __init__(self, runtime: Runtime, end_process: EndProcess) -> None:
        self._runtime, self._end_process = runtime, end_process
        self._before: set[Body] = set()  # as of the last look
        self._asked: dict[Body, float] = {}  # when it was first interrupted
        self._ended: dict[str, Held] = {}  # token → what it held: its process was ended

    def look(self, seen: Mapping[str, int]) -> None:
        """Interrupts what is to be interrupted, among the requests of these tokens and processes. Asks the store only
        about bodies that ran at the last look already: short steps cost nothing."""
        running = self._runtime.interrupts.running
        bodies = {Body(token, pid, mark) for token, pid in seen.items() if (mark := running(pid)) is not None}
        long = {body.worker: body for body in bodies & self._before}
        self._before = bodies
        self._asked = {body: at for body, at in self._asked.items() if body in bodies}
        if long:
            for held in self._runtime.store.run(dispatch.list_to_stop, list(long)):
                self._stop(long[held.worker], held)

    def _stop(self, body: Body, held: Held) -> None:
        asked_at = self._asked.setdefault(body, boottime())
        if boottime() - asked_at < HEED_SECONDS:
            with suppress(ProcessLookupError):
                os.kill(body.pid, SIGNAL)  # again with each look: it strikes a body once
        elif body.pid != os.getpid() and not self._runtime.stopping.is_set():
            self._end(body, held)

    def _end(self, body: Body, held: Held) -> None:
        """Ends the process, if it is in the midst of just this body: it stands still while we look, so that nothing
        else can be struck."""
        with standing_still(body.pid) as is_still:
            is_there = held_by(state.active_requests).get(body.token) == body.pid
            if is_still and is_there and self._runtime.interrupts.running(body.pid) == body.mark:
                log.warning("process %d is ended: its step did not heed that flow %s is to end", body.pid, held.flow_id)
                self._ended[body.token] = held
                self._end_process(body.pid)

    def settle(self, dead: Iterable[str]) -> None:
        """What processes held that were ended here: a step is cancelled, a flow goes on at once; they did not crash."""
        for token in self._ended.keys() & set(dead):
            settle_ended(self._runtime, self._ended[token])
            del self._ended[token]


def settle_ended(runtime: Runtime, held: Held) -> None:
    """Records what became of a row whose holder's process was ended because the row's flow is to end."""
    if held.kind == "step":
        cancel_stopped(runtime, held.worker.rpartition("/")[0])
    elif runtime.store.run(dispatch.hand_back_all, [held.worker]):
        runtime.call_worker(held.run_id)
