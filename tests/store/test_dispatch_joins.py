"""The join is counted in the drive row, over each database: whoever meets it wakes the driver, nobody looks after."""

from __future__ import annotations

import pytest

from celery_flows.store import FlowManager, FlowStatus, FlowStepStatus, InvalidData, LeaseLost, SqlFlowStore, dispatch
from celery_flows.store.changes import Completion, Holder
from tests.support.driving import LEASE, Driving
from tests.support.fold import assert_whole


def counters(driving: Driving, flow_id: object) -> tuple[int, int, int]:
    row = driving.row(flow_id)
    return row["open_members"], row["join_good"], row["join_bad"]


def is_due(driving: Driving, flow_id: object) -> bool:
    due = driving.row(flow_id)["due_at"]
    return due is not None and due <= driving.now()


def test_a_gather_schedules_its_members_and_parks(driving: Driving) -> None:
    flow, run_ids = driving.gathering(3)
    row = driving.row(flow.id)
    assert (row["worker"], row["due_at"], row["join_group"]) == (None, None, 1)
    assert counters(driving, flow.id) == (3, 3, 0)
    member = driving.row(run_ids[0])
    assert (member["kind"], member["task"], member["queue"], member["priority"]) == ("step", "charge", "default", 5)
    assert (member["options"], member["publish_count"], member["join_group"]) == ({"time_limit": 9}, 1, 1)
    steps = driving.store.list_steps(flow.id)
    assert {step.run_id for step in steps} == set(run_ids)
    assert {step.status for step in steps} == {FlowStepStatus.PENDING}
    kinds = [event.kind for event in assert_whole(driving.store, flow.id)]
    assert kinds == ["created", "started", *["step_scheduled"] * 3]


def test_the_last_of_all_wakes_the_driver(driving: Driving) -> None:
    flow, run_ids = driving.gathering(3)
    assert [driving.work(run_id).woke for run_id in run_ids] == [False, False, True]
    assert counters(driving, flow.id) == (0, 0, 0)
    assert is_due(driving, flow.id)
    assert driving.claimed(flow.id, "w2").open_members == 0
    steps = driving.store.list_steps(flow.id)
    assert [(step.status, step.result_json) for step in steps] == [(FlowStepStatus.SUCCEEDED, {"n": 1})] * 3
    assert_whole(driving.store, flow.id)


def test_a_single_celery_step_is_a_join_of_one(driving: Driving) -> None:
    flow, (run_id,) = driving.gathering(1)
    event = driving.store.list_events(flow.id, 1)[0]
    assert (event.kind, event.revision) == ("step_scheduled", 3)
    completed = driving.work(run_id)
    assert (completed.woke, completed.queue) == (True, "default")
    assert_whole(driving.store, flow.id)


def test_one_failure_too_many_wakes_the_driver_of_all(driving: Driving) -> None:
    flow, run_ids = driving.gathering(3)
    assert driving.work(run_ids[0], failed=True).woke
    assert counters(driving, flow.id) == (2, 3, -1)
    step = driving.store.find_step_by_run_id(flow.id, run_ids[0])
    assert step is not None
    assert (step.status, step.error_json) == (FlowStepStatus.FAILED, {"type": "E", "message": ""})
    assert_whole(driving.store, flow.id)


def test_the_first_success_wakes_the_driver_of_any(driving: Driving) -> None:
    flow, run_ids = driving.gathering(3, good=1, bad=2)
    assert [driving.work(run_ids[n], failed=n < 2).woke for n in range(3)] == [False, False, True]
    assert counters(driving, flow.id) == (0, 0, 0)


def test_any_that_cannot_succeed_any_more_wakes_the_driver(driving: Driving) -> None:
    _, run_ids = driving.gathering(3, good=1, bad=2)
    assert [driving.work(run_id, failed=True).woke for run_id in run_ids] == [False, False, True]


def test_failures_within_what_is_borne_wake_nobody(driving: Driving) -> None:
    _, run_ids = driving.gathering(3, good=2, bad=1)
    assert not driving.work(run_ids[0], failed=True).woke
    assert not driving.work(run_ids[1]).woke
    assert driving.work(run_ids[2]).woke


def test_a_straggler_of_an_older_group_counts_off_but_decides_nothing(driving: Driving) -> None:
    flow, old = driving.gathering(2, good=1, bad=1)
    straggler = driving.claim_step(old[1], "slow")
    assert straggler is not None
    assert driving.work(old[0]).woke
    claim = driving.claimed(flow.id, "w2")
    assert (claim.open_members, claim.join_group) == (1, 1)
    new = driving.schedule(claim, 2)
    assert counters(driving, flow.id) == (3, 2, 0)
    late = driving.complete(straggler.holder, flow.id)
    assert late is not None
    assert not late.woke
    assert counters(driving, flow.id) == (2, 2, 0)
    assert [driving.work(run_id).woke for run_id in new] == [False, True]


def test_a_member_that_ends_while_the_driver_is_at_work_is_seen_by_the_park(driving: Driving) -> None:
    flow, run_ids = driving.gathering(1)
    FlowManager(driving.store).request_cancel(flow.id)
    claim = driving.claimed(flow.id, "w2")
    assert not driving.work(run_ids[0]).woke, "its driver is held"
    assert driving.park(claim) is True
    assert is_due(driving, flow.id)


# ---- who may complete -----------------------------------------------------------------------------------------------


def test_a_completion_by_anybody_but_the_holder_is_refused(driving: Driving) -> None:
    flow, (run_id,) = driving.gathering(1)
    claim = driving.claim_step(run_id, "s1")
    assert claim is not None
    assert (claim.task, claim.args, claim.attempt) == ("charge", {"args": [], "kwargs": {}}, 1)
    assert (claim.owner, claim.definition, claim.cancel_requested) == ("tenant:acme", "orders/fulfil", False)
    before = driving.store.list_events(flow.id)
    for wrong in (
        Holder("another run", 1, "s1"),
        Holder(run_id, 0, "s1"),
        Holder(run_id, 2, "s1"),
        Holder(run_id, 1, "s2"),
        Holder(run_id, 1, None),
    ):
        assert driving.complete(wrong, flow.id) is None
    assert driving.store.list_events(flow.id) == before
    assert counters(driving, flow.id) == (1, 1, 0)
    assert driving.complete(claim.holder, flow.id) is not None
    assert driving.complete(claim.holder, flow.id) is None, "once only"
    assert_whole(driving.store, flow.id)


def test_of_two_messages_for_a_step_one_claims(driving: Driving) -> None:
    _, (run_id,) = driving.gathering(1)
    assert driving.claim_step(run_id, "s1") is not None
    assert driving.claim_step(run_id, "s2") is None


def test_an_overtaken_member_is_refused(driving: Driving) -> None:
    flow, (run_id,) = driving.gathering(1)
    overtaken = driving.claim_step(run_id, "s1")
    driving.pass_time(LEASE + 1)
    claim = driving.claim_step(run_id, "s2")
    assert overtaken is not None
    assert claim is not None
    assert driving.complete(overtaken.holder, flow.id) is None
    assert driving.complete(claim.holder, flow.id) is not None
    assert_whole(driving.store, flow.id)


def test_a_completion_whose_reply_was_lost_is_found(driving: Driving) -> None:
    flow, (run_id,) = driving.gathering(1)
    claim = driving.claim_step(run_id)
    assert claim is not None
    outcome = Completion(claim.holder, flow.id, FlowStepStatus.SUCCEEDED, result="1")
    assert driving.store.run(dispatch.find_completion, outcome) is None
    completed = driving.store.run(dispatch.complete_step, outcome)
    assert completed is not None
    assert driving.store.run(dispatch.find_completion, outcome) == completed


def test_a_step_that_workers_run_cannot_be_observed_by_hand(driving: Driving, store: SqlFlowStore) -> None:
    flow, (run_id,) = driving.gathering(1)
    before = store.list_steps(flow.id)
    seen = FlowManager(store).record_step_observation
    with pytest.raises(InvalidData):
        seen(flow_id=flow.id, run_id=run_id, task="charge", status=FlowStepStatus.SUCCEEDED)
    assert store.list_steps(flow.id) == before
    assert driving.work(run_id).woke


# ---- retries --------------------------------------------------------------------------------------------------------


def test_a_retry_cannot_be_claimed_before_it_is_due(driving: Driving) -> None:
    flow, (run_id,) = driving.gathering(1)
    claim = driving.claim_step(run_id)
    assert claim is not None
    retry = (claim.holder, flow.id, claim.attempt, 60.0, {"type": "E", "message": "m"})
    assert driving.store.run(dispatch.retry_step, *retry)
    assert not driving.store.run(dispatch.retry_step, *retry), "sent again, it counts once"
    assert driving.claim_step(run_id, "early") is None
    assert counters(driving, flow.id) == (1, 1, 0)
    driving.pass_time(61)
    again = driving.claim_step(run_id, "s2")
    assert again is not None
    assert again.attempt == 2
    assert driving.complete(claim.holder, flow.id) is None, "the first attempt is late"
    assert driving.complete(again.holder, flow.id) is not None
    kinds = [event.kind for event in assert_whole(driving.store, flow.id)][3:]
    assert kinds == ["step_started", "step_retrying", "step_started", "step_succeeded"]


# ---- draining and the end -------------------------------------------------------------------------------------------


def test_a_drain_cancels_the_unclaimed_and_waits_for_the_others(driving: Driving, store: SqlFlowStore) -> None:
    flow, run_ids = driving.gathering(4)
    running = driving.claim_step(run_ids[0])
    assert running is not None
    FlowManager(store).request_cancel(flow.id)
    claim = driving.claimed(flow.id, "w2")
    assert store.run(dispatch.drain, flow.id, claim.holder) == 1
    assert store.run(dispatch.drain, flow.id, claim.holder) == 1, "draining again changes nothing"
    assert driving.park(claim) is False
    assert [driving.claim_step(run_id) for run_id in run_ids[1:]] == [None] * 3
    last = driving.complete(running.holder, flow.id)
    assert last is not None
    assert last.woke
    statuses = [step.status for step in store.list_steps(flow.id)]
    assert sorted(statuses) == ["cancelled"] * 3 + ["succeeded"]
    assert_whole(store, flow.id)


def test_an_overtaken_driver_drains_nothing(driving: Driving, store: SqlFlowStore) -> None:
    flow, _ = driving.gathering(2)
    FlowManager(store).request_cancel(flow.id)
    overtaken = driving.claimed(flow.id, "w2")
    driving.pass_time(LEASE + 1)
    driving.claimed(flow.id, "w3")
    before = driving.rows()
    with pytest.raises(LeaseLost):
        store.run(dispatch.drain, flow.id, overtaken.holder)
    assert driving.rows() == before
    assert {step.status for step in store.list_steps(flow.id)} == {FlowStepStatus.PENDING}


def test_an_end_closes_open_steps_and_deletes_every_row(driving: Driving, store: SqlFlowStore) -> None:
    flow, run_ids = driving.gathering(3)
    driving.work(run_ids[0])
    running = driving.claim_step(run_ids[1])
    assert running is not None
    assert FlowManager(store).fail(flow.id, "why").status is FlowStatus.FAILED
    assert driving.rows() == []
    statuses = {step.run_id: step.status for step in store.list_steps(flow.id)}
    assert [statuses[run_id] for run_id in run_ids] == ["succeeded", "cancelled", "cancelled"]
    assert driving.complete(running.holder, flow.id) is None
    assert driving.claim_step(run_ids[2]) is None
    kinds = [event.kind for event in assert_whole(store, flow.id)]
    assert kinds.count("step_cancelled") == 2
    assert kinds.count("failed") == 1
