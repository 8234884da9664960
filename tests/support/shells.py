"""The store and its manager behind one face, synchronous or awaited, so that one suite tests both."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from celery_flows.store import AsyncFlowManager, AsyncFlowStore, FlowManager, SqlFlowStore
from celery_flows.store.engines import make_async_engine, make_engine
from celery_flows.tasks.testing.databases import wipe


class Awaited:
    """An object whose coroutine methods are run to their end in an event loop of its own."""

    def __init__(self, target: object, runner: asyncio.Runner) -> None:
        self._target, self._runner = target, runner

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._target, name)
        if not inspect.iscoroutinefunction(found):
            return found
        return lambda *args, **kwargs: self._runner.run(found(*args, **kwargs))


@dataclass(frozen=True)
class Bound:
    """Store and manager inside a caller's transaction."""

    store: SqlFlowStore
    manager: FlowManager
    commit: Callable[[], None]
    rollback: Callable[[], None]
    wipe: Callable[[], None]  # empties our tables


@dataclass(frozen=True)
class Shell:
    """One of the two ways to call the store; ``within`` opens a caller's "connection" or "session"."""

    store: SqlFlowStore
    manager: FlowManager
    within: Callable[[str], AbstractContextManager[Bound]]


@contextmanager
def synchronous(url: str) -> Iterator[Shell]:
    """The synchronous store."""
    store = SqlFlowStore(make_engine(url))

    @contextmanager
    def within(kind: str) -> Iterator[Bound]:
        opened: sa.Connection | Session = store.engine.connect() if kind == "connection" else Session(store.engine)
        with opened as transaction:
            bound = store.using(transaction)
            yield Bound(bound, FlowManager(bound), transaction.commit, transaction.rollback, lambda: bound.run(wipe))

    try:
        yield Shell(store, FlowManager(store), within)
    finally:
        store.close()


@contextmanager
def awaited(url: str) -> Iterator[Shell]:
    """The asynchronous store, each call run to its end."""
    with asyncio.Runner() as runner:
        store = AsyncFlowStore(make_async_engine(url))
        runner.run(store.check())

        def face(of: AsyncFlowStore) -> tuple[SqlFlowStore, FlowManager]:
            return cast(SqlFlowStore, Awaited(of, runner)), cast(FlowManager, Awaited(AsyncFlowManager(of), runner))

        @contextmanager
        def within(kind: str) -> Iterator[Bound]:
            transaction = store.engine.connect() if kind == "connection" else AsyncSession(store.engine)
            runner.run(transaction.__aenter__())
            try:
                bound = face(runner.run(store.using(transaction)))
                yield Bound(
                    *bound,
                    lambda: runner.run(transaction.commit()),
                    lambda: runner.run(transaction.rollback()),
                    lambda: bound[0].run(wipe),
                )
            finally:
                runner.run(transaction.close())

        try:
            yield Shell(*face(store), within)
        finally:
            runner.run(store.close())


SHELLS = {"sync": synchronous, "async": awaited}
