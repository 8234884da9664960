"""The sweep, over each database: lost leases freed and counted, due rows published, poison ended."""

from __future__ import annotations

from celery_flows.store import FlowManager, FlowStatus, SqlFlowStore, TimerWait, dispatch
from celery_flows.store.changes import Completion, Holder
from celery_flows.store.models import FlowStepStatus, new_id
from tests.support.driving import LEASE, Driving
from tests.support.fold import assert_whole
from tests.support.samples import DAY


def test_nothing_due_is_nothing_swept(driving: Driving) -> None:
    driving.start()
    flow = driving.start()
    driving.wait(driving.claimed(flow.id), TimerWait(at=driving.now() + DAY))
    assert driving.sweep() == []


def test_a_row_nobody_came_for_is_published_again_after_a_growing_pause(driving: Driving) -> None:
    flow = driving.start()
    pauses = []
    for _ in range(4):
        driving.pass_time(1000)
        (swept,) = driving.sweep(first=10.0, cap=45.0)
        assert (swept.hint.run_id, swept.hint.flow_id, swept.hint.kind) == (str(flow.id), flow.id, "drive")
        assert (swept.hint.task, swept.hint.queue, swept.hint.priority) == ("orders/fulfil", "default", 5)
        row = driving.row(flow.id)
        pauses.append(round((row["due_at"] - driving.now()).total_seconds(), -1))
        assert driving.sweep() == [], "not before its pause has passed"
    assert pauses[:2] == [10, 20]
    assert all(pause in (40, 50) for pause in pauses[2:])  # the cap, rounded
    assert row["publish_count"] == 5
    assert row["crash_count"] == 0
    driving.claimed(flow.id)


def test_a_lost_lease_is_freed_counted_and_published(driving: Driving) -> None:
    flow = driving.start()
    claim = driving.claimed(flow.id)
    assert driving.sweep() == []
    driving.pass_time(LEASE + 1)
    (swept,) = driving.sweep()
    assert (swept.crash_count, swept.fence) == (1, 1)
    row = driving.row(flow.id)
    assert (row["worker"], row["publish_count"]) == (None, 1)
    assert not driving.park(claim), "a swept lease is no lease"
    taken = driving.claimed(flow.id, "w2")
    assert (taken.crash_count, taken.holder.fence) == (1, 2)
    assert [event.kind for event in assert_whole(driving.store, flow.id)][-1] == "reclaimed"


def test_a_due_timer_is_published(driving: Driving) -> None:
    flow = driving.start()
    driving.wait(driving.claimed(flow.id), TimerWait(at=driving.now()))
    (swept,) = driving.sweep()
    assert (swept.hint.run_id, swept.crash_count) == (str(flow.id), 0)
    driving.claimed(flow.id, "w2")


def test_a_sweep_takes_no_more_than_its_limit_longest_due_first(driving: Driving) -> None:
    flows = []
    for _ in range(5):
        driving.pass_time(20)
        flows.append(driving.start())
    driving.pass_time(20)
    first = {swept.hint.flow_id for swept in driving.sweep(limit=2)}
    assert first == {flows[0].id, flows[1].id}
    assert {swept.hint.flow_id for swept in driving.sweep(limit=2)} == {flows[2].id, flows[3].id}
    assert driving.sweep(limit=0) == []


def test_a_member_is_published_with_its_options(driving: Driving) -> None:
    flow, (run_id,) = driving.gathering(1)
    driving.pass_time(60)
    (swept,) = driving.sweep()
    hint = swept.hint
    assert (hint.run_id, hint.flow_id, hint.kind, hint.task) == (run_id, flow.id, "step", "charge")
    assert (hint.queue, hint.priority, hint.options) == ("default", 5, {"time_limit": 9})


def test_a_member_whose_workers_keep_dying_is_failed_by_the_row_nobody_holds(driving: Driving) -> None:
    flow, (run_id,) = driving.gathering(1)
    for crash in (1, 2):
        assert driving.claim_step(run_id, f"s{crash}") is not None
        driving.pass_time(LEASE + 1)
        (swept,) = [row for row in driving.sweep() if row.hint.run_id == run_id]
        assert swept.crash_count == crash
    poison = Completion(Holder(run_id, swept.fence, None), flow.id, FlowStepStatus.FAILED, error={"type": "StepLost"})
    outdated = Completion(Holder(run_id, 1, None), flow.id, FlowStepStatus.FAILED)
    assert driving.store.run(dispatch.complete_step, outdated) is None
    completed = driving.store.run(dispatch.complete_step, poison)
    assert completed is not None
    assert completed.woke
    assert_whole(driving.store, flow.id)


def test_a_retry_forgets_the_crashes(driving: Driving) -> None:
    flow, (run_id,) = driving.gathering(1)
    driving.claim_step(run_id, "dead")
    driving.pass_time(LEASE + 1)
    claim = driving.claim_step(run_id, "s2")
    assert claim is not None
    assert driving.row(run_id)["crash_count"] == 1
    driving.store.run(dispatch.retry_step, claim.holder, flow.id, 1, 0.0, {"type": "E", "message": ""})
    assert driving.row(run_id)["crash_count"] == 0


# ---- poison ---------------------------------------------------------------------------------------------------------


def test_a_driver_that_died_too_often_fails_its_flow(driving: Driving, store: SqlFlowStore) -> None:
    flow = driving.start()
    driving.record(driving.claimed(flow.id))
    driving.pass_time(LEASE + 1)
    (swept,) = driving.sweep()
    assert store.run(dispatch.fail_lost, flow.id, swept.fence)
    failed = store.get(flow.id)
    assert failed is not None
    assert (failed.status, failed.state_json["failure"]) == (FlowStatus.FAILED, {"reason": "lost"})
    assert failed.error_json is not None
    assert failed.finished_at is not None
    assert len(store.list_steps(flow.id)) == 1, "history stays"
    assert driving.rows() == []
    assert not store.run(dispatch.fail_lost, flow.id, swept.fence)
    assert_whole(store, flow.id)


def test_a_flow_that_was_claimed_meanwhile_is_not_failed(driving: Driving, store: SqlFlowStore) -> None:
    flow = driving.start()
    driving.claimed(flow.id)
    driving.pass_time(LEASE + 1)
    (swept,) = driving.sweep()
    claim = driving.claimed(flow.id, "w2")
    assert not store.run(dispatch.fail_lost, flow.id, swept.fence)
    assert driving.park(claim) is False
    assert not store.run(dispatch.fail_lost, flow.id, swept.fence), "nobody holds it, but it lives"
    assert store.list_by_status(FlowStatus.RUNNING) != []


def test_a_lost_flow_that_was_to_be_cancelled_is_cancelled(driving: Driving, store: SqlFlowStore) -> None:
    flow = driving.start()
    FlowManager(store).request_cancel(flow.id)
    driving.claimed(flow.id)
    driving.pass_time(LEASE + 1)
    (swept,) = driving.sweep()
    assert store.run(dispatch.fail_lost, flow.id, swept.fence)
    cancelled = store.get(flow.id)
    assert cancelled is not None
    assert (cancelled.status, cancelled.finished_at is not None) == (FlowStatus.CANCELLED, True)
    assert_whole(store, flow.id)


def test_what_needs_no_worker_is_listed_not_published(driving: Driving, store: SqlFlowStore) -> None:
    undriven = FlowManager(store).create_mirrored(controller_id="c", owner_session_key="o")
    FlowManager(store).set_waiting(undriven.id, TimerWait(at=driving.now()))
    driving.emit("topic", "1", None, event_id := new_id())
    driving.pass_time(60)
    assert driving.sweep() == []
    found = {(row.run_id, row.kind, row.flow_id) for row in store.run(dispatch.list_unsettled, 10)}
    assert found == {(str(undriven.id), "drive", undriven.id), (str(event_id), "look", None)}
    assert len(store.run(dispatch.list_unsettled, 1)) == 1
    assert store.run(dispatch.list_unsettled, 10, driving.now() - DAY) == []
