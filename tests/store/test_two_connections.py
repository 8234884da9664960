"""Schedules of two PostgreSQL sessions: a statement that waited for a lock goes on with what is true by then.

A model that takes statements as atomic cannot show these: what matters is what a statement sees after its wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import sqlalchemy as sa

from celery_flows.store import (
    ExternalEventWait,
    Flow,
    FlowError,
    FlowManager,
    FlowStatus,
    FlowStepStatus,
    RevisionMismatch,
    SqlFlowStore,
    dispatch,
    inbox,
    transitions,
)
from celery_flows.store import operations as op
from celery_flows.store.changes import Change, Completion, Drive, End, Join, Member, Park, StepWrite, change_of
from celery_flows.store.engines import make_engine
from celery_flows.store.models import new_id
from celery_flows.store.tables import flow_dispatch, flow_inbox
from celery_flows.store.waits import event_key
from tests.support.crowd import at_once
from tests.support.driving import LEASE, Driving
from tests.support.fold import assert_whole
from tests.support.samples import NAMES, a_flow
from tests.support.sessions import Sessions


@pytest.fixture
def store(postgresql_url: str) -> Iterator[SqlFlowStore]:
    opened = SqlFlowStore(make_engine(postgresql_url))
    yield opened
    opened.close()


@pytest.fixture
def sessions(postgresql_url: str) -> Iterator[Sessions]:
    opened = Sessions(postgresql_url)
    yield opened
    opened.close()


def cancel(flow: Flow) -> Change:
    return change_of(flow, transitions.cancel(flow), drive=End())


def recording(flow: Flow) -> Change:
    step = StepWrite("s1", "reserve", FlowStepStatus.SUCCEEDED, 1, result="1")
    return Change(flow.id, flow.revision, "step_succeeded", {"current_step": "reserve"}, step=step, forgive=True)


# ---- claims ---------------------------------------------------------------------------------------------------------


def test_a_claim_that_waited_for_a_cancel_request_sees_it(sessions: Sessions, driving: Driving) -> None:
    flow = driving.start()
    with sessions.transaction() as canceller:
        FlowManager(driving.store.using(canceller)).request_cancel(flow.id)
        claiming = sessions.blocked(dispatch.claim_drive, flow.id, "w1", LEASE)
        canceller.commit()
    claim = claiming.result()
    assert (claim.flow.cancel_requested, claim.flow.revision, claim.wakes) == (True, 3, 1)
    assert_whole(driving.store, flow.id)


def test_a_claim_that_waited_for_a_hard_cancel_finds_no_row(sessions: Sessions, driving: Driving) -> None:
    flow = driving.start()
    with sessions.transaction() as canceller:
        FlowManager(driving.store.using(canceller)).cancel(flow.id)
        claiming = sessions.blocked(dispatch.claim_drive, flow.id, "w1", LEASE)
        canceller.commit()
    assert claiming.result() is None
    assert driving.rows() == []
    assert_whole(driving.store, flow.id)


def test_of_two_claims_one_wins(sessions: Sessions, driving: Driving) -> None:
    flow = driving.start()
    with sessions.transaction() as first:
        assert dispatch.claim_drive(first, flow.id, "w1", LEASE) is not None
        second = sessions.blocked(dispatch.claim_drive, flow.id, "w2", LEASE)
        first.commit()
    assert second.result() is None
    assert driving.row(flow.id)["worker"] == "w1"
    assert_whole(driving.store, flow.id)


def test_of_two_claims_of_a_step_one_wins(sessions: Sessions, driving: Driving) -> None:
    _, (run_id,) = driving.gathering(1)
    with sessions.transaction() as first:
        assert dispatch.claim_step(first, run_id, "s1", LEASE) is not None
        second = sessions.blocked(dispatch.claim_step, run_id, "s2", LEASE)
        first.commit()
    assert second.result() is None
    assert driving.row(run_id)["worker"] == "s1"


def test_a_record_in_flight_is_in_the_history_read_after_the_claim(sessions: Sessions, driving: Driving) -> None:
    flow = driving.start()
    claim = driving.claimed(flow.id, "overtaken")
    driving.pass_time(LEASE + 1)
    with sessions.transaction() as recorder:
        op.change_flow(recorder, recording(claim.flow))
        taking_over = sessions.blocked(dispatch.claim_drive, flow.id, "w2", LEASE)
        recorder.commit()
    taken = taking_over.result()
    assert taken is not None
    assert taken.flow.revision == claim.flow.revision + 2
    history = driving.store.run(dispatch.read_history, flow.id)
    assert [step.run_id for step in history] == ["s1"]
    assert_whole(driving.store, flow.id)


def test_a_record_that_waited_for_a_takeover_is_refused(sessions: Sessions, driving: Driving) -> None:
    flow = driving.start()
    claim = driving.claimed(flow.id, "overtaken")
    driving.pass_time(LEASE + 1)
    with sessions.transaction() as taker:
        assert dispatch.claim_drive(taker, flow.id, "w2", LEASE) is not None
        late = sessions.blocked(op.change_flow, recording(claim.flow))
        taker.commit()
    with pytest.raises(RevisionMismatch):
        late.result()
    assert driving.store.list_steps(flow.id) == []
    assert_whole(driving.store, flow.id)


def test_standing_never_pairs_a_fresh_revision_with_an_old_fence(sessions: Sessions, driving: Driving) -> None:
    """Reading it takes no lock, so it never waits; before the takeover's commit it tells the old pair, then the new."""
    flow = driving.start()
    driving.claimed(flow.id, "overtaken")
    driving.pass_time(LEASE + 1)
    with sessions.transaction() as taker:
        assert dispatch.claim_drive(taker, flow.id, "w2", LEASE) is not None
        before = driving.store.run(dispatch.standing, flow.id)
        taker.commit()
    after = driving.store.run(dispatch.standing, flow.id)
    assert before is not None
    assert after is not None
    assert (before.revision, before.fence) == (2, 1)
    assert (after.revision, after.fence) == (3, 2)


def test_a_late_release_that_waited_for_a_takeover_changes_nothing(sessions: Sessions, driving: Driving) -> None:
    """It skips what others hold and matches its own token, so it takes nobody's lease."""
    flow = driving.start()
    driving.claimed(flow.id, "dead/a")
    driving.pass_time(LEASE + 1)
    with sessions.transaction() as taker:
        assert dispatch.claim_drive(taker, flow.id, "w2", LEASE) is not None
        assert driving.store.run(dispatch.release, ["dead"]) == 0
        taker.commit()
    assert driving.store.run(dispatch.release, ["dead"]) == 0
    row = driving.row(flow.id)
    assert (row["worker"], row["crash_count"]) == ("w2", 1)


# ---- cancel against members -----------------------------------------------------------------------------------------


def test_a_cancel_that_waited_for_a_schedule_leaves_no_member(sessions: Sessions, driving: Driving) -> None:
    flow = driving.start()
    claim = driving.claimed(flow.id)
    members = tuple(Member(f"m{n}", "charge", n, "{}") for n in range(2))
    park = Park(claim.holder, claim.wakes, None, Join(1, 2, 0))
    schedule = Change(flow.id, claim.flow.revision, "step_scheduled", {}, members=members, drive=park)
    with sessions.transaction() as driver:
        op.change_flow(driver, schedule)
        cancelling = sessions.blocked(op.update_locked, flow.id, transitions.cancel)
        driver.commit()
    assert cancelling.result().status is FlowStatus.CANCELLED
    assert driving.rows() == []
    assert {step.status for step in driving.store.list_steps(flow.id)} == {FlowStepStatus.CANCELLED}
    assert_whole(driving.store, flow.id)


def test_a_stale_cancel_that_waited_for_a_schedule_is_refused_whole(sessions: Sessions, driving: Driving) -> None:
    flow = driving.start()
    claim = driving.claimed(flow.id)
    park = Park(claim.holder, claim.wakes, None, Join(1, 1, 0))
    schedule = Change(
        flow.id, claim.flow.revision, "step_scheduled", {}, members=(Member("m", "charge", 1, "{}"),), drive=park
    )
    with sessions.transaction() as driver:
        op.change_flow(driver, schedule)
        cancelling = sessions.blocked(op.change_flow, cancel(claim.flow))
        driver.commit()
    with pytest.raises(RevisionMismatch):
        cancelling.result()
    assert len(driving.rows()) == 2
    assert_whole(driving.store, flow.id)


def test_a_cancel_that_waited_for_a_completion_keeps_its_result(sessions: Sessions, driving: Driving) -> None:
    """The cancel draws its event's id first; the step's history still ends with what its row says."""
    flow, (run_id, idle) = driving.gathering(2)
    claim = driving.claim_step(run_id)
    assert claim is not None
    stored = driving.store.get(flow.id)
    assert stored is not None
    outcome = Completion(claim.holder, flow.id, FlowStepStatus.SUCCEEDED, result="1")
    with sessions.transaction() as worker:
        assert dispatch.complete_step(worker, outcome) is not None
        cancelling = sessions.blocked(op.change_flow, cancel(stored))
        worker.commit()
    assert cancelling.result()[0].status is FlowStatus.CANCELLED
    statuses = {step.run_id: step.status for step in driving.store.list_steps(flow.id)}
    assert statuses == {run_id: FlowStepStatus.SUCCEEDED, idle: FlowStepStatus.CANCELLED}
    assert driving.rows() == []
    assert_whole(driving.store, flow.id)


def test_a_completion_that_waited_for_a_cancel_is_refused_whole(sessions: Sessions, driving: Driving) -> None:
    flow, (run_id,) = driving.gathering(1)
    claim = driving.claim_step(run_id)
    assert claim is not None
    outcome = Completion(claim.holder, flow.id, FlowStepStatus.SUCCEEDED, result="1")
    with sessions.transaction() as canceller:
        FlowManager(driving.store.using(canceller)).cancel(flow.id)
        completing = sessions.blocked(dispatch.complete_step, outcome)
        canceller.commit()
    assert completing.result() is None
    (step,) = driving.store.list_steps(flow.id)
    assert (step.status, step.result_json) == (FlowStepStatus.CANCELLED, None)
    assert_whole(driving.store, flow.id)


def test_claim_and_cancel_take_their_locks_in_one_order(sessions: Sessions, driving: Driving) -> None:
    """Half a claim holds the flow; the cancel waits for it without holding the dispatch row that the claim needs."""
    flow = driving.start()
    with sessions.transaction() as claimer:
        claimer.execute(sa.text("SELECT id FROM flows WHERE id = :id FOR NO KEY UPDATE"), {"id": flow.id})
        cancelling = sessions.blocked(op.update_locked, flow.id, transitions.cancel)
        assert dispatch.claim_drive(claimer, flow.id, "w1", LEASE) is not None
        claimer.commit()
    assert cancelling.result().status is FlowStatus.CANCELLED
    assert_whole(driving.store, flow.id)


def test_many_claims_cancels_and_completions_never_deadlock(sessions: Sessions, driving: Driving) -> None:
    def once(operation: Callable[..., Any], *args: Any) -> Any:
        """The operation in one single transaction: a deadlock would not be tried again."""
        with sessions.engine.begin() as connection:
            return operation(connection, *args)

    def work(run_id: str) -> None:
        claim = once(dispatch.claim_step, run_id, "s1/a", LEASE)
        if claim is not None:
            once(dispatch.complete_step, Completion(claim.holder, claim.flow_id, FlowStepStatus.SUCCEEDED, "1"))

    for _ in range(8):
        flow, run_ids = driving.gathering(4)
        came = at_once(
            [
                *[partial(work, run_id) for run_id in run_ids],
                partial(once, op.update_locked, flow.id, transitions.request_cancel),
                partial(once, dispatch.claim_drive, flow.id, "w2/a", LEASE),
                partial(once, dispatch.sweep_due, 100, 10.0, 300.0),
                partial(once, dispatch.renew, ["s1", "w2"], LEASE),
                partial(once, op.update_locked, flow.id, transitions.cancel),
            ]
        )
        assert [error for error in came if isinstance(error, Exception) and not isinstance(error, FlowError)] == []
        assert driving.rows() == []
        assert_whole(driving.store, flow.id)


def test_a_locked_flow_lets_its_members_insert_their_events(sessions: Sessions, driving: Driving) -> None:
    flow, (run_id, _) = driving.gathering(2)
    claim = driving.claim_step(run_id)
    assert claim is not None
    with sessions.transaction() as holder:
        op.lock_flow(holder, flow.id)
        assert driving.complete(claim.holder, flow.id) is not None


# ---- joins and the sweep --------------------------------------------------------------------------------------------


def test_two_last_members_at_once_count_to_zero_and_wake_once(sessions: Sessions, driving: Driving) -> None:
    flow, run_ids = driving.gathering(2)
    claims = [driving.claim_step(run_id) for run_id in run_ids]
    outcomes = [
        Completion(claim.holder, flow.id, FlowStepStatus.SUCCEEDED, result="1") for claim in claims if claim is not None
    ]
    with sessions.transaction() as first:
        one = dispatch.complete_step(first, outcomes[0])
        waiting = sessions.blocked(dispatch.complete_step, outcomes[1])
        first.commit()
    other = waiting.result()
    assert one is not None
    assert (one.woke, other.woke) == (False, True)
    row = driving.row(flow.id)
    assert (row["open_members"], row["join_good"], row["wakes"]) == (0, 0, 1)
    assert_whole(driving.store, flow.id)


def test_a_park_that_waited_for_a_wake_is_due_at_once(sessions: Sessions, driving: Driving) -> None:
    flow = driving.start()
    claim = driving.claimed(flow.id)
    with sessions.transaction() as waker:
        FlowManager(driving.store.using(waker)).request_cancel(flow.id)
        parking = sessions.blocked(dispatch.park, Park(claim.holder, claim.wakes, None))
        waker.commit()
    assert parking.result() is True
    assert driving.row(flow.id)["due_at"] <= driving.now()


def test_two_sweeps_share_the_due_rows_and_wait_for_nobody(sessions: Sessions, driving: Driving) -> None:
    flows = {driving.start().id for _ in range(4)}
    driving.pass_time(60)
    with sessions.transaction() as first:
        taken = {row.hint.flow_id for row in dispatch.sweep_due(first, 2, 10.0, 300.0)}
        rest = {row.hint.flow_id for row in driving.sweep()}
        first.commit()
    assert len(taken) == 2
    assert rest == flows - taken


# ---- the inbox ------------------------------------------------------------------------------------------------------

WAIT = ExternalEventWait(topic="approval", correlation_id="1")
KEY = event_key("approval", "1")


def waiters_and_events(driving: Driving, count: int) -> list[Flow]:
    """So many flows that wait for the same event, longest waiting first, and so many events."""
    manager, flows = FlowManager(driving.store), []
    for n in range(count):
        flow = manager.create_mirrored(**NAMES)
        flows.append(manager.set_waiting(flow.id, WAIT))
        driving.emit("approval", "1", n, new_id())
    return flows


def payloads(driving: Driving, flows: list[Flow]) -> list[Any]:
    stored = [driving.store.get(flow.id) for flow in flows]
    return [flow.state_json.get("resume_event") for flow in stored if flow is not None]


def test_two_consumers_take_two_events_in_order(sessions: Sessions, driving: Driving) -> None:
    flows = waiters_and_events(driving, 2)
    with sessions.transaction() as first:
        assert inbox.hand_over_next(first, KEY) == flows[0].id
        second = sessions.blocked(inbox.hand_over_next, KEY)
        first.commit()
    assert second.result() == flows[1].id
    assert payloads(driving, flows) == [0, 1]
    for flow in flows:
        assert_whole(driving.store, flow.id)


def test_an_event_whose_consumer_rolls_back_goes_before_the_next(sessions: Sessions, driving: Driving) -> None:
    flows = waiters_and_events(driving, 2)
    with sessions.transaction() as first:
        assert inbox.hand_over_next(first, KEY) == flows[0].id
        second = sessions.blocked(inbox.hand_over_next, KEY)
        first.rollback()
    assert second.result() == flows[0].id
    assert payloads(driving, flows) == [0, None]


def test_an_event_goes_to_the_next_waiter_if_the_first_leaves_meanwhile(sessions: Sessions, driving: Driving) -> None:
    flows = waiters_and_events(driving, 2)
    with sessions.transaction() as leaver:
        FlowManager(driving.store.using(leaver)).cancel(flows[0].id)
        handing = sessions.blocked(inbox.hand_over_next, KEY)
        leaver.commit()
    assert handing.result() == flows[1].id
    assert payloads(driving, flows) == [None, 0]


def test_an_emit_waits_for_nobody(sessions: Sessions, driving: Driving) -> None:
    flows = waiters_and_events(driving, 1)
    with sessions.transaction() as busy:
        op.lock_flow(busy, flows[0].id)
        busy.execute(sa.select(flow_inbox).with_for_update())
        assert driving.emit("approval", "1", 2, new_id())


# ---- start by key ---------------------------------------------------------------------------------------------------


def keyed() -> Flow:
    return a_flow(idempotency_key="order-1")


def test_a_second_start_waits_for_the_first_and_finds_it(sessions: Sessions, driving: Driving) -> None:
    first, second = keyed(), keyed()
    with sessions.transaction() as caller:
        assert op.create_flow(caller, first, {}, Drive("orders/fulfil"))
        starting = sessions.blocked(op.create_flow, second, {}, Drive("orders/fulfil"))
        caller.commit()
    assert starting.result() is False
    found = driving.store.run(op.find_by_key, "orders/fulfil", "order-1")
    assert found is not None
    assert found.id == first.id
    assert [row["run_id"] for row in driving.rows()] == [str(first.id)]


def test_a_second_start_goes_ahead_if_the_first_is_rolled_back(sessions: Sessions, driving: Driving) -> None:
    first, second = keyed(), keyed()
    with sessions.transaction() as caller:
        assert op.create_flow(caller, first, {}, Drive("orders/fulfil"))
        starting = sessions.blocked(op.create_flow, second, {}, Drive("orders/fulfil"))
        caller.rollback()
    assert starting.result() is True
    assert driving.store.get(first.id) is None
    assert driving.row(second.id)["task"] == "orders/fulfil"
    assert_whole(driving.store, second.id)


def test_crossing_keys_deadlock_one_of_two_callers_and_leave_no_trace_of_it(
    sessions: Sessions, driving: Driving
) -> None:
    def start(connection: sa.Connection, key: str) -> bool:
        return op.create_flow(connection, a_flow(idempotency_key=key), {})

    with sessions.transaction() as caller:
        assert start(caller, "a")

        def crossing(other: sa.Connection) -> tuple[bool, bool]:
            return start(other, "b"), start(other, "a")

        waiting = sessions.blocked(crossing)
        with pytest.raises(sa.exc.OperationalError) as caught:  # whichever of the two the database ends
            (start(caller, "b"), waiting.result())
        assert "deadlock" in str(caught.value.orig)
        caller.rollback()
    kept = driving.store.list_by_owner("tenant:acme")
    assert len(kept) in (0, 2)
    assert driving.rows(flow_dispatch.c.kind == "drive") == []
