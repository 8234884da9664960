"""Starting: in one transaction, told to the broker after it, once for each key, and never held up by a broker."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from celery_flows import (
    FlowCancelled,
    FlowFailed,
    FlowNotFound,
    FlowStatus,
    InvalidData,
    KeyConflict,
    ResultTimedOut,
    Run,
)
from celery_flows.store import StartPending
from celery_flows.store.tables import flow_dispatch, flows
from tests.integration.conftest import MakeBench
from tests.support.bench import Bench
from tests.support.faults import black_hole, closed_port
from tests.support.waiting import until

Transaction = sa.Connection | Session


def doubling(bench: Bench) -> Any:
    @bench.flows.flow("doubles")
    def doubles(run: Run, n: int) -> int:
        return 2 * run.step(int, n)

    return doubles


@contextmanager
def transaction(bench: Bench, kind: str) -> Iterator[Transaction]:
    opened: Transaction = bench.store.engine.connect() if kind == "connection" else Session(bench.store.engine)
    with opened as entered:
        yield entered


def flow_count(bench: Bench) -> int:
    return len(bench.query(sa.select(flows.c.id)))


def test_flow_event_and_drive_row_are_one_and_the_message_follows(bench: Bench) -> None:
    handle = doubling(bench).start(4, owner="tenant:acme", goal="to double")
    [row] = bench.rows(handle.id)
    assert (row.kind, row.task, row.publish_count, row.worker) == ("drive", "doubles", 1, None)
    assert bench.kinds(handle.id) == ["created"]
    assert [message.id for message in bench.messages()] == [str(handle.id)]
    assert bench.finish(handle) == 8


def test_a_lost_message_is_sent_again_after_a_growing_pause(bench: Bench) -> None:
    handle = doubling(bench).start(4)
    bench.messages()  # lost
    assert bench.sweep().published == 0  # not yet
    for _ in range(3):
        bench.pass_time()
        assert bench.sweep().published == 1
        assert [message.id for message in bench.messages()] == [str(handle.id)]
    [row] = bench.rows(handle.id)
    assert row.publish_count == 4
    assert bench.finish(handle) == 8


def test_the_queue_of_a_flow_is_the_definitions(bench: Bench) -> None:
    @bench.flows.flow("queued", queue="slow lane")
    def queued(run: Run) -> int:
        return 1

    handle = queued.start()
    assert bench.messages() == []
    assert [message.id for message in bench.messages("slow lane")] == [str(handle.id)]
    bench.work()


# ---- in a caller's transaction --------------------------------------------------------------------------------------

kinds = pytest.mark.parametrize("kind", ["connection", "session"])


@kinds
def test_a_start_is_published_only_after_the_callers_commit(bench: Bench, kind: str) -> None:
    flow = doubling(bench)
    with transaction(bench, kind) as caller:
        handle = flow.start(4, session=caller)
        assert flow_count(bench) == 0
        assert bench.messages() == []
        caller.commit()
    assert [message.id for message in bench.messages()] == [str(handle.id)]
    assert bench.finish(handle) == 8


@kinds
def test_a_start_that_is_rolled_back_leaves_nothing(bench: Bench, kind: str) -> None:
    flow = doubling(bench)
    with transaction(bench, kind) as caller:
        handle = flow.start(4, session=caller)
        caller.rollback()
        caller.execute(sa.select(1))  # the connection begins anew
        caller.commit()
    assert flow_count(bench) == 0
    assert bench.query(sa.select(flow_dispatch)) == []
    assert bench.messages() == []
    with pytest.raises(FlowNotFound):
        handle.get()


@kinds
def test_a_transaction_that_is_left_without_commit_starts_nothing(bench: Bench, kind: str) -> None:
    flow = doubling(bench)
    with transaction(bench, kind) as caller:
        flow.start(4, session=caller)
    with transaction(bench, kind) as caller:  # the same pooled connection
        caller.execute(sa.select(1))
        caller.commit()
    assert (flow_count(bench), bench.messages()) == (0, [])


@kinds
def test_several_transactions_of_one_session_publish_their_own_starts(bench: Bench, kind: str) -> None:
    flow = doubling(bench)
    with transaction(bench, kind) as caller:
        kept = [flow.start(n, session=caller) for n in (1, 2)]
        caller.commit()
        flow.start(3, session=caller)
        caller.rollback()
        kept.append(flow.start(4, session=caller))
        caller.commit()
    assert [message.id for message in bench.messages()] == [str(handle.id) for handle in kept]
    assert [bench.finish(handle) for handle in kept] == [2, 4, 8]


@kinds
def test_a_released_savepoint_is_no_commit(bench: Bench, kind: str) -> None:
    flow = doubling(bench)
    with transaction(bench, kind) as caller:
        with caller.begin_nested():
            handle = flow.start(4, session=caller)
        assert bench.messages() == []
        caller.commit()
    assert [message.id for message in bench.messages()] == [str(handle.id)]
    assert bench.finish(handle) == 8


@kinds
def test_a_savepoint_rolled_back_within_a_commit_starts_nothing(bench: Bench, kind: str) -> None:
    flow = doubling(bench)
    with transaction(bench, kind) as caller:
        kept = flow.start(1, session=caller)
        savepoint = caller.begin_nested()
        lost = flow.start(2, session=caller)
        savepoint.rollback()
        caller.commit()
    assert flow_count(bench) == 1
    for message in bench.messages():  # a hint too many does no harm
        bench.drive(bench.flows.handle(message.id).id)
    assert kept.result(0) == 2
    with pytest.raises(FlowNotFound):
        lost.get()


# ---- keys -----------------------------------------------------------------------------------------------------------


def test_a_key_starts_one_flow(bench: Bench) -> None:
    flow = doubling(bench)
    first, again = flow.start(4, key="order-1"), flow.start(4, key="order-1")
    assert first.id == again.id
    assert bench.finish(first) == 8
    assert flow.start(4, key="order-1").result(0) == 8  # ended flows keep their key
    assert flow_count(bench) == 1


def test_a_key_that_comes_back_with_other_input_is_refused(bench: Bench) -> None:
    flow = doubling(bench)
    handle = flow.start(4, key="order-1")
    with pytest.raises(KeyConflict) as conflict:
        flow.start(5, key="order-1")
    assert (conflict.value.key, conflict.value.flow_id) == ("order-1", handle.id)
    assert flow_count(bench) == 1


def test_keys_of_other_definitions_are_other_keys(bench: Bench) -> None:
    flow = doubling(bench)

    @bench.flows.flow("other")
    def other(run: Run, n: int) -> int:
        return n

    assert flow.start(4, key="order-1").id != other.start(4, key="order-1").id


def test_concurrent_starts_with_one_key_start_one_flow(bench: Bench) -> None:
    flow = doubling(bench)
    barrier = threading.Barrier(4)
    ids: list[Any] = []

    def start() -> None:
        barrier.wait(10)
        ids.append(flow.start(4, key="order-1").id)

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(ids) == 4
    assert len(set(ids)) == flow_count(bench) == 1


def test_a_key_held_by_an_open_transaction_is_said_to_be_pending(postgresql_url: str) -> None:
    """It can be neither taken nor refused until that transaction has ended. (In SQLite whoever writes second waits.)"""
    with closing(Bench(postgresql_url)) as bench:
        flow = doubling(bench)
        with bench.store.engine.connect() as caller:
            flow.start(4, key="order-1", session=caller)
            with pytest.raises(StartPending, match="order-1"):
                flow.start(4, key="order-1")
            caller.rollback()
        assert bench.finish(flow.start(4, key="order-1")) == 8
        bench.audit()


def test_a_key_that_is_pending_leaves_the_callers_transaction_usable(postgresql_url: str) -> None:
    """Whoever is told to try again later has to be able to commit what else there is."""
    with closing(Bench(postgresql_url)) as bench:
        flow = doubling(bench)
        with Session(bench.store.engine) as first, Session(bench.store.engine) as second:
            held = flow.start(4, key="order-1", session=first)
            other = flow.start(5, key="order-2", session=second)
            for start in (partial(flow.start, 4, key="order-1"), partial(flow.start_many, [4], keys=["order-1"])):
                with pytest.raises(StartPending):
                    start(session=second)
            second.commit()
            first.commit()
        assert [bench.finish(handle) for handle in (held, other)] == [8, 10]
        bench.audit()


@pytest.mark.parametrize("bad", ["", " ", "x" * 1000, "a\0b", 7])
def test_bad_keys_and_owners_are_refused(bench: Bench, bad: Any) -> None:
    flow = doubling(bench)
    for name in ("key", "owner"):
        with pytest.raises(InvalidData, match=f"^{name}: "):
            flow.start(4, **{name: bad})
    assert flow_count(bench) == 0


# ---- the broker -----------------------------------------------------------------------------------------------------


@contextmanager
def refusing() -> Iterator[int]:
    yield closed_port()


@pytest.mark.parametrize("silent", [refusing, black_hole], ids=["closed port", "black hole"])
@pytest.mark.parametrize(
    "broker", ["redis://127.0.0.1:{}/0", "amqp://guest:guest@127.0.0.1:{}//"], ids=["redis", "amqp"]
)
def test_a_broker_that_is_not_there_neither_fails_a_start_nor_holds_it_up(
    make_bench: MakeBench, broker: str, silent: Callable[[], Any]
) -> None:
    with silent() as port:
        bench = make_bench(broker=broker.format(port))
        flow = doubling(bench)
        began = time.monotonic()
        handle = flow.start(4)
        assert time.monotonic() - began < 5
        assert handle.status() is FlowStatus.CREATED
        bench.pass_time()
        began = time.monotonic()
        report = bench.sweep()
        assert time.monotonic() - began < 5
        assert (report.due, report.published) == (1, 0)
    working = make_bench()  # the broker is there again: the flow is found due, and runs
    doubling(working)
    working.pass_time()
    assert working.sweep().published == 1
    assert [message.id for message in working.messages()] == [str(handle.id)]
    assert working.finish(working.flows.handle(handle.id)) == 8


# ---- handles --------------------------------------------------------------------------------------------------------


def test_patience_that_ends_leaves_the_flow_going(bench: Bench) -> None:
    handle = doubling(bench).start(4)
    with pytest.raises(ResultTimedOut, match=str(handle.id)):
        handle.result(timeout=0.05)
    assert bench.finish(handle) == 8


def test_a_handle_by_id_gives_the_same_result(bench: Bench) -> None:
    handle = doubling(bench).start(4)
    bench.finish(handle)
    assert bench.flows.handle(str(handle.id)).result(0) == 8
    with pytest.raises(InvalidData, match="flow_id"):
        bench.flows.handle("not an id")


def test_a_result_is_waited_for_by_looking_into_the_store(bench: Bench) -> None:
    handle = doubling(bench).start(4)
    worker = threading.Thread(target=bench.work)
    worker.start()
    assert handle.result(timeout=10) == 8
    worker.join(10)


def test_a_flow_that_was_cancelled_has_no_result(bench: Bench) -> None:
    handle = doubling(bench).start(4)
    bench.flows.manager.cancel(handle.id)
    with pytest.raises(FlowCancelled):
        handle.result(0)


def test_unknown_definitions_are_left_alone_and_said(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    handle = doubling(bench).start(4)
    [known] = bench.runtime.registry._definitions.pop("doubles").values()
    bench.drive(handle.id)
    assert "no flow definition 'doubles', version 1, here" in caplog.text
    [row] = bench.rows(handle.id)
    assert (row.worker, row.crash_count, row.publish_count) == (None, 0, 0)
    assert bench.claimable() == []  # offered again after a while, not at once
    bench.runtime.registry.add(known)
    bench.pass_time()
    assert bench.finish(handle) == 8


def test_a_failed_flow_says_type_and_message(bench: Bench) -> None:
    @bench.flows.flow("fails")
    def fails(run: Run) -> None:
        raise LookupError("nothing there")

    handle = fails.start()
    with pytest.raises(FlowFailed) as failed:
        bench.finish(handle)
    assert (failed.value.reason, failed.value.type, failed.value.message) == (
        "LookupError",
        "LookupError",
        "nothing there",
    )
    assert until(lambda: handle.get().error_json, "the error is kept") == {
        "type": "LookupError",
        "message": "nothing there",
    }
