"""The caller's own transaction: what is done in it, and what waits for its commit."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakSet

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session
from sqlalchemy.orm import Session, scoped_session

from celery_flows.store import InvalidData

log = logging.getLogger("celery_flows.transaction")

Transaction = sa.Connection | Session

PENDING = "celery_flows"  # the key under which a connection or session keeps what waits


def transaction_of(given: Any) -> Transaction:
    """The Session or Connection that was given, out of a ``scoped_session`` if need be.

    Raises:
        InvalidData: it is neither.
    """
    if isinstance(given, scoped_session):
        session: Session = given()
        return session
    if isinstance(given, sa.Connection | Session):
        return given
    if isinstance(given, AsyncSession | AsyncConnection | async_scoped_session):
        raise InvalidData("session", "is an async one; await the method of this name that begins with an a, as astart")
    raise InvalidData("session", f"must be a SQLAlchemy Session or Connection, not {type(given).__name__}")


def after_commit(transaction: Transaction, action: Callable[[], object]) -> None:
    """Runs ``action`` once the caller's transaction has committed; never, if it rolls back. Its errors are logged.

    Where an event loop runs, as under an AsyncSession, that is in a thread: it must not wait for a broker.

    For a Session that is right after the commit. A bare Connection tells only that a commit is about to be made, so
    there the action waits until the connection goes back to its pool, and must not use the database.
    """
    pending = _Pending.of_session(transaction) if isinstance(transaction, Session) else _Pending.of(transaction)
    pending.actions.append(action)


def once_committed(caller: Transaction | None, action: Callable[[], object]) -> None:
    """Acts after the caller's commit; without a caller all is committed, so now."""
    if caller is None:
        action()
    else:
        after_commit(caller, action)


def hold_back(session: Session) -> Callable[[], None]:
    """Has what is to follow this session's commits wait until the function that this gives is called: they release
    savepoints of a transaction that somebody else commits."""
    pending = _Pending.of_session(session)
    pending.is_held_back = True

    def follow() -> None:
        pending.is_held_back = False
        pending._run()

    return follow


class _Pending:
    """What waits for the end of a transaction; kept with the pooled connection, or with the session.

    The listeners stay: SQLAlchemy does not allow a listener to be removed while its event is told.
    """

    _watched: WeakSet[Any] = WeakSet()

    def __init__(self) -> None:
        self.actions: list[Callable[[], object]] = []
        self.committed: list[Callable[[], object]] = []
        self.is_held_back = False

    @classmethod
    def of(cls, connection: sa.Connection) -> _Pending:
        if connection not in cls._watched:
            cls._watched.add(connection)
            event.listen(connection, "commit", lambda conn: _pending(conn.info, _Pending._commit))
            event.listen(connection, "rollback", lambda conn: _pending(conn.info, _Pending._rollback))
        pool = connection.engine.pool
        if pool not in cls._watched:
            cls._watched.add(pool)
            event.listen(pool, "checkin", lambda _dbapi, record: _pending(record.info, _Pending._run))
        pending: _Pending = connection.info.setdefault(PENDING, cls())
        return pending

    @classmethod
    def of_session(cls, session: Session) -> _Pending:
        if PENDING not in session.info:
            session.info[PENDING] = cls()
            event.listen(session, "after_commit", _session_commits)
            event.listen(session, "after_transaction_end", _session_transaction_ends)
        pending: _Pending = session.info[PENDING]
        return pending

    def _commit(self) -> None:
        self.committed, self.actions = self.committed + self.actions, []

    def _rollback(self) -> None:
        self.actions = []

    def _run(self) -> None:
        if self.is_held_back:
            return
        due, self.committed = self.committed, []
        if due:
            _off_the_loop(lambda: _run_all(due))


def _run_all(actions: Sequence[Callable[[], object]]) -> None:
    for action in actions:
        try:
            action()
        except Exception as error:  # the caller has committed: what is left to do, the sweep does
            log.warning("what was to follow a commit is left to the sweep (%s)", type(error).__name__)


def _off_the_loop(action: Callable[[], object]) -> None:
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:  # there is none
        action()
    else:
        loop.run_in_executor(None, action)


def _pending(info: Any, step: Callable[[_Pending], None]) -> None:
    if (pending := info.get(PENDING)) is not None:
        step(pending)


def _session_commits(session: Session) -> None:
    if not session.in_nested_transaction():  # a savepoint is released
        _pending(session.info, _Pending._commit)


def _session_transaction_ends(session: Session, transaction: Any) -> None:
    if transaction.parent is None:  # no savepoint; what is not committed by now was rolled back
        _pending(session.info, _Pending._rollback)
        _pending(session.info, _Pending._run)
