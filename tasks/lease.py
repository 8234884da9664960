"""Leases: whether one surely runs, and how it is given up."""

from __future__ import annotations

from contextlib import suppress
from math import inf
from typing import Any

from celery.exceptions import WorkerShutdown, WorkerTerminate

from celery_flows.store import FlowError, LeaseLost, StoreError, dispatch
from celery_flows.store.changes import Holder
from celery_flows.store.clock import boottime
from celery_flows.tasks.runtime import Runtime

UNKNOWN_PAUSE_SECONDS = 60.0  # before work whose code is not here is offered again


def passed_on(runtime: Runtime, run_id: str) -> bool:
    """Whether this worker is stopping, so that another is to do this: then its message has been sent again."""
    if not runtime.stopping.is_set():
        return False
    runtime.call_worker(run_id)
    return True


def surely_held(runtime: Runtime, holder: Holder, until: float) -> float:
    """Renews a lease that may have ended, by this process's own clock, and gives until when it surely runs.

    It looks again after renewing: that may have taken longer than a lease itself, if the process was stopped meanwhile.

    Raises:
        LeaseLost: another worker has taken over.
    """
    while (asked_at := boottime()) >= until:
        if not runtime.store.run(dispatch.renew_own, holder, runtime.settings.lease_seconds):
            raise LeaseLost(holder.run_id)
        until = asked_at + runtime.settings.lease_seconds
    return until


def surely(runtime: Runtime) -> dict[str, Any]:
    """How a store tries to write the outcome of work, which would else have to be done again.

    While the database cannot be reached, for as long as the lease is likely to last. While an open transaction holds a
    lock, for as long as that takes, also if the worker is told to stop: the lease is renewed meanwhile, and where it
    cannot be, for its row is locked, nobody can take it either. A lease that was lost refuses the write.
    """
    return {"patience": runtime.settings.lease_seconds / 2, "lock_tries": inf}


def let_go(runtime: Runtime, holder: Holder, error: BaseException) -> None:
    """Gives up a lease because of an exception that ends more than the work: unharmed if this process was told to stop
    or the database was away; as a crash, so that it has an end, if the work itself wanted to end the process or the
    database refuses what came of it."""
    told = isinstance(error, WorkerShutdown | WorkerTerminate) or runtime.stopping.is_set()
    unharmed = told or (isinstance(error, StoreError) and error.is_passing)
    with suppress(FlowError):
        runtime.store.run(dispatch.hand_back if unharmed else dispatch.end_lease, holder)
