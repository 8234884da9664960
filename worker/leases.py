"""Leases, renewed by the worker's parent process: a busy child cannot stop it, a dead child is noticed.

The parent cannot know fences, and need not: the claim writes who holds a row as a token of node, process and Celery
request, and the parent renews and releases by that token alone, one UPDATE for all the work of its process tree.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from typing import Any

from celery.worker import state

from celery_flows.store import dispatch
from celery_flows.store.clock import boottime
from celery_flows.tasks.metrics import LEASES
from celery_flows.tasks.runtime import NODE, Runtime, pid_of
from celery_flows.tasks.steps import time_out
from celery_flows.worker.processes import held_by, is_alive
from celery_flows.worker.stops import EndProcess, Stops

log = logging.getLogger("celery_flows.leases")

LOOKS_FOR_THE_DEAD = 5


class Leases:
    """The leases of one worker's process tree."""

    def __init__(self, runtime: Runtime, end_process: EndProcess) -> None:
        self._runtime = runtime
        self._stops = Stops(runtime, end_process)
        self._interval = runtime.settings.lease_seconds / 3
        self._seen: dict[str, int] = {}  # token → pid, as of the last look
        self._dead: dict[str, int] = {}  # token → looks left; a row that somebody has locked is asked for again
        self._reported: deque[dict[str, int]] = deque()  # by other threads
        self._timed_out: deque[dict[str, int]] = deque()  # the same
        self._ending: dict[str, int] = {}  # token → pid: being ended for taking too long
        self._renewed_at = boottime()

    def keep(self) -> None:
        """One look: gives up what dead children held, at once; renews the rest, once per third of a lease; interrupts
        what is at work for flows that are to end."""
        self._look()
        if self._dead and not self._runtime.stopping.is_set():  # a stopping worker's did not crash
            self._time_out()
            self._stops.settle(self._dead)
            if released := self._runtime.store.run(dispatch.release, list(self._dead)):
                self._runtime.watch.meter.add(LEASES, ("released",), released)
                log.warning("released %d leases of dead worker processes", released)
            self._dead = {token: looks - 1 for token, looks in self._dead.items() if looks > 1}
        if boottime() - self._renewed_at >= self._interval:
            if self._seen:
                self._runtime.store.run(dispatch.renew, list(self._seen), self._runtime.settings.lease_seconds)
                self._runtime.watch.meter.add(LEASES, ("renewed",), len(self._seen))
            self._renewed_at = boottime()
        self._stops.look(self._seen)

    def lost(self, request: Any) -> None:
        """Celery tells that the process of this request has died; maybe it began since the last look. Never waits."""
        self._reported.append(held_by([request]))

    def timed_out(self, request: Any) -> None:
        """Celery is about to end the process of this request, for its hard time limit has passed. Never waits."""
        self._timed_out.append(held_by([request]))

    def _time_out(self) -> None:
        """The steps of processes that were ended for taking too long have timed out; they did not crash."""
        for token in self._dead.keys() & self._ending.keys():
            time_out(self._runtime, token)
            del self._ending[token]

    def are_held_here(self) -> bool:
        """Whether this process itself is at work, in threads."""
        return os.getpid() in {**self._seen, **held_by(state.active_requests)}.values()

    def hand_back(self) -> None:
        """Gives back what the dead of our process tree still hold, seen at work or not: the worker has ended them."""
        store = self._runtime.store
        dead = [token for token in store.run(dispatch.list_holders, f"{NODE}/") if not is_alive(pid_of(token))]
        if given := store.run(dispatch.hand_back_all, dead):
            self._runtime.watch.meter.add(LEASES, ("handed_back",), given)
            log.info("%d leases handed back", given)

    def _look(self) -> None:
        before = dict(self._seen)
        while self._reported:
            before |= self._reported.popleft()
        while self._timed_out:
            self._ending |= self._timed_out.popleft()
        current = {**held_by(state.active_requests), **self._ending}  # Celery is done with those
        dead = {token for token, pid in {**before, **current}.items() if not is_alive(pid)}
        self._dead |= dict.fromkeys(dead, LOOKS_FOR_THE_DEAD)
        self._seen = {token: pid for token, pid in current.items() if token not in dead}
