"""How an operation is run: tried, judged, tried again. Written once, played by the synchronous and the async store.

A script is a generator. It yields what is to be done (:class:`Call`, :class:`Pause`), is sent what came of it or thrown
what went wrong, and returns the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError

from celery_flows.store.backoff import full_jitter
from celery_flows.store.errors import StoreError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Call:
    """Run ``operation`` over a connection, in a transaction of its own."""

    operation: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Pause:
    """Sleep."""

    seconds: float


Script = Generator[Call | Pause, Any, T]

TRIES = 8
RECONNECTS = 3


def attempts(call: Call, settled: Call | None = None, again: dict[str, Any] | None = None) -> Script[Any]:
    """Runs ``call``; deadlocks, serialization failures and a busy database are tried again from the start.

    When the connection broke, nobody knows whether the commit came through. ``settled`` looks for what it wrote: an
    answer is the answer; None means nothing was written, so it is tried again, with ``again`` as further keywords.

    Raises:
        StoreError: the database refused or cannot be reached; the driver's error is the cause.
    """
    conflicts = reconnects = 0
    while True:
        try:
            return (yield call)
        except DBAPIError as error:
            if is_conflict(error) and conflicts < TRIES:
                conflicts += 1
                pause = full_jitter(conflicts, first=0.01, cap=0.5)
            elif is_lost(error) and reconnects < RECONNECTS:
                reconnects += 1
                pause = full_jitter(reconnects, first=0.05, cap=1.0)
            else:
                raise translated(error) from error
            lost = is_lost(error)
        yield Pause(pause)
        if lost and settled is not None:
            found = yield from attempts(settled)
            if found is not None:
                return found
        if lost and again:
            call = Call(call.operation, call.args, {**call.kwargs, **again})


def is_conflict(error: DBAPIError) -> bool:
    """Whether the database ended the transaction in somebody else's favour: run it again from the start."""
    state = getattr(error.orig, "sqlstate", None)
    return state in ("40P01", "40001") or "database is locked" in str(error.orig)


def is_lost(error: DBAPIError) -> bool:
    """Whether the connection broke, so that a commit may or may not have come through."""
    state = getattr(error.orig, "sqlstate", None) or ""
    broke = error.connection_invalidated or (isinstance(error, OperationalError) and state[:2] in ("08", "57"))
    return broke and state != "57014"  # 57014: a statement that took too long was cancelled; the connection lives


def translated(error: DBAPIError) -> StoreError:
    """The one place where drivers' errors become ours. Parameters stay out of the text: they may be secret."""
    if isinstance(error, IntegrityError):
        return StoreError(f"the database refused a row: {first_line(error)}")
    if is_lost(error) or isinstance(error, OperationalError):
        return StoreError(
            f"the database could not be reached or was interrupted ({first_line(error)}): "
            "check flow_store_url (FLOW_STORE_URL), and that the server is up"
        )
    return StoreError(f"the database refused a statement: {first_line(error)}")


def first_line(error: DBAPIError) -> str:
    """What the driver said, without statement, parameters and details."""
    lines = str(error.orig).strip().splitlines()
    return lines[0] if lines else type(error.orig).__name__
