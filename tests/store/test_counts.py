"""What stands in the store is counted exactly, and how long work has waited is told though nobody wrote it down."""

from __future__ import annotations

from datetime import timedelta

import pytest
import sqlalchemy as sa

from celery_flows.store import Flow, FlowStatus, SqlFlowStore, counts
from celery_flows.store import operations as op
from celery_flows.store.changes import Drive, Holder
from celery_flows.store.counts import Counts
from celery_flows.store.tables import flow_dispatch
from celery_flows.store.traces import Trace, find_trace, leave_span

FIRST, MOST = 5.0, 40.0
_d = flow_dispatch.c


def counted(store: SqlFlowStore) -> Counts:
    return store.run(counts.count, FIRST, MOST, ("sweep",))


def flow_of(store: SqlFlowStore, name: str = "shop/fulfil") -> Flow:
    flow = Flow(controller_id=name, owner_session_key="default", trace_json={"traceparent": "00-1-2-01"})
    store.run(op.create_flow, flow, {}, Drive(name, first_pause=FIRST))
    return flow


def row(store: SqlFlowStore, flow: Flow, ago: float, **values: object) -> None:
    """The flow's drive row, due so many seconds ago."""
    at = store.run(op.now) - timedelta(seconds=ago)
    with store.engine.begin() as connection:
        connection.execute(sa.update(flow_dispatch).where(_d.run_id == str(flow.id)).values(due_at=at, **values))


def test_open_flows_are_counted_by_definition_and_status(store: SqlFlowStore) -> None:
    for _ in range(2):
        flow_of(store)
    store.insert(Flow(controller_id="shop/fulfil", owner_session_key="default", status=FlowStatus.FINISHED))
    store.insert(Flow(controller_id="other", owner_session_key="default", status=FlowStatus.RUNNING))
    assert sorted(counted(store).open_flows) == [("other", "running", 1), ("shop/fulfil", "created", 2)]


@pytest.mark.parametrize(
    ("published", "due_ago", "waited"),
    [(0, 7, 7), (1, -2, 3), (2, -2, 8), (3, -2, 18), (4, -2, 38), (5, -2, 78), (6, -2, 118), (40, -2, 78 + 35 * 40)],
)  # fmt: skip
def test_how_long_a_row_has_waited_follows_from_how_often_it_was_published(
    store: SqlFlowStore, published: int, due_ago: int, waited: int
) -> None:
    """The pauses are 5, 5, 10, 20, 40, 40, … seconds."""
    row(store, flow_of(store), due_ago, publish_count=published)
    (waiting,) = counted(store).waiting
    assert (waiting.kind, waiting.count) == ("drive", 1)
    assert waiting.oldest_seconds == pytest.approx(waited, abs=2.0)


def test_timers_leases_and_queues_do_not_wait_for_a_worker(store: SqlFlowStore) -> None:
    timer, held, queued = flow_of(store), flow_of(store), flow_of(store, "limited")
    row(store, timer, -20, publish_count=0)
    row(store, held, -20, publish_count=0, worker="somebody")
    row(store, queued, 20, publish_count=0, limit_key="limited", queued_at=store.run(op.now))
    found = counted(store)
    assert (found.waiting, found.held, found.queued) == ([], [("drive", 1)], [("limited", 1)])


def test_a_span_is_left_by_who_holds_the_row_and_told_after_a_crash(store: SqlFlowStore) -> None:
    flow = flow_of(store)
    row(store, flow, -20, worker="me", fence=3)
    store.run(leave_span, Holder(str(flow.id), 2, "me"), "overtaken")
    store.run(leave_span, Holder(str(flow.id), 3, "me"), "mine")
    assert store.run(find_trace, str(flow.id)) == Trace(flow.trace_json, None)
    row(store, flow, 0, crash_count=1)
    assert store.run(find_trace, str(flow.id)) == Trace(flow.trace_json, "mine")
    assert store.run(find_trace, "nothing") == Trace(None, None)
