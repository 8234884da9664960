"""Store → broker: messages are hints, so sending one may fail; the sweep sends it again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cached_property
from typing import Any
from weakref import WeakSet

import sqlalchemy as sa
from celery import Celery
from kombu import Connection
from kombu.pools import producers
from sqlalchemy import event
from sqlalchemy.orm import Session

from celery_flows.store.dispatch import Hint
from celery_flows.tasks.settings import FlowSettings

log = logging.getLogger("celery_flows.publish")

DRIVE_TASK, STEP_TASK = "flows.drive", "flows.step"
Transaction = sa.Connection | Session


class Publisher:
    """Sends hints over a connection of its own, on which everything is bounded: a dead broker costs a moment."""

    def __init__(self, app: Celery, settings: FlowSettings) -> None:
        self._app = app
        self._timeout = settings.publish_timeout_seconds

    def publish(self, *hints: Hint) -> int:
        """Sends the hints until one fails; says how many were sent. Never raises."""
        sent = 0
        if not hints:
            return sent
        try:
            with producers[self._connection].acquire(block=True, timeout=self._timeout) as producer:
                for hint in hints:
                    self._send(producer, hint)
                    sent += 1
        except Exception as error:
            log.warning(
                "the broker took %d of %d messages (%s); the sweep sends the others later",
                sent, len(hints), type(error).__name__,
            )  # fmt: skip
        return sent

    def _send(self, producer: Any, hint: Hint) -> None:
        arguments = {"flow_id": str(hint.flow_id)}
        if hint.kind == "step":
            arguments["run_id"] = hint.run_id
        self._app.send_task(
            STEP_TASK if hint.kind == "step" else DRIVE_TASK,
            kwargs=arguments,
            task_id=hint.run_id,
            root_id=str(hint.flow_id),
            parent_id=None if hint.kind == "drive" else str(hint.flow_id),
            shadow=hint.task,
            queue=hint.queue or self._app.conf.task_default_queue,
            priority=hint.priority,
            producer=producer,
            serializer="json",
            ignore_result=True,
            retry=True,
            retry_policy=_ONE_RETRY,
            **(hint.options or {}),
        )

    @cached_property
    def _connection(self) -> Connection:
        """Never connected itself: the pool is found by it, and clones it."""
        return self._app.connection_for_write(
            connect_timeout=self._timeout, transport_options=self._transport_options(), heartbeat=0
        )

    def _transport_options(self) -> dict[str, Any]:
        scheme = str(self._app.conf.broker_write_url or "").partition(":")[0].partition("+")[0]
        if scheme in ("redis", "rediss", "sentinel"):
            return {**_ONE_RETRY, "socket_timeout": self._timeout, "socket_connect_timeout": self._timeout}
        if scheme in ("amqp", "amqps", "pyamqp"):
            # Without confirms a refused message is dropped in silence; then only the sweep would notice.
            bounds = {"read_timeout": self._timeout, "write_timeout": self._timeout}
            return {**_ONE_RETRY, **bounds, "confirm_publish": True}
        return {}


_ONE_RETRY = {"max_retries": 1, "interval_start": 0, "interval_step": 0.1, "interval_max": 0.2}


# ---- after the caller's commit --------------------------------------------------------------------------------------


def after_commit(transaction: Transaction, action: Callable[[], object]) -> None:
    """Runs ``action`` once the caller's transaction has committed; never, if it rolls back.

    For a Session that is right after the commit. A bare Connection tells only that a commit is about to be made, so
    there the action waits until the connection begins anew or goes back to its pool.
    """
    pending = _Pending.of_session(transaction) if isinstance(transaction, Session) else _Pending.of(transaction)
    pending.actions.append(action)


class _Pending:
    """What waits for the end of a transaction; kept with the pooled connection, or with the session.

    The listeners stay: SQLAlchemy does not allow a listener to be removed while its event is told.
    """

    _watched: WeakSet[Any] = WeakSet()

    def __init__(self) -> None:
        self.actions: list[Callable[[], object]] = []
        self.committed: list[Callable[[], object]] = []

    @classmethod
    def of(cls, connection: sa.Connection) -> _Pending:
        engine = connection.engine
        if engine not in cls._watched:
            cls._watched.add(engine)
            event.listen(engine, "commit", lambda conn: _pending(conn.info, _Pending._commit))
            event.listen(engine, "rollback", lambda conn: _pending(conn.info, _Pending._rollback))
            event.listen(engine, "begin", lambda conn: _pending(conn.info, _Pending._run))
            event.listen(engine, "checkin", lambda _dbapi, record: _pending(record.info, _Pending._run))
        pending: _Pending = connection.info.setdefault("celery_flows", cls())
        return pending

    @classmethod
    def of_session(cls, session: Session) -> _Pending:
        if "celery_flows" not in session.info:
            session.info["celery_flows"] = cls()
            event.listen(session, "after_commit", _session_commits)
            event.listen(session, "after_transaction_end", _session_transaction_ends)
        pending: _Pending = session.info["celery_flows"]
        return pending

    def _commit(self) -> None:
        self.committed, self.actions = self.committed + self.actions, []

    def _rollback(self) -> None:
        self.actions = []

    def _run(self) -> None:
        due, self.committed = self.committed, []
        for action in due:
            action()


def _pending(info: Any, step: Callable[[_Pending], None]) -> None:
    if (pending := info.get("celery_flows")) is not None:
        step(pending)


def _session_commits(session: Session) -> None:
    if not session.in_nested_transaction():  # a savepoint is released
        _pending(session.info, _Pending._commit)


def _session_transaction_ends(session: Session, transaction: Any) -> None:
    if transaction.parent is None:  # no savepoint; what is not committed by now was rolled back
        _pending(session.info, _Pending._rollback)
        _pending(session.info, _Pending._run)
