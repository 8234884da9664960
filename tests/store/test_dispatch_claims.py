"""Who may work on what, over each database: claims, leases, parking and waking."""

from __future__ import annotations

from datetime import timedelta

import pytest

from celery_flows.store import FlowManager, FlowStatus, RevisionMismatch, SqlFlowStore, TimerWait, dispatch
from celery_flows.store.changes import Change, Holder, Park
from tests.support.driving import LEASE, Driving
from tests.support.fold import assert_whole
from tests.support.samples import DAY


def seconds_until_due(driving: Driving, run_id: object) -> float:
    due: timedelta = driving.row(run_id)["due_at"] - driving.now()
    return due.total_seconds()


def test_a_new_row_is_published_and_claimable_before_it_is_due(driving: Driving) -> None:
    flow = driving.start()
    row = driving.row(flow.id)
    assert (row["kind"], row["task"], row["queue"], row["priority"]) == ("drive", "orders/fulfil", "default", 5)
    assert (row["publish_count"], row["fence"], row["worker"]) == (1, 0, None)
    assert 5 < seconds_until_due(driving, flow.id) <= 10
    claim = driving.claimed(flow.id)
    assert claim.flow.status is FlowStatus.RUNNING
    assert (claim.holder, claim.began, claim.wakes, claim.crash_count) == (Holder(str(flow.id), 1, "w1"), True, 0, 0)
    assert claim.flow.revision == 2
    assert abs(driving.now() - claim.now) < timedelta(seconds=5)
    assert [event.kind for event in assert_whole(driving.store, flow.id)] == ["created", "started"]


def test_a_claim_takes_the_lease_and_ends_the_publishing(driving: Driving) -> None:
    flow = driving.start()
    driving.claimed(flow.id)
    row = driving.row(flow.id)
    assert (row["worker"], row["publish_count"], row["fence"]) == ("w1", 0, 1)
    assert LEASE - 5 < seconds_until_due(driving, flow.id) <= LEASE


def test_of_two_messages_one_claims(driving: Driving) -> None:
    flow = driving.start()
    driving.claimed(flow.id)
    assert driving.claim(flow.id, "w2") is None
    stored = driving.store.get(flow.id)
    assert stored is not None
    assert stored.revision == 2


def test_a_claim_whose_reply_was_lost_knows_its_own_token(driving: Driving) -> None:
    flow = driving.start()
    driving.claimed(flow.id, "w1")
    assert driving.claim(flow.id, "w1") is None
    assert driving.claim(flow.id, "w2", repeat=True) is None
    again = driving.claim(flow.id, "w1", repeat=True)
    assert again is not None
    assert (again.holder.worker, again.crash_count) == ("w1", 0)
    driving.record(again)
    assert_whole(driving.store, flow.id)


def test_a_lost_lease_is_taken_over_as_a_crash_and_the_overtaken_is_refused(driving: Driving) -> None:
    flow = driving.start()
    overtaken = driving.claimed(flow.id, "w1")
    driving.pass_time(LEASE + 1)
    claim = driving.claimed(flow.id, "w2")
    assert (claim.holder.fence, claim.crash_count, claim.began) == (2, 1, False)
    with pytest.raises(RevisionMismatch):
        driving.record(overtaken)
    assert not driving.park(overtaken)
    assert not driving.store.run(dispatch.renew_own, overtaken.holder, LEASE)
    assert not driving.store.run(dispatch.hand_back, overtaken.holder)
    assert driving.row(flow.id)["worker"] == "w2"
    kinds = [event.kind for event in assert_whole(driving.store, flow.id)]
    assert kinds == ["created", "started", "reclaimed"]


def test_a_record_forgets_the_crashes(driving: Driving) -> None:
    flow = driving.start()
    driving.claimed(flow.id, "w1")
    driving.pass_time(LEASE + 1)
    claim = driving.claimed(flow.id, "w2")
    assert driving.row(flow.id)["crash_count"] == 1
    driving.record(claim)
    assert driving.row(flow.id)["crash_count"] == 0
    (step,) = driving.store.list_steps(flow.id)
    assert step.updated_at - step.created_at == timedelta(microseconds=1500)
    assert_whole(driving.store, flow.id)


def test_a_paused_flow_is_not_claimed(driving: Driving) -> None:
    flow, manager = driving.start(), FlowManager(driving.store)
    manager.pause(flow.id)
    assert driving.claim(flow.id) is None
    manager.unpause(flow.id)
    driving.claimed(flow.id)


def test_a_flow_that_has_ended_is_not_claimed(driving: Driving) -> None:
    flow = driving.start()
    FlowManager(driving.store).cancel(flow.id)
    assert driving.rows() == []
    assert driving.claim(flow.id) is None


def test_a_claim_tells_of_a_requested_cancel_and_leaves_the_status(driving: Driving) -> None:
    flow = driving.start()
    FlowManager(driving.store).request_cancel(flow.id)
    claim = driving.claimed(flow.id)
    assert (claim.flow.cancel_requested, claim.flow.status) == (True, FlowStatus.CREATED)
    assert_whole(driving.store, flow.id)


# ---- park and wake --------------------------------------------------------------------------------------------------


def test_a_parked_row_rests_and_no_late_message_claims_it(driving: Driving) -> None:
    flow = driving.start()
    assert driving.park(driving.claimed(flow.id)) is False
    row = driving.row(flow.id)
    assert (row["worker"], row["due_at"], row["publish_count"], row["fence"]) == (None, None, 0, 1)
    assert driving.claim(flow.id, "late") is None


def test_a_timer_is_not_claimed_before_its_time(driving: Driving) -> None:
    flow = driving.start()
    driving.wait(driving.claimed(flow.id), TimerWait(at=driving.now() + DAY))
    assert driving.claim(flow.id, "late") is None
    driving.pass_time(DAY.total_seconds() + 1)
    claim = driving.claimed(flow.id, "w2")
    assert (claim.flow.status, claim.flow.wait_json, claim.crash_count) == (FlowStatus.RUNNING, None, 0)
    kinds = [event.kind for event in assert_whole(driving.store, flow.id)]
    assert kinds == ["created", "started", "waiting", "resumed"]


def test_a_wake_during_a_lease_is_kept_for_the_park(driving: Driving) -> None:
    flow = driving.start()
    claim = driving.claimed(flow.id)
    FlowManager(driving.store).request_cancel(flow.id)
    row = driving.row(flow.id)
    assert (row["worker"], row["wakes"]) == ("w1", 1), "a wake never ends a lease"
    assert seconds_until_due(driving, flow.id) > 5
    assert driving.park(claim) is True
    assert seconds_until_due(driving, flow.id) <= 0
    assert driving.claimed(flow.id, "w2").flow.cancel_requested


def test_a_wake_at_rest_makes_the_row_due(driving: Driving) -> None:
    flow = driving.start()
    driving.wait(driving.claimed(flow.id), TimerWait(at=driving.now() + DAY))
    FlowManager(driving.store).resume(flow.id)
    assert seconds_until_due(driving, flow.id) <= 0
    assert driving.claimed(flow.id, "w2").wakes == 1


def test_parking_within_a_transition_compares_the_wakes_too(driving: Driving) -> None:
    flow = driving.start()
    claim = driving.claimed(flow.id)
    stored = FlowManager(driving.store).update_state(flow.id, {"n": 1})  # calls nobody
    assert driving.row(flow.id)["wakes"] == 0
    FlowManager(driving.store).request_cancel(flow.id)
    driving.store.change(Change(flow.id, stored.revision + 1, "noted", {}, drive=Park(claim.holder, claim.wakes, None)))
    assert seconds_until_due(driving, flow.id) <= 0


def test_the_fence_only_grows(driving: Driving) -> None:
    flow, fences = driving.start(), []
    for n in range(3):
        claim = driving.claimed(flow.id, f"w{n}")
        fences.append(claim.holder.fence)
        driving.wait(claim, TimerWait(at=driving.now()))
    assert fences == [1, 2, 3]


# ---- leases ---------------------------------------------------------------------------------------------------------


def test_leases_are_renewed_and_released_by_token(driving: Driving) -> None:
    mine, other = driving.start(), driving.start()
    driving.claimed(mine.id, "w1/a")
    driving.claimed(other.id, "w2/a")
    driving.pass_time(20)
    assert driving.store.run(dispatch.renew, ["w1", "nobody"], LEASE) == 1
    assert seconds_until_due(driving, mine.id) > 20
    assert seconds_until_due(driving, other.id) < 15
    assert driving.store.run(dispatch.release, ["w1"]) == 1
    row = driving.row(mine.id)
    assert (row["worker"], row["crash_count"], row["publish_count"]) == (None, 1, 1)
    assert driving.row(other.id)["worker"] == "w2/a"
    assert driving.claimed(mine.id, "w3").crash_count == 1
    assert driving.store.run(dispatch.renew, [], LEASE) == 0


def test_a_token_is_no_prefix_of_anothers(driving: Driving) -> None:
    flow = driving.start()
    driving.claimed(flow.id, "node-1/a")
    for token in ("node", "node-", "node_1", "node-%", "%"):
        assert driving.store.run(dispatch.release, [token]) == 0
    assert driving.row(flow.id)["worker"] == "node-1/a"


def test_a_late_release_after_a_takeover_changes_nothing(driving: Driving) -> None:
    flow = driving.start()
    driving.claimed(flow.id, "dead/a")
    driving.pass_time(LEASE + 1)
    driving.claimed(flow.id, "w2/a")
    before = driving.row(flow.id)
    assert driving.store.run(dispatch.release, ["dead"]) == 0
    assert driving.store.run(dispatch.renew, ["dead"], LEASE) == 0
    assert driving.row(flow.id) == before


def test_a_row_handed_back_is_not_a_crash(driving: Driving) -> None:
    flow = driving.start()
    claim = driving.claimed(flow.id)
    assert driving.store.run(dispatch.hand_back, claim.holder, 60.0)
    row = driving.row(flow.id)
    assert (row["worker"], row["crash_count"], row["publish_count"]) == (None, 0, 0)
    assert driving.claim(flow.id, "w2") is None
    driving.pass_time(61)
    assert driving.claimed(flow.id, "w2").crash_count == 0


def test_standing_tells_revision_and_fence_together(store: SqlFlowStore, driving: Driving) -> None:
    flow = driving.start()
    claim = driving.claimed(flow.id)
    standing = store.run(dispatch.standing, flow.id)
    assert standing is not None
    assert (standing.revision, standing.status, standing.fence, standing.worker) == (2, "running", 1, "w1")
    assert (standing.cancel_requested, standing.paused) == (False, False)
    driving.end(claim)
    ended = store.run(dispatch.standing, flow.id)
    assert ended is not None
    assert (ended.status, ended.fence, ended.worker) == ("finished", None, None)
    assert store.run(dispatch.find_hint, str(flow.id)) is None
