"""How an operation is run: tried, judged, tried again. Written once, played by the synchronous and the async store.

A script is a generator. It yields what is to be done (:class:`Call`, :class:`Pause`), is sent what came of it or thrown
what went wrong, and returns the answer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError, SQLAlchemyError

from celery_flows.store.backoff import full_jitter
from celery_flows.store.errors import FlowError, StoreError

log = logging.getLogger("celery_flows.store")

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
PATIENCE_SECONDS = 1.5  # of pauses between tries to reach the database again
LOCK_NOT_AVAILABLE = "55P03"
DATA_EXCEPTION = "22"  # the class of SQL states of values that are no number, no time, too long
CONFLICTS = frozenset({"40P01", "40001", LOCK_NOT_AVAILABLE})


def attempts(
    call: Call,
    settled: Call | None = None,
    again: dict[str, Any] | None = None,
    *,
    patience: float = PATIENCE_SECONDS,
    lock_tries: float = TRIES,
) -> Script[Any]:
    """Runs ``call``; deadlocks, serialization failures, held locks and a busy database are tried again from the start.

    When the connection broke, nobody knows whether the commit came through, or will: the statement may still run.
    ``settled`` looks for what it wrote: an answer is the answer; None means nothing is written yet, so it is tried
    again, with ``again`` as further keywords, and what that comes to is held against ``settled`` once more.

    Args:
        patience: seconds of pauses in which an unreachable database is tried again.
        lock_tries: how often it is tried again to get a lock that somebody holds for long.

    Raises:
        StoreError: the database refused or cannot be reached; the driver's error is the cause.
    """
    conflicts, locked_out, waited, in_doubt = 0, 0, 0.0, False
    while True:
        try:
            answer = yield call
        except SQLAlchemyError as error:
            if in_doubt and settled is not None and isinstance(error, IntegrityError):
                found = yield from attempts(settled)
                if found is not None:
                    return found
            if is_lock_timeout(error) and locked_out < lock_tries:
                locked_out += 1
                pause = full_jitter(locked_out, first=0.01, cap=0.5)
                if locked_out == TRIES + 1:
                    log.warning("an open transaction holds a lock for long; what needs it is tried again and again")
            elif is_conflict(error) and not is_lock_timeout(error) and conflicts < TRIES:
                conflicts += 1
                pause = full_jitter(conflicts, first=0.01, cap=0.5)
            elif is_lost(error) and waited < patience:
                pause = max(0.02, full_jitter(1 + int(waited), first=0.3, cap=1.0))
                waited += pause
                in_doubt = True
            else:
                raise translated(error) from error
        except FlowError:
            found = (yield from attempts(settled)) if in_doubt and settled is not None else None
            if found is None:
                raise
            return found
        else:
            if in_doubt and settled is not None and (answer is None or answer is False):  # refused: by our own write?
                found = yield from attempts(settled)
                return answer if found is None else found
            return answer
        yield Pause(pause)
        if in_doubt and settled is not None:
            found = yield from attempts(settled)
            if found is not None:
                return found
        if in_doubt and again:
            call = Call(call.operation, call.args, {**call.kwargs, **again})


def is_conflict(error: SQLAlchemyError) -> bool:
    """Whether the database ended the transaction in somebody else's favour: run it again from the start."""
    if not isinstance(error, DBAPIError):
        return False
    return getattr(error.orig, "sqlstate", None) in CONFLICTS or "database is locked" in str(error.orig)


def is_lock_timeout(error: BaseException | None) -> bool:
    """Whether somebody held a lock for longer than the connection waits for one. Of PostgreSQL alone."""
    return getattr(getattr(error, "orig", None), "sqlstate", None) == LOCK_NOT_AVAILABLE


def is_lost(error: SQLAlchemyError) -> bool:
    """Whether the connection broke or could not be made, so that a commit may or may not have come through."""
    if not isinstance(error, DBAPIError):
        return False
    state = getattr(error.orig, "sqlstate", None)
    # 57P0x: the server ends connections or is starting up; 08: connection exceptions; none: there was no connection.
    # Not 57014: a statement that took too long was cancelled, and the connection lives.
    broke = state is None or state[:2] == "08" or state.startswith("57P")
    postgresql = hasattr(error.orig, "sqlstate")
    return error.connection_invalidated or (isinstance(error, OperationalError) and postgresql and broke)


def translated(error: SQLAlchemyError) -> StoreError:
    """The one place where drivers' errors become ours. Parameters stay out of all texts: they may be secret."""
    if isinstance(error, DBAPIError):
        _hide_values(error)
    if isinstance(error, IntegrityError):
        return StoreError(f"the database refused a row: {first_line(error)}")
    if is_lost(error) or isinstance(error, OperationalError):
        return StoreError(
            f"the database could not be reached or was interrupted ({first_line(error)}): "
            "check flow_store_url (FLOW_STORE_URL), and that the server is up",
            is_passing=True,
        )
    if not isinstance(error, DBAPIError):
        return StoreError(f"the database cannot be used: {first_line(error)}")
    return StoreError(f"the database refused a statement: {first_line(error)}")


def _hide_values(error: DBAPIError) -> None:
    """The causes are printed with every traceback, and PostgreSQL's details repeat the row that it refuses."""
    error.hide_parameters = True
    said = first_line(error)
    error.args = (f"({type(error.orig).__name__}) {said}",)
    if error.orig is not None:
        error.orig.args = (said,)


def first_line(error: SQLAlchemyError) -> str:
    """What the driver said, without statement, parameters and details; of data that does not fit only the error's name,
    for there PostgreSQL repeats it."""
    said = error.orig if isinstance(error, DBAPIError) else error
    if str(getattr(said, "sqlstate", None)).startswith(DATA_EXCEPTION):
        return type(said).__name__
    lines = str(said).strip().splitlines()
    return lines[0] if lines else type(said).__name__
