"""The store for asyncio: the same operations, run over async connections."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, Self, TypeVar
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession

from celery_flows.store import operations as op
from celery_flows.store import pruning, schema, script, sqlite
from celery_flows.store.changes import Change
from celery_flows.store.engines import dialect_of, make_async_engine, make_engine
from celery_flows.store.models import Flow, FlowEvent, FlowStatus, FlowStep, new_id
from celery_flows.store.operations import Mode
from celery_flows.store.pruning import Retention
from celery_flows.store.script import Call, Pause, Script
from celery_flows.store.transitions import Transition

P = ParamSpec("P")
T = TypeVar("T")


class AsyncFlowStore:
    """:class:`SqlFlowStore`, awaited: the same names, arguments, answers and errors.

    ``await AsyncFlowStore.open(url)`` brings the schema up to date; ``AsyncFlowStore(engine)`` takes your engine, and
    ``await store.check()`` says whether its schema is right.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        self._connection: AsyncConnection | None = None
        database = dialect_of(engine.sync_engine)
        if database is sqlite:
            sqlite.prepare(engine.sync_engine)
        self._engines = {
            Mode.READ: AsyncEngine(database.reading(engine.sync_engine)),
            Mode.SNAPSHOT: AsyncEngine(database.snapshot(engine.sync_engine)),
            Mode.WRITE: AsyncEngine(database.writing(engine.sync_engine, single=False)),
            Mode.SINGLE: AsyncEngine(database.writing(engine.sync_engine, single=True)),
        }

    @classmethod
    async def open(cls, url: str | sa.URL) -> Self:
        """A store whose schema is there and current: it is migrated first. Two processes may do so at once."""

        def migrate() -> None:
            engine = make_engine(url)
            try:
                schema.upgrade(engine)
            finally:
                engine.dispose()

        await asyncio.to_thread(migrate)
        store = cls(make_async_engine(url))
        await store.check()
        return store

    async def check(self) -> None:
        """Raises :class:`SchemaOutdated` unless the tables are there and of this version."""
        await self.run(schema.check)

    async def close(self) -> None:
        """Closes the engine's connections."""
        await self.engine.dispose()

    async def using(self, transaction: AsyncConnection | AsyncSession) -> Self:
        """This store inside the caller's transaction: the caller commits, nothing is tried again here."""
        bound = object.__new__(type(self))
        bound.__dict__.update(self.__dict__)
        bound._connection = await transaction.connection() if isinstance(transaction, AsyncSession) else transaction
        return bound

    @property
    def in_transaction(self) -> bool:
        """Whether somebody else commits what this store writes."""
        return self._connection is not None

    # ---- running operations ----

    async def run(self, operation: Callable[Concatenate[sa.Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs an operation; conflicts are tried again, drivers' errors translated."""
        result: T = await self.attempt(Call(operation, args, kwargs))
        return result

    async def attempt(
        self, call: Call, settled: Call | None = None, again: dict[str, Any] | None = None, **how: Any
    ) -> Any:
        """:func:`script.attempts`, played; within the caller's transaction a single try."""
        if self._connection is None:
            return await self.play(script.attempts(call, settled, again, **how))
        try:
            return await self._connection.run_sync(call.operation, *call.args, **call.kwargs)
        except SQLAlchemyError as error:
            raise script.translated(error) from error

    async def play(self, todo: Script[T]) -> T:
        """Carries out a script, each of its calls in a transaction of its own, or all in the caller's."""
        try:
            step = next(todo)
            while True:
                try:
                    answer = await self._perform(step)
                except Exception as error:
                    step = todo.throw(error)
                else:
                    step = todo.send(answer)
        except StopIteration as end:
            value: T = end.value
            return value

    async def _perform(self, step: Call | Pause) -> Any:
        if isinstance(step, Pause):
            await asyncio.sleep(step.seconds)
            return None
        if self._connection is not None:
            return await self._connection.run_sync(step.operation, *step.args, **step.kwargs)
        async with self._engines[step.operation.mode].begin() as connection:  # type: ignore[attr-defined]
            return await connection.run_sync(step.operation, *step.args, **step.kwargs)

    # ---- the contract ----

    async def insert(self, flow: Flow) -> None:
        await self.attempt(Call(op.insert_flow, (flow,)), settled=Call(op.find_inserted, (flow,)))

    async def get(self, flow_id: UUID) -> Flow | None:
        return await self.run(op.get_flow, flow_id)

    async def list_by_owner(
        self, owner_session_key: str, limit: int | None = 100, after: Flow | None = None
    ) -> list[Flow]:
        return await self.run(op.list_by_owner, owner_session_key, limit, after)

    async def list_by_status(
        self, status: FlowStatus, limit: int | None = 100, after: Flow | None = None
    ) -> list[Flow]:
        return await self.run(op.list_by_status, status, limit, after)

    async def update_with_revision(self, flow: Flow) -> Flow:
        return (await self.change(op.change_to(flow, None, {}))).flow

    async def append_event(self, flow_id: UUID, kind: str, payload: dict[str, Any]) -> FlowEvent:
        write_id = new_id()
        appended = Call(op.append_event, (flow_id, kind, payload, write_id))
        event: FlowEvent = await self.attempt(appended, settled=Call(op.find_event, (flow_id, write_id)))
        return event

    async def list_events(
        self, flow_id: UUID, limit: int | None = 100, after: FlowEvent | None = None
    ) -> list[FlowEvent]:
        return await self.run(op.list_events, flow_id, limit, after)

    async def insert_step(self, step: FlowStep) -> None:
        await self.attempt(Call(op.insert_step, (step,)), settled=Call(op.find_inserted_step, (step,)))

    async def update_step(self, step: FlowStep) -> FlowStep:
        return await self.run(op.update_step, step)

    async def get_step(self, step_id: UUID) -> FlowStep | None:
        return await self.run(op.get_step, step_id)

    async def list_steps(
        self, flow_id: UUID, limit: int | None = None, after: FlowStep | None = None
    ) -> list[FlowStep]:
        return await self.run(op.list_steps, flow_id, limit, after)

    async def find_step_by_run_id(self, flow_id: UUID, run_id: str) -> FlowStep | None:
        return await self.run(op.find_step_by_run_id, flow_id, run_id)

    async def update_and_append(
        self, flow: Flow, event_kind: str, event_payload: dict[str, Any]
    ) -> tuple[Flow, FlowEvent]:
        change = op.change_to(flow, event_kind, event_payload)
        if event_kind == "waiting":
            await self.run(op.check_waits_by_hand, flow)
        stored, event_id, _ = await self.change(change)
        return stored, op.event_of(change, stored, event_id)

    async def prune_terminal_flows(self, retain_days: int) -> int:
        return await self.play(pruning.prune(Retention(retain_days, retain_days)))

    # ---- beyond the contract ----

    async def change(self, change: Change, **how: Any) -> op.Written:
        """Writes one revision; a lost reply is looked into, never guessed at.

        Raises:
            FlowNotFound, RevisionMismatch: nothing was written.
        """
        written: op.Written = await self.attempt(
            Call(op.change_operation(change), (change,)), settled=Call(op.find_change, (change,)), **how
        )
        return written

    async def insert_and_append(self, flow: Flow, event_payload: dict[str, Any]) -> None:
        created = Call(op.insert_created, (flow, event_payload))
        await self.attempt(created, settled=Call(op.find_created, (flow,)))

    async def update_locked(self, flow_id: UUID, decide: Callable[[Flow], Transition | None]) -> Flow:
        write_id = new_id()
        updated = Call(op.update_locked, (flow_id, decide, write_id))
        flow: Flow = await self.attempt(updated, settled=Call(op.find_locked, (flow_id, write_id)))
        return flow

    async def upsert_step(self, step: FlowStep) -> FlowStep:
        write_id = new_id()
        observed = Call(op.observe_step, (step, write_id))
        stored: FlowStep = await self.attempt(observed, settled=Call(op.find_observed, (step, write_id)))
        return stored
