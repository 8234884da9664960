"""The edges of the engine: callers' transactions, crash counts, steps that exit, stores opened late."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from celery_flows import FlowStatus, InvalidData, Run, SqlFlowStore, StepLost
from celery_flows.store import FlowManager, StoreError, dispatch
from celery_flows.store import operations as op
from celery_flows.store.dispatch import Hint
from celery_flows.store.engines import make_engine
from celery_flows.store.tables import flow_dispatch
from celery_flows.tasks.transaction import after_commit, transaction_of
from celery_flows.tasks.waits import WaitEngine
from tests.integration.conftest import MakeBench
from tests.support.bench import Bench
from tests.support.brokers import rabbitmq_broker
from tests.support.crowd import at_once
from tests.support.samples import a_flow

# ---- callers' transactions ------------------------------------------------------------------------------------------


def test_a_scoped_session_is_the_session_of_this_thread(bench: Bench) -> None:
    @bench.flows.flow("plain")
    def plain(run: Run) -> int:
        return run.step(int, 3)

    scoped = scoped_session(sessionmaker(bench.store.engine))
    assert transaction_of(scoped) is scoped()
    lost, kept = plain.start(session=scoped), None  # type: ignore[arg-type]
    scoped.rollback()
    kept = plain.start(session=scoped)  # type: ignore[arg-type]
    scoped.commit()
    scoped.remove()
    assert bench.store.get(lost.id) is None
    assert [message.id for message in bench.messages()] == [str(kept.id)]
    assert bench.finish(kept) == 3


@pytest.mark.parametrize("given", [AsyncSession(), object.__new__(AsyncConnection)], ids=["session", "connection"])
def test_an_async_session_is_refused_with_what_to_do(given: Any) -> None:
    with pytest.raises(InvalidData, match=r"session: is an async one; await the method"):
        transaction_of(given)


@pytest.mark.parametrize("given", [None, "sqlite://", 7])
def test_what_is_no_transaction_is_refused_by_its_type(given: Any) -> None:
    with pytest.raises(InvalidData, match=f"not {type(given).__name__}"):
        transaction_of(given)


@pytest.mark.parametrize("kind", ["connection", "session"])
def test_an_action_that_fails_after_a_commit_leaves_it_standing(
    bench: Bench, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    done: list[str] = []

    def fails() -> None:
        done.append("failed")
        raise ValueError("hunter2")

    flow = a_flow()
    opened = bench.store.engine.connect() if kind == "connection" else Session(bench.store.engine)
    with opened as transaction:
        bench.store.using(transaction).run(op.create_flow, flow, {})
        after_commit(transaction, fails)
        after_commit(transaction, lambda: done.append("after it"))
        transaction.commit()
    assert done == ["failed", "after it"]
    assert bench.store.get(flow.id) is not None
    assert "left to the sweep (ValueError)" in caplog.text
    assert "hunter2" not in caplog.text


# ---- messages -------------------------------------------------------------------------------------------------------


@pytest.fixture
def rabbit(sqlite_url: str) -> Iterator[Bench]:
    from kombu import pools

    with rabbitmq_broker() as broker, closing(Bench(sqlite_url, broker=broker.url)) as bench:
        try:
            yield bench
        finally:
            pools.reset()


def test_a_message_that_cannot_be_encoded_does_not_stop_the_others(
    rabbit: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    hints = [
        Hint(f"run-{number}", uuid4(), "step", "charge", None, priority)
        for number, priority in enumerate([5, 300, None])
    ]
    assert rabbit.runtime.publisher.publish(*hints) == 2
    assert [message.id for message in rabbit.messages()] == ["run-0", "run-2"]
    assert "the message for step run-1 cannot be sent" in caplog.text
    assert rabbit.runtime.publisher.publish(hints[0]) == 1, "the connection is as good as before"


# ---- crash counts ---------------------------------------------------------------------------------------------------


def test_a_timer_that_fires_on_a_row_with_many_crashes_is_no_crash(bench: Bench) -> None:
    @bench.flows.flow("sleeps")
    def sleeps(run: Run) -> str:
        run.sleep(timedelta(days=1))
        return "rested"

    handle = sleeps.start()
    bench.work()
    mine = sa.update(flow_dispatch).where(flow_dispatch.c.run_id == str(handle.id))
    limit = bench.flows.settings.max_crashes
    with bench.store.engine.begin() as connection:
        connection.execute(mine.values(crash_count=limit))
    bench.pass_time()
    report = bench.sweep()
    assert (report.lost, report.published) == (0, 1)
    assert not handle.status().is_terminal


@pytest.mark.parametrize("kind", ["drive", "step"])
def test_what_a_dead_sweep_freed_the_next_one_gives_up(bench: Bench, kind: str) -> None:
    """It died between freeing the row, whose last crash that was, and giving it up."""

    @bench.task("member")
    def member() -> int:
        return 1

    @bench.flows.flow("member")
    def flow(run: Run) -> str:
        try:
            run.step(member)
        except StepLost:
            return "caught"
        return "survived"

    handle = flow.start()
    row = handle.id if kind == "drive" else None
    if kind == "step":
        bench.drive(handle.id)
        row = bench.store.list_steps(handle.id)[0].run_id  # type: ignore[assignment]
        assert bench.store.run(dispatch.claim_step, str(row), bench.token(), 30.0) is not None
    else:
        assert bench.store.run(dispatch.claim_drive, handle.id, bench.token(), 30.0) is not None
    limit = bench.flows.settings.max_crashes
    with bench.store.engine.begin() as connection:
        mine = sa.update(flow_dispatch).where(flow_dispatch.c.run_id == str(row))
        connection.execute(mine.values(crash_count=limit - 1))
    bench.end_leases()
    [swept] = bench.store.run(dispatch.sweep_due, 10, 10.0, 300.0)
    assert (swept.was_held, swept.crash_count) == (True, limit)
    bench.pass_time()
    assert bench.sweep().lost == 1
    if kind == "drive":
        assert handle.status() is FlowStatus.FAILED
    else:
        assert bench.finish(handle) == "caught"


def test_a_celery_step_that_exits_each_time_is_given_up(make_bench: MakeBench) -> None:
    bench = make_bench(max_crashes=3)

    @bench.task("exits")
    def exits() -> None:
        bench.effects.append("ran")
        sys.exit(3)

    @bench.flows.flow("exits")
    def flow(run: Run) -> str:
        try:
            run.step(exits)
        except StepLost:
            return "caught"
        return "survived"

    handle = flow.start()
    bench.drive(handle.id)
    [step] = bench.store.list_steps(handle.id)
    for crash in range(3):
        with pytest.raises(SystemExit):
            bench.run_step(step.run_id)
        assert bench.sweep().lost == (crash == 2)
    assert bench.finish(handle) == "caught"
    assert bench.effects == ["ran"] * 3


# ---- flows that are stored as waiting -------------------------------------------------------------------------------


@pytest.mark.parametrize("wait", [
    {"kind": "timer", "at": "2020-01-01T00:00:00+00:00"},
    {"kind": "external_event", "topic": "t", "correlation_id": "c", "timeout_at": "2020-01-01T00:00:00+00:00"},
], ids=["timer", "timeout"])  # fmt: skip
def test_a_flow_that_is_inserted_as_waiting_is_settled(bench: Bench, wait: dict[str, Any]) -> None:
    flow = a_flow(status=FlowStatus.WAITING, wait_json=wait)
    bench.store.insert(flow)
    report = WaitEngine(bench.store).tick()
    assert (report.scanned, report.resumed, report.errors) == (1, 1, 0)
    assert FlowManager(bench.store).get(flow.id).status is FlowStatus.RUNNING
    assert WaitEngine(bench.store).tick().scanned == 0
    with bench.store.engine.begin() as connection:  # stored without a history, which the bench would miss
        connection.execute(sa.text("DELETE FROM flows"))


def test_a_tick_before_its_time_leaves_it_waiting(bench: Bench) -> None:
    manager = bench.flows.manager
    flow = manager.start_running(manager.create_managed(controller_id="c", owner_session_key="o").id)
    at = datetime(2999, 1, 1, tzinfo=UTC)
    manager.set_waiting(flow.id, {"kind": "timer", "at": at})
    assert WaitEngine(bench.store).tick(at - timedelta(seconds=1)).scanned == 0
    assert WaitEngine(bench.store).tick(at).resumed == 1


# ---- the store ------------------------------------------------------------------------------------------------------


def test_a_store_that_many_threads_open_at_once_is_one(engine_database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOW_STORE_URL", engine_database)
    with closing(Bench(engine_database)) as bench:
        runtime = type(bench.runtime)(bench.app)
        opened = at_once([lambda: runtime.store] * 8)
        assert {id(store) for store in opened} == {id(runtime.store)}
        runtime.store.close()


def test_a_pool_that_is_empty_for_too_long_is_said_as_a_store_error(engine_database: str) -> None:
    url = make_engine(engine_database).url
    engine = sa.create_engine(url, poolclass=sa.QueuePool, pool_size=1, max_overflow=0, pool_timeout=0.05)
    with closing(SqlFlowStore(engine)) as store, engine.connect():
        with pytest.raises(StoreError, match="the database cannot be used") as caught:
            store.get(uuid4())
        assert isinstance(caught.value.__cause__, sa.exc.TimeoutError)
