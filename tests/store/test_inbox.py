"""External events, over each database: stored before they are delivered, first in first out, handed over once."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa

from celery_flows.store import (
    ExternalEventWait,
    Flow,
    FlowManager,
    FlowStatus,
    FlowStepStatus,
    InvalidData,
    SqlFlowStore,
    TimerWait,
    inbox,
)
from celery_flows.store.changes import Park, StepWrite
from celery_flows.store.models import new_id
from celery_flows.store.tables import flow_dispatch, flow_inbox
from celery_flows.store.waits import event_key, wait_json
from tests.support.driving import Driving
from tests.support.fold import assert_whole
from tests.support.samples import DAY, NAMES, UNSTORABLE

WAIT = ExternalEventWait(topic="approval", correlation_id="1")
KEY = event_key("approval", "1")


def waiting(manager: FlowManager, wait: ExternalEventWait | TimerWait = WAIT, **fields: Any) -> Flow:
    """A flow that no definition drives, waiting."""
    flow = manager.create_managed(**NAMES, **fields)
    manager.start_running(flow.id)
    return manager.set_waiting(flow.id, wait)


def emitted(driving: Driving, payload: Any, correlation_id: str = "1") -> UUID:
    event_id = new_id()
    assert driving.emit("approval", correlation_id, payload, event_id)
    return event_id


def hand_over(store: SqlFlowStore, key: str = KEY) -> UUID | None:
    return store.run(inbox.hand_over_next, key)


def consumers(store: SqlFlowStore) -> list[UUID | None]:
    """Who consumed each event, in the order they came."""
    with store.engine.connect() as connection:
        query = sa.select(flow_inbox.c.consumed_by).order_by(flow_inbox.c.position)
        return list(connection.execute(query).scalars())


def test_an_event_that_comes_first_is_kept(store: SqlFlowStore, manager: FlowManager, driving: Driving) -> None:
    event_id = emitted(driving, {"granted": True})
    assert driving.row(event_id)["kind"] == "look"
    assert hand_over(store) is None
    flow = waiting(manager)
    assert hand_over(store) == flow.id
    resumed = manager.get(flow.id)
    assert (resumed.status, resumed.wait_json) == (FlowStatus.RUNNING, None)
    assert resumed.state_json == {"resume_event": {"granted": True}}
    assert consumers(store) == [flow.id]
    assert driving.rows(flow_dispatch.c.kind == "look") == []
    event = assert_whole(store, flow.id)[-1]
    assert (event.kind, event.payload_json["topic"]) == ("resumed", "approval")


def test_an_event_that_comes_later_resumes_the_waiter(
    store: SqlFlowStore, manager: FlowManager, driving: Driving
) -> None:
    flow = waiting(manager)
    assert hand_over(store) is None
    emitted(driving, 7)
    assert hand_over(store) == flow.id
    assert manager.get(flow.id).state_json == {"resume_event": 7}
    assert hand_over(store) is None


def test_events_and_waiters_are_both_first_in_first_out(
    store: SqlFlowStore, manager: FlowManager, driving: Driving
) -> None:
    waiters = [waiting(manager) for _ in range(3)]
    for n in range(3):
        emitted(driving, n)
    assert [hand_over(store) for _ in range(4)] == [*[flow.id for flow in waiters], None]
    assert [manager.get(flow.id).state_json["resume_event"] for flow in waiters] == [0, 1, 2]
    assert consumers(store) == [flow.id for flow in waiters]


def test_an_event_goes_past_a_waiter_that_left(store: SqlFlowStore, manager: FlowManager, driving: Driving) -> None:
    gone, cancelling, there = waiting(manager), waiting(manager), waiting(manager)
    manager.cancel(gone.id)
    manager.request_cancel(cancelling.id)
    emitted(driving, 1)
    assert hand_over(store) == there.id


def test_another_correlation_or_topic_is_another_queue(
    store: SqlFlowStore, manager: FlowManager, driving: Driving
) -> None:
    waiting(manager)
    emitted(driving, 1, "2")
    assert hand_over(store) is None
    assert hand_over(store, event_key("approval", "2")) is None
    assert event_key("a", "bc") != event_key("ab", "c")


def test_the_same_event_id_is_stored_once(store: SqlFlowStore, driving: Driving) -> None:
    event_id = emitted(driving, 1)
    assert not driving.emit("approval", "1", 1, event_id)
    assert len(consumers(store)) == 1


@pytest.mark.parametrize("payload", UNSTORABLE.values(), ids=UNSTORABLE)
def test_an_unstorable_event_is_refused_and_nothing_written(
    store: SqlFlowStore, driving: Driving, payload: Any
) -> None:
    for topic, correlation_id, sent in (("approval", "1", payload), ("", "1", 1), ("approval", "a\0", 1)):
        with pytest.raises(InvalidData):
            driving.emit(topic, correlation_id, sent, new_id())
    assert consumers(store) == []
    assert driving.rows() == []


def test_an_event_in_a_transaction_that_is_rolled_back_never_was(store: SqlFlowStore, driving: Driving) -> None:
    with store.engine.connect() as connection:
        inbox.emit(connection, "approval", "1", 1, new_id(), 10.0)
        connection.rollback()
    assert consumers(store) == []
    assert driving.rows() == []


def test_a_look_row_knows_its_key_until_it_is_dropped(store: SqlFlowStore, driving: Driving) -> None:
    event_id = emitted(driving, 1)
    assert store.run(inbox.key_of, str(event_id)) == KEY
    store.run(inbox.drop_look, str(event_id))
    assert driving.rows() == []
    assert consumers(store) == [None], "the event is kept for the next waiter"


def test_a_driven_flow_finds_the_payload_in_its_wait_step(store: SqlFlowStore, driving: Driving) -> None:
    flow = driving.start()
    claim = driving.claimed(flow.id)
    wait = ExternalEventWait(topic="approval", correlation_id="1", run_id="wait-1")
    step = StepWrite("wait-1", "wait_for", FlowStepStatus.RUNNING, 1, args='{"topic":"approval"}')
    columns = {"status": "waiting", "wait_json": wait_json(wait)}
    driving.write(claim, "waiting", columns, step=step, drive=Park(claim.holder, claim.wakes, None))
    assert_whole(store, flow.id)
    emitted(driving, {"granted": True})
    assert hand_over(store) == flow.id
    closed = store.find_step_by_run_id(flow.id, "wait-1")
    assert closed is not None
    assert (closed.status, closed.result_json) == (FlowStepStatus.SUCCEEDED, {"granted": True})
    assert (closed.id, closed.args_json) == (step.id, {"topic": "approval"})
    resumed = store.get(flow.id)
    assert resumed is not None
    assert (resumed.status, resumed.state_json) == (FlowStatus.RUNNING, {})
    assert_whole(store, flow.id)
    assert driving.claimed(flow.id, "w2").wakes == 1


# ---- one flow, directly ---------------------------------------------------------------------------------------------


def test_resume_external_takes_just_the_event_that_is_waited_for(store: SqlFlowStore, manager: FlowManager) -> None:
    flow = waiting(manager)
    assert not store.run(inbox.resume_external, flow.id, "approval", "2", 1)
    assert not store.run(inbox.resume_external, flow.id, "other", "1", 1)
    assert not store.run(inbox.resume_external, new_id(), "approval", "1", 1)
    assert manager.get(flow.id) == flow
    assert store.run(inbox.resume_external, flow.id, "approval", "1", {"n": 1})
    assert manager.get(flow.id).state_json == {"resume_event": {"n": 1}}
    assert not store.run(inbox.resume_external, flow.id, "approval", "1", 2), "it waits no more"
    assert consumers(store) == []
    assert_whole(store, flow.id)


# ---- waits of undriven flows ----------------------------------------------------------------------------------------


def settle(store: SqlFlowStore, flow: Flow) -> str | None:
    return store.run(inbox.settle_wait, flow.id)


def test_a_timer_resumes_when_it_is_due(store: SqlFlowStore, manager: FlowManager, driving: Driving) -> None:
    early, due = waiting(manager, TimerWait(at=driving.now() + DAY)), waiting(manager, TimerWait(at=driving.now()))
    assert settle(store, early) is None
    assert settle(store, due) == "resumed"
    assert manager.get(early.id) == early
    assert (manager.get(due.id).status, manager.get(due.id).state_json) == (FlowStatus.RUNNING, {})
    assert [row["run_id"] for row in driving.rows()] == [str(early.id)]
    assert settle(store, due) is None
    assert_whole(store, due.id)


def test_a_wait_for_an_event_times_out(store: SqlFlowStore, manager: FlowManager, driving: Driving) -> None:
    wait = ExternalEventWait(topic="approval", correlation_id="1", timeout_at=driving.now())
    flow = waiting(manager, wait)
    assert settle(store, flow) == "resumed"
    assert manager.get(flow.id).state_json == {"resume_event": None, "wait_timed_out": True}
    emitted(driving, 1)
    assert hand_over(store) is None
    assert_whole(store, flow.id)


def test_a_manual_wait_is_never_due(store: SqlFlowStore, manager: FlowManager, driving: Driving) -> None:
    flow = manager.create_mirrored(**NAMES)
    manager.set_waiting(flow.id, {"kind": "manual"})
    assert settle(store, flow) is None
    assert driving.row(flow.id)["due_at"] is None
    manager.resume(flow.id)
    assert settle(store, flow) is None
    assert driving.rows() == []


@pytest.mark.parametrize("meanwhile", ["nothing", "update_state", "pause"])
def test_a_requested_cancel_ends_the_wait_whatever_else_is_written(
    store: SqlFlowStore, manager: FlowManager, driving: Driving, meanwhile: str
) -> None:
    flow = waiting(manager)
    manager.request_cancel(flow.id)
    if meanwhile == "update_state":
        manager.update_state(flow.id, {"n": 1})
    if meanwhile == "pause":
        manager.pause(flow.id)
        manager.unpause(flow.id)
    due = driving.row(flow.id)["due_at"]
    assert due is not None, "nobody would look at it"
    assert due <= driving.now()
    assert settle(store, flow) == "cancelled"
    assert manager.get(flow.id).status is FlowStatus.CANCELLED
    assert driving.rows() == []
    assert_whole(store, flow.id)


def test_a_wait_that_is_changed_is_due_when_the_new_one_is(
    store: SqlFlowStore, manager: FlowManager, driving: Driving
) -> None:
    flow = waiting(manager, TimerWait(at=driving.now() + DAY))
    manager.resume(flow.id)
    soon = manager.set_waiting(flow.id, TimerWait(at=driving.now()))
    assert driving.row(flow.id)["due_at"] <= driving.now()
    manager.update_state(flow.id, {"n": 1})
    assert driving.row(flow.id)["due_at"] <= driving.now()
    assert settle(store, soon) == "resumed"
