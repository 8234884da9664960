"""A connection or a process that dies in the middle of a transition leaves row and event both, or neither."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import sqlalchemy as sa
from sqlalchemy.pool import NullPool

from celery_flows.store import Flow, FlowManager, SqlFlowStore, StoreError
from celery_flows.store.engines import make_engine
from celery_flows.store.tables import flows
from tests.support.fold import assert_whole
from tests.support.samples import NAMES
from tests.support.waiting import other_sessions, until, waits_for_lock

TERMINATE = sa.text("SELECT pg_terminate_backend(:pid)")


@pytest.fixture
def store(postgresql_url: str) -> Iterator[SqlFlowStore]:
    opened = SqlFlowStore(make_engine(postgresql_url))
    yield opened
    opened.close()


@pytest.fixture
def admin(postgresql_url: str) -> Iterator[sa.Engine]:
    """Another way into the same database."""
    engine = sa.create_engine(postgresql_url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    yield engine
    engine.dispose()


@pytest.mark.parametrize("tries", [8, 1], ids=["one statement", "row locked"])
def test_a_killed_transition_is_done_once_by_its_retry(store: SqlFlowStore, admin: sa.Engine, tries: int) -> None:
    flow = FlowManager(store).create_managed(**NAMES)
    hold = sa.select(flows.c.id).where(flows.c.id == flow.id).with_for_update()
    with ThreadPoolExecutor(1) as thread, store.engine.connect() as blocker:
        blocker.execute(hold)
        moving = thread.submit(FlowManager(store, tries=tries).update_state, flow.id, {"n": 1})
        pid = until(lambda: waits_for_lock(admin), "the transition waits for the row")
        with admin.connect() as connection:
            assert connection.scalar(TERMINATE, {"pid": pid}), "the fault did not strike"
        assert store.get(flow.id) == flow
        assert len(store.list_events(flow.id)) == 1
        blocker.rollback()
        assert moving.result(10).revision == 2
    assert [event.kind for event in assert_whole(store, flow.id)] == ["created", "state_updated"]


def test_a_connection_killed_before_its_commit_leaves_neither_and_the_retry_succeeds(
    store: SqlFlowStore, admin: sa.Engine
) -> None:
    flow = FlowManager(store).create_managed(**NAMES)
    killed: list[int] = []

    @sa.event.listens_for(store.engine, "commit")
    def kill(connection: sa.Connection) -> None:
        if not killed:
            pid = connection.connection.dbapi_connection.info.backend_pid  # type: ignore[union-attr]
            with admin.connect() as other:
                assert other.scalar(TERMINATE, {"pid": pid})
                row = other.execute(sa.select(flows.c.revision)).scalar_one()
                events = other.scalar(sa.text("SELECT count(*) FROM flow_events"))
            killed.append(pid)
            assert (row, events) == (1, 1)

    moved = FlowManager(store, tries=1).update_state(flow.id, {"n": 1})
    assert killed
    assert moved.revision == 2
    assert [event.kind for event in assert_whole(store, flow.id)] == ["created", "state_updated"]


def test_a_killed_transaction_of_the_callers_is_raised_not_repeated(store: SqlFlowStore, admin: sa.Engine) -> None:
    flow = FlowManager(store).create_managed(**NAMES)
    with store.engine.connect() as connection:
        manager = FlowManager(store.using(connection))
        manager.start_running(flow.id)
        pid = connection.scalar(sa.text("SELECT pg_backend_pid()"))
        with admin.connect() as other:
            assert other.scalar(TERMINATE, {"pid": pid})
        with pytest.raises(StoreError) as caught:
            manager.update_state(flow.id, {"n": 1})
        assert isinstance(caught.value.__cause__, sa.exc.DBAPIError)
    assert [event.kind for event in assert_whole(store, flow.id)] == ["created"]
    assert FlowManager(store).start_running(flow.id).revision == 2


WRITER = """
import sys
from uuid import UUID
from celery_flows.store import FlowManager, FlowStepStatus, SqlFlowStore
from celery_flows.store.engines import make_engine
store, flow_id = SqlFlowStore(make_engine(sys.argv[1])), UUID(sys.argv[2])
optimistic, locking = FlowManager(store), FlowManager(store, tries=1)
print("writing", flush=True)
n = 0
while True:
    n += 1
    optimistic.update_state(flow_id, {"n": n})
    locking.set_waiting(flow_id, {"kind": "manual"})
    optimistic.record_step_observation(flow_id=flow_id, run_id=f"{sys.argv[3]}-{n % 50}", task="t",
        status=FlowStepStatus.RUNNING, child_session_key=str(n))
    locking.resume(flow_id, {"resumed": n})
"""


def test_a_killed_writer_never_tears_the_history(database_url: str) -> None:
    store = SqlFlowStore(make_engine(database_url))
    manager = FlowManager(store)
    flow = manager.create_mirrored(**NAMES)
    for life in range(4):
        before = manager.get(flow.id)
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, database_url, str(flow.id), str(life)], stdout=subprocess.PIPE, text=True
        )
        with writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "writing\n"
            until(partial(has_moved, manager, before, 10 + life), "the writer writes")
            writer.send_signal(signal.SIGKILL)
            assert writer.wait(10) == -signal.SIGKILL, "the fault did not strike"
        gone(database_url, store)
        assert_whole(store, flow.id)
        if manager.get(flow.id).wait_json is not None:  # it was killed while the flow waited
            manager.resume(flow.id)
    assert manager.get(flow.id).revision > 40
    store.close()


def has_moved(manager: FlowManager, before: Flow, by: int) -> bool:
    """Whether the flow is more than so many revisions further."""
    return manager.get(before.id).revision > before.revision + by


def gone(url: str, store: SqlFlowStore) -> None:
    """Returns when the killed process has no session left that might still write."""
    if url.startswith("postgresql"):
        store.close()
        engine = sa.create_engine(url, poolclass=NullPool)
        until(lambda: other_sessions(engine) == 0, "the killed writer's session ends")


def die(_: sa.Connection) -> None:
    raise KeyboardInterrupt


def test_an_interrupt_between_two_statements_leaves_neither(database_url: str) -> None:
    store = SqlFlowStore(make_engine(database_url))
    manager = FlowManager(store, tries=1)
    flow = manager.create_managed(**NAMES)
    sa.event.listen(store.engine, "commit", die)
    with pytest.raises(KeyboardInterrupt):
        manager.start_running(flow.id)
    sa.event.remove(store.engine, "commit", die)
    assert manager.get(flow.id) == flow
    assert [event.kind for event in assert_whole(store, flow.id)] == ["created"]
    assert manager.start_running(flow.id).revision == 2
    store.close()
