"""From asyncio: in the caller's async transaction or without one, and never at the cost of the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_scoped_session, async_sessionmaker

from celery_flows import FlowCancelled, InvalidData, KeyConflict, ResultTimedOut, Run
from celery_flows.store.engines import make_async_engine
from celery_flows.store.tables import flow_inbox, flows
from tests.support.bench import Bench

KINDS = pytest.mark.parametrize("kind", ["connection", "session", "scoped session"])


def doubling(bench: Bench) -> Any:
    @bench.flows.flow("doubles")
    def doubles(run: Run, n: int) -> int:
        return 2 * run.step(int, n)

    return doubles


@asynccontextmanager
async def an_engine(bench: Bench) -> AsyncIterator[AsyncEngine]:
    """The application's own, as it would make it: to another pool than ours."""
    engine = make_async_engine(bench.url)
    try:
        yield engine
    finally:
        await engine.dispose()


@asynccontextmanager
async def transaction(bench: Bench, kind: str) -> AsyncIterator[Any]:
    async with an_engine(bench) as engine:
        if kind == "connection":
            async with engine.connect() as connection:
                yield connection
        elif kind == "session":
            async with AsyncSession(engine) as session:
                yield session
        else:
            scoped = async_scoped_session(async_sessionmaker(engine), scopefunc=asyncio.current_task)
            yield scoped
            await scoped.remove()


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Runs it in a loop of its own; what it left to threads is done when this returns."""
    return asyncio.run(coroutine)


def count(bench: Bench, table: sa.Table = flows) -> int:
    [row] = bench.query(sa.select(sa.func.count()).select_from(table))
    return int(row[0])


# ---- without a transaction ------------------------------------------------------------------------------------------


def test_flows_are_started_told_and_asked_without_a_session(bench: Bench) -> None:
    flow = doubling(bench)

    @bench.flows.flow("waits")
    def waits(run: Run) -> Any:
        return run.wait_for("approval", "order-1")

    async def story() -> list[Any]:
        one = await flow.astart(4, key="a", owner="tenant:acme", priority=3)
        many = await flow.astart_many([5, 6], keys=["b", "a2"])
        waiting = await waits.astart()
        await bench.flows.aemit("approval", "order-1", {"by": "Ada"})
        await asyncio.to_thread(bench.work)
        assert (await one.aget()).owner_session_key == "tenant:acme"
        assert (await one.astatus()).is_terminal
        return [await handle.aresult(0) for handle in (one, *many, waiting)]

    assert run(story()) == [8, 10, 12, {"by": "Ada"}]
    assert len(bench.messages()) >= 4


def test_a_result_is_waited_for_while_the_loop_goes_on(bench: Bench) -> None:
    flow = doubling(bench)

    async def story() -> Any:
        handle = await flow.astart(4)
        with pytest.raises(ResultTimedOut):
            await handle.aresult(timeout=0.05)
        waiting = asyncio.create_task(handle.aresult(timeout=10))
        await asyncio.to_thread(bench.work)
        return await waiting

    assert run(story()) == 8


def test_a_flow_is_cancelled_and_resumed_from_a_loop(bench: Bench) -> None:
    flow = doubling(bench)

    @bench.flows.flow("waits")
    def waits(run: Run) -> Any:
        return run.wait_for("approval", "order-1")

    async def story() -> Any:
        cancelled, waiting = await flow.astart(4), await waits.astart()
        await cancelled.acancel()
        await asyncio.to_thread(bench.work)
        await waiting.aresume({"by": "hand"})
        await asyncio.to_thread(bench.work)
        with pytest.raises(FlowCancelled):
            await cancelled.aresult(0)
        return await waiting.aresult(0)

    assert run(story()) == {"by": "hand"}


def test_refusals_are_those_of_the_synchronous_methods(bench: Bench) -> None:
    flow = doubling(bench)

    async def story() -> None:
        with pytest.raises(InvalidData, match="priority"):
            await flow.astart(4, priority=300)
        with pytest.raises(InvalidData, match=r"inputs\[1\]"):
            await flow.astart_many([1, "two"])
        await flow.astart(4, key="a")
        with pytest.raises(KeyConflict):
            await flow.astart(5, key="a")
        said = "session: must be an AsyncSession or AsyncConnection, not Connection"
        with bench.store.engine.connect() as synchronous, pytest.raises(InvalidData, match=said):
            await flow.astart(4, session=synchronous)

    run(story())
    assert count(bench) == 1
    bench.work()


# ---- in the caller's transaction ------------------------------------------------------------------------------------


@KINDS
def test_the_callers_commit_decides_and_the_messages_follow_it(bench: Bench, kind: str) -> None:
    flow = doubling(bench)

    async def story() -> list[Any]:
        async with transaction(bench, kind) as caller:
            await flow.astart(1, session=caller)
            await caller.rollback()
            one = await flow.astart(2, key="a", session=caller)
            many = await flow.astart_many([3, 4], session=caller)
            assert (count(bench), bench.messages()) == (0, [])
            await caller.commit()
        return [one, *many]

    handles = run(story())
    assert {message.id for message in bench.messages()} == {str(handle.id) for handle in handles}
    bench.work()
    assert [handle.result(0) for handle in handles] == [4, 6, 8]
    assert count(bench) == 3


@KINDS
def test_what_is_rolled_back_leaves_nothing(bench: Bench, kind: str) -> None:
    flow = doubling(bench)
    kept = flow.start(9)
    bench.messages()

    async def story() -> None:
        async with transaction(bench, kind) as caller:
            await flow.astart(1, session=caller)
            await flow.astart_many([2], keys=["a"], session=caller)
            await bench.flows.aemit("approval", "order-1", session=caller)
            await kept.acancel(session=caller)
            await caller.rollback()

    run(story())
    assert (count(bench), count(bench, flow_inbox), bench.messages()) == (1, 0, [])
    assert not kept.get().cancel_requested
    bench.work()


@KINDS
def test_events_and_cancels_are_part_of_the_transaction(bench: Bench, kind: str) -> None:
    @bench.flows.flow("waits")
    def waits(run: Run, order: str) -> Any:
        return run.wait_for("approval", order)

    told, cancelled = waits.start("order-1"), waits.start("order-2")
    bench.work()

    async def story() -> None:
        async with transaction(bench, kind) as caller:
            await bench.flows.aemit("approval", "order-1", {"by": "Ada"}, session=caller)
            await cancelled.acancel(session=caller)
            assert not cancelled.get().cancel_requested
            await caller.commit()

    run(story())
    bench.sweep()  # after a bare connection's commit nothing can be done with the database: the sweep looks
    bench.work()
    assert told.result(0) == {"by": "Ada"}
    with pytest.raises(FlowCancelled):
        cancelled.result(0)


def test_several_tasks_each_with_its_session_start_their_own(bench: Bench) -> None:
    flow = doubling(bench)
    sqlite = bench.store.engine.dialect.name == "sqlite"  # one writer: there they take turns

    async def story() -> list[Any]:
        turn = asyncio.Semaphore(1 if sqlite else 8)
        async with an_engine(bench) as engine:

            async def request(n: int) -> Any:
                async with turn, AsyncSession(engine) as session, session.begin():
                    return await flow.astart(n, session=session)

            return await asyncio.gather(*(request(n) for n in range(20)))

    handles = run(story())
    assert len(bench.messages()) == 20
    bench.work()
    assert [handle.result(0) for handle in handles] == [2 * n for n in range(20)]


# ---- the event loop -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [None, "connection", "session"])
def test_the_loop_goes_on_while_a_broker_does_not(
    bench: Bench, kind: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow = doubling(bench)
    stuck, let_go = threading.Event(), threading.Event()
    went_on = []

    def publish(*_: Any, **__: Any) -> int:
        stuck.set()
        went_on.append(let_go.wait(10))
        return 0

    monkeypatch.setattr(bench.runtime.publisher, "publish", publish)

    async def watch() -> None:
        while not stuck.is_set():
            await asyncio.sleep(0.005)
        let_go.set()

    async def story() -> None:
        watching = asyncio.create_task(watch())
        if kind is None:
            await flow.astart(4)
        else:
            async with transaction(bench, kind) as caller:
                await flow.astart(4, session=caller)
                await caller.commit()
        await watching

    run(story())
    assert went_on == [True], "the loop stood still"
    monkeypatch.undo()
    bench.work()
    assert count(bench) == 1
