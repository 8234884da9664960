"""What holds a write up must not lose it, nor write it twice: long locks, statements that still run, forks."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import OperationalError

from celery_flows.store import FlowManager, RevisionMismatch, SqlFlowStore
from celery_flows.store import operations as op
from celery_flows.store.changes import Change
from celery_flows.store.engines import make_engine
from celery_flows.store.script import Call, Pause
from tests.support.fold import assert_whole
from tests.support.waiting import until, waits_for_lock

NAMES = {"controller_id": "held up", "owner_session_key": "me"}


class CutOff(SqlFlowStore):
    """A store whose connection breaks at its first write, while the server still runs the statement."""

    cut = True

    def _perform(self, step: Call | Pause) -> Any:
        if isinstance(step, Call) and step.operation is op.change_flow and self.cut:
            self.cut = False
            raise OperationalError("UPDATE", {}, ConnectionError("cut off"), connection_invalidated=True)
        return super()._perform(step)


def test_a_lock_that_is_held_longer_than_its_timeout_is_waited_for(postgresql_url: str) -> None:
    store = SqlFlowStore(make_engine(postgresql_url))
    flow = _created(store)
    holder = make_engine(postgresql_url)
    with holder.connect() as connection:
        connection.execute(sa.text("SELECT 1 FROM flows WHERE id = :id FOR UPDATE"), {"id": flow.id})
        change = Change(flow.id, flow.revision, "state_updated", {"state_json": {"n": 1}})
        writer = threading.Thread(target=store.change, args=(change,))
        writer.start()
        begun = until(lambda: _waiting_since(holder), "the writer waits")
        # lock_timeout ends that try after two seconds: another statement is seen to wait then.
        until(lambda: (_waiting_since(holder) or begun) > begun, "the writer waits again")
        connection.rollback()
    writer.join(20)

    stored = store.get(flow.id)
    assert stored is not None
    assert stored.state_json == {"n": 1}
    assert_whole(store, flow.id)
    store.close()
    holder.dispose()


def _waiting_since(engine: sa.Engine) -> Any:
    """When the statement began that waits for a lock in this database now; None: there is none."""
    waiting = sa.text(
        "SELECT query_start FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    )
    with engine.connect() as connection:
        return connection.scalar(waiting)


def test_a_statement_that_still_runs_when_its_client_is_cut_off_is_recognised_and_not_written_twice(
    postgresql_url: str,
) -> None:
    store = CutOff(make_engine(postgresql_url))
    flow = _created(store)
    change = Change(flow.id, flow.revision, "state_updated", {"state_json": {"n": 1}})
    other = make_engine(postgresql_url)
    answers: list[Any] = []
    with other.connect() as running:
        op.change_flow(running, change)  # the same write, with the same write id, not committed yet
        writer = threading.Thread(target=lambda: answers.append(store.change(change)))
        writer.start()
        until(lambda: waits_for_lock(other), "the second try waits for the first")
        running.commit()
    writer.join(20)

    assert not store.cut
    assert [answer[0].revision for answer in answers] == [flow.revision + 1]
    assert [event.kind for event in assert_whole(store, flow.id)] == ["created", "state_updated"]
    store.close()
    other.dispose()


def test_somebody_elses_write_is_not_taken_for_ones_own_after_a_cut(postgresql_url: str) -> None:
    store = CutOff(make_engine(postgresql_url))
    flow = _created(store)
    near = SqlFlowStore(make_engine(postgresql_url))
    near.change(Change(flow.id, flow.revision, "state_updated", {"state_json": {"theirs": 1}}))

    with pytest.raises(RevisionMismatch):
        store.change(Change(flow.id, flow.revision, "state_updated", {"state_json": {"mine": 1}}))

    assert not store.cut
    store.close()
    near.close()


def _created(store: SqlFlowStore) -> Any:
    return FlowManager(store).create_managed(**NAMES)


FORKS = """
import os, sys
from celery import Celery
from celery_flows import Flows, SqlFlowStore
from celery_flows.store.engines import make_engine
import sqlalchemy as sa

app = Celery("forks", set_as_current=False)
flows = Flows(app, store=SqlFlowStore(make_engine(sys.argv[1])))  # its check has pooled a connection

def backend():
    with flows.store.engine.connect() as connection:
        return connection.scalar(sa.text("SELECT pg_backend_pid()"))

read, write = os.pipe()
child = os.fork()
if child == 0:
    try:
        os.write(write, str(backend()).encode())
    finally:
        os._exit(0)
os.waitpid(child, 0)
print(os.read(read, 20).decode(), backend())
"""


def test_a_forked_child_does_not_use_its_parents_connections(postgresql_url: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", FORKS, postgresql_url],
        capture_output=True, text=True, timeout=60, check=False, env=os.environ,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    child, parent = done.stdout.split()
    assert child != parent
