"""The store over SQLAlchemy: the operations, each run in a transaction of its own or in the caller's."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, Self, TypeVar
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from celery_flows.store import operations as op
from celery_flows.store import pruning, schema, script, sqlite
from celery_flows.store.base import FlowStore
from celery_flows.store.changes import Change
from celery_flows.store.engines import dialect_of, make_engine
from celery_flows.store.models import Flow, FlowEvent, FlowStatus, FlowStep, new_id
from celery_flows.store.operations import Mode
from celery_flows.store.pruning import Retention
from celery_flows.store.script import Call, Pause, Script
from celery_flows.store.transitions import Transition

P = ParamSpec("P")
T = TypeVar("T")


class SqlFlowStore(FlowStore):
    """A :class:`FlowStore` in PostgreSQL or SQLite.

    ``SqlFlowStore.open(url)`` brings the schema up to date; ``SqlFlowStore(engine)`` takes your engine and only checks
    it. An engine for SQLite must be handed over before its first use: its connections are prepared when they are made.

    Raises:
        SchemaOutdated: the tables are missing or of another version.
        StoreError: the database cannot be reached.
    """

    def __init__(self, engine: sa.Engine, *, check: bool = True) -> None:
        self.engine = engine
        self._connection: sa.Connection | None = None
        database = dialect_of(engine)
        if database is sqlite:
            sqlite.prepare(engine)
            sqlite.close_before_forks(engine)
        self._transaction = database.transaction
        self._engines = {
            Mode.READ: database.reading(engine),
            Mode.SNAPSHOT: database.snapshot(engine),
            Mode.WRITE: database.writing(engine, single=False),
            Mode.SINGLE: database.writing(engine, single=True),
        }
        if check:
            self.run(schema.check)

    @classmethod
    def open(cls, url: str | sa.URL) -> Self:
        """A store whose schema is there and current: it is migrated first. Two processes may do so at once."""
        engine = make_engine(url)
        schema.upgrade(engine)
        return cls(engine)

    def close(self) -> None:
        """Closes the engine's connections."""
        self.engine.dispose()

    def using(self, transaction: sa.Connection | Session) -> Self:
        """This store inside the caller's transaction: the caller commits, nothing is tried again here."""
        bound = object.__new__(type(self))
        bound.__dict__.update(self.__dict__)
        bound._connection = transaction.connection() if isinstance(transaction, Session) else transaction
        return bound

    @property
    def in_transaction(self) -> bool:
        """Whether somebody else commits what this store writes."""
        return self._connection is not None

    # ---- running operations ----

    def run(self, operation: Callable[Concatenate[sa.Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs an operation; conflicts are tried again, drivers' errors translated."""
        result: T = self.attempt(Call(operation, args, kwargs))
        return result

    def attempt(self, call: Call, settled: Call | None = None, again: dict[str, Any] | None = None, **how: Any) -> Any:
        """:func:`script.attempts`, played; within the caller's transaction a single try."""
        if self._connection is None:
            return self.play(script.attempts(call, settled, again, **how))
        try:
            return call.operation(self._connection, *call.args, **call.kwargs)
        except SQLAlchemyError as error:
            raise script.translated(error) from error

    def play(self, todo: Script[T]) -> T:
        """Carries out a script, each of its calls in a transaction of its own, or all in the caller's."""
        try:
            step = next(todo)
            while True:
                try:
                    answer = self._perform(step)
                except Exception as error:
                    step = todo.throw(error)
                else:
                    step = todo.send(answer)
        except StopIteration as end:
            value: T = end.value
            return value

    def _perform(self, step: Call | Pause) -> Any:
        if isinstance(step, Pause):
            time.sleep(step.seconds)
            return None
        if self._connection is not None:
            return step.operation(self._connection, *step.args, **step.kwargs)
        engine = self._engines[step.operation.mode]  # type: ignore[attr-defined]
        with self._transaction(engine) as connection:
            return step.operation(connection, *step.args, **step.kwargs)

    # ---- the contract ----

    def insert(self, flow: Flow) -> None:
        self.attempt(Call(op.insert_flow, (flow,)), settled=Call(op.find_inserted, (flow,)))

    def get(self, flow_id: UUID) -> Flow | None:
        return self.run(op.get_flow, flow_id)

    def list_by_owner(self, owner_session_key: str, limit: int | None = 100, after: Flow | None = None) -> list[Flow]:
        return self.run(op.list_by_owner, owner_session_key, limit, after)

    def list_by_status(self, status: FlowStatus, limit: int | None = 100, after: Flow | None = None) -> list[Flow]:
        return self.run(op.list_by_status, status, limit, after)

    def update_with_revision(self, flow: Flow) -> Flow:
        return self.change(op.change_to(flow, None, {})).flow

    def append_event(self, flow_id: UUID, kind: str, payload: dict[str, Any]) -> FlowEvent:
        write_id = new_id()
        appended = Call(op.append_event, (flow_id, kind, payload, write_id))
        event: FlowEvent = self.attempt(appended, settled=Call(op.find_event, (flow_id, write_id)))
        return event

    def list_events(self, flow_id: UUID, limit: int | None = 100, after: FlowEvent | None = None) -> list[FlowEvent]:
        return self.run(op.list_events, flow_id, limit, after)

    def insert_step(self, step: FlowStep) -> None:
        self.attempt(Call(op.insert_step, (step,)), settled=Call(op.find_inserted_step, (step,)))

    def update_step(self, step: FlowStep) -> FlowStep:
        return self.run(op.update_step, step)

    def get_step(self, step_id: UUID) -> FlowStep | None:
        return self.run(op.get_step, step_id)

    def list_steps(self, flow_id: UUID, limit: int | None = None, after: FlowStep | None = None) -> list[FlowStep]:
        return self.run(op.list_steps, flow_id, limit, after)

    def find_step_by_run_id(self, flow_id: UUID, run_id: str) -> FlowStep | None:
        return self.run(op.find_step_by_run_id, flow_id, run_id)

    def update_and_append(self, flow: Flow, event_kind: str, event_payload: dict[str, Any]) -> tuple[Flow, FlowEvent]:
        change = op.change_to(flow, event_kind, event_payload)
        if event_kind == "waiting":
            self.run(op.check_waits_by_hand, flow)
        stored, event_id, _ = self.change(change)
        return stored, op.event_of(change, stored, event_id)

    def prune_terminal_flows(self, retain_days: int) -> int:
        return self.play(pruning.prune(Retention(retain_days, retain_days)))

    # ---- beyond the contract ----

    def change(self, change: Change, **how: Any) -> op.Written:
        """Writes one revision; a lost reply is looked into, never guessed at.

        Raises:
            FlowNotFound, RevisionMismatch: nothing was written.
        """
        written: op.Written = self.attempt(
            Call(op.change_operation(change), (change,)), settled=Call(op.find_change, (change,)), **how
        )
        return written

    def insert_and_append(self, flow: Flow, event_payload: dict[str, Any]) -> None:
        created = Call(op.insert_created, (flow, event_payload))
        self.attempt(created, settled=Call(op.find_created, (flow,)))

    def update_locked(self, flow_id: UUID, decide: Callable[[Flow], Transition | None]) -> Flow:
        write_id = new_id()
        updated = Call(op.update_locked, (flow_id, decide, write_id))
        flow: Flow = self.attempt(updated, settled=Call(op.find_locked, (flow_id, write_id)))
        return flow

    def upsert_step(self, step: FlowStep) -> FlowStep:
        write_id = new_id()
        observed = Call(op.observe_step, (step, write_id))
        stored: FlowStep = self.attempt(observed, settled=Call(op.find_observed, (step, write_id)))
        return stored
