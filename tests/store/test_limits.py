"""Slots of limits, over each database; and on PostgreSQL, by many at the same moment."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Event
from uuid import UUID

import pytest
import sqlalchemy as sa

from celery_flows.store import Flow, FlowManager, SqlFlowStore, dispatch, limits
from celery_flows.store import operations as op
from celery_flows.store.changes import Drive
from celery_flows.store.engines import make_engine
from celery_flows.store.limits import AT_ONCE, POLL_SECONDS, RATE_POLL_SECONDS, Bounds
from celery_flows.store.tables import flow_dispatch, flow_limits
from tests.support.crowd import at_once
from tests.support.driving import Driving
from tests.support.samples import a_flow
from tests.support.sessions import Sessions

KEY, PAUSE = "orders", 5.0
_d = flow_dispatch.c


def start(store: SqlFlowStore) -> Flow:
    """A new flow under the limit, as published."""
    flow = a_flow()
    assert store.run(op.create_flow, flow, {}, Drive("orders/fulfil", first_pause=PAUSE, limit_key=KEY))
    return flow


def admit(store: SqlFlowStore, flow: Flow, bounds: Bounds, urgency: int = 0) -> bool:
    return store.run(limits.admit, flow.id, bounds, urgency, PAUSE).has_slot


def settle(store: SqlFlowStore, bounds: Bounds) -> list[UUID]:
    return [hint.flow_id for hint in store.run(limits.settle, KEY, "orders/fulfil", bounds, PAUSE)]


def with_slot(store: SqlFlowStore) -> int:
    with store.engine.connect() as connection:
        return connection.scalar(sa.select(sa.func.count()).where(_d.has_slot)) or 0


def seconds_until_looked(store: SqlFlowStore) -> float | None:
    """How long until somebody looks at the limit again; None: it is out of use."""
    with store.engine.connect() as connection:
        due_at = connection.scalar(sa.select(flow_limits.c.due_at))
        return None if due_at is None else (due_at - op.now(connection)).total_seconds()


# ---- over each database ---------------------------------------------------------------------------------------------


def test_without_a_slot_nothing_is_claimed_and_with_it_at_once(driving: Driving) -> None:
    flow = start(driving.store)
    assert driving.claim(flow.id) is None
    waiting = driving.store.run(limits.find_waiting, flow.id)
    assert waiting is not None
    assert (waiting.definition, waiting.priority) == ("orders/fulfil", None)
    assert admit(driving.store, flow, Bounds(1))
    assert driving.store.run(limits.find_waiting, flow.id) is None
    claim = driving.claimed(flow.id)
    assert (claim.limit_key, claim.began) == (KEY, True)


def test_asked_again_after_a_lost_reply_it_has_the_slot_it_was_given(driving: Driving) -> None:
    flow = start(driving.store)
    bounds = Bounds(1, starts=2, window_seconds=60)
    assert [admit(driving.store, flow, bounds) for _ in range(3)] == [True] * 3
    with driving.store.engine.connect() as connection:
        (starts,) = connection.scalars(sa.select(flow_limits.c.recent_starts))
    assert len(starts) == 1


def test_in_the_queue_no_message_claims_it_and_its_place_is_kept(driving: Driving) -> None:
    first, second = start(driving.store), start(driving.store)
    admit(driving.store, first, Bounds(1))
    assert not admit(driving.store, second, Bounds(1))
    row = driving.row(second.id)
    assert (row["due_at"], row["publish_count"], row["has_slot"]) == (None, 0, False)
    assert driving.store.run(limits.find_waiting, second.id) is None, "a duplicate message costs one look"
    FlowManager(driving.store).request_cancel(first.id)
    driving.store.run(dispatch.sweep_due, 10, PAUSE, 60.0)
    assert driving.row(second.id)["queued_at"] == row["queued_at"]
    assert seconds_until_looked(driving.store) == pytest.approx(POLL_SECONDS, abs=0.9)


def test_the_next_ones_are_the_most_urgent_and_then_the_oldest(driving: Driving) -> None:
    holder, *others = (start(driving.store) for _ in range(5))
    admit(driving.store, holder, Bounds(1))
    for flow, urgency in zip(others, (0, -9, 0, 9), strict=True):
        admit(driving.store, flow, Bounds(1), urgency)
    assert settle(driving.store, Bounds(4)) == [others[1].id, others[0].id, others[2].id]


@pytest.mark.parametrize("keeps", [True, False])
def test_a_park_frees_the_slot_unless_it_is_kept_or_somebody_called(driving: Driving, keeps: bool) -> None:
    quiet, called = start(driving.store), start(driving.store)
    for flow in quiet, called:
        admit(driving.store, flow, Bounds(2))
    claims = [driving.claimed(flow.id) for flow in (quiet, called)]
    FlowManager(driving.store).request_cancel(called.id)
    for claim in claims:
        driving.park(claim, keeps_slot=keeps)
    assert [driving.row(flow.id)["has_slot"] for flow in (quiet, called)] == [keeps, True]


def test_more_than_fit_into_one_transaction_follow_at_once(driving: Driving) -> None:
    flows = [start(driving.store) for _ in range(AT_ONCE + 2)]
    for flow in flows:
        admit(driving.store, flow, Bounds(0))
    assert len(settle(driving.store, Bounds())) == AT_ONCE
    assert (seconds_until_looked(driving.store) or 0) <= 0
    assert len(settle(driving.store, Bounds())) == 2


@pytest.mark.parametrize(("window", "expected"), [(9.0, 9.0), (3600.0, RATE_POLL_SECONDS)])
def test_a_rate_says_when_somebody_must_look_again(driving: Driving, window: float, expected: float) -> None:
    bounds = Bounds(starts=2, window_seconds=window)
    assert [admit(driving.store, start(driving.store), bounds) for _ in range(3)] == [True, True, False]
    assert seconds_until_looked(driving.store) == pytest.approx(expected, abs=2)


def test_a_cancel_and_a_deadline_need_no_slot(driving: Driving) -> None:
    cancelled = start(driving.store)
    FlowManager(driving.store).request_cancel(cancelled.id)
    assert not admit(driving.store, cancelled, Bounds(1))
    assert driving.claimed(cancelled.id).flow.cancel_requested
    late = a_flow(deadline_at=driving.now())
    drive = Drive("orders/fulfil", first_pause=PAUSE, limit_key=KEY)
    assert driving.store.run(op.create_flow, late, {}, drive)
    assert not admit(driving.store, late, Bounds(1))
    driving.claimed(late.id)
    assert with_slot(driving.store) == 0


# ---- by many at the same moment -------------------------------------------------------------------------------------


@pytest.fixture
def crowded(postgresql_url: str) -> Iterator[SqlFlowStore]:
    engine = make_engine(postgresql_url)
    opened = SqlFlowStore(engine)
    yield opened
    opened.close()


def test_of_many_who_ask_at_once_so_many_are_let_in(crowded: SqlFlowStore) -> None:
    flows = [start(crowded) for _ in range(12)]
    had = at_once([partial(admit, crowded, flow, Bounds(3)) for flow in flows])
    assert all(isinstance(answer, bool) for answer in had), had
    assert with_slot(crowded) == 3


def test_never_too_many_and_none_is_left_behind(crowded: SqlFlowStore) -> None:
    """Workers as they are: asked, at work, ended, and the slot given on; watched all the while."""
    most, over = 3, Event()
    flows = [start(crowded) for _ in range(40)]
    driving, seen = Driving(crowded), []

    def watch() -> None:
        while not over.is_set():
            seen.append(with_slot(crowded))

    def work(flow: Flow) -> None:
        if driving.claim(flow.id, f"w{flow.id}") is None:
            admit(crowded, flow, Bounds(most))

    def end_all() -> None:
        claimable = sa.select(_d.flow_id).where(_d.has_slot, _d.worker.is_(None), _d.publish_count > 0)
        with crowded.engine.connect() as connection:
            found = connection.scalars(claimable).all()
        for flow_id in found:
            if (claim := driving.claim(flow_id, f"w{flow_id}")) is not None:
                driving.end(claim)
                settle(crowded, Bounds(most))

    with ThreadPoolExecutor(5) as threads:
        watching = threads.submit(watch)
        list(threads.map(work, flows))
        for _ in range(len(flows)):
            done = [threads.submit(end_all) for _ in range(3)]
            for each in done:
                each.result()
            if not driving.rows():
                break
        over.set()
        watching.result()
    assert driving.rows() == [], "somebody was left in the queue"
    assert (max(seen), seconds_until_looked(crowded)) == (most, None)


@pytest.fixture
def sessions(postgresql_url: str) -> Iterator[Sessions]:
    opened = Sessions(postgresql_url)
    yield opened
    opened.close()


def test_who_waited_for_the_limits_lock_counts_what_was_given_meanwhile(
    sessions: Sessions, crowded: SqlFlowStore
) -> None:
    first, second = start(crowded), start(crowded)
    with sessions.transaction() as giver:
        assert limits.admit(giver, first.id, Bounds(1), 0, PAUSE).has_slot
        asking = sessions.blocked(limits.admit, second.id, Bounds(1), 0, PAUSE)
        giver.commit()
    assert not asking.result().has_slot
    assert with_slot(crowded) == 1


def test_who_queues_while_the_limit_goes_out_of_use_makes_it_anew(sessions: Sessions, crowded: SqlFlowStore) -> None:
    flow = start(crowded)
    with sessions.transaction() as last:
        assert limits.settle(last, KEY, "orders/fulfil", Bounds(1), PAUSE) == []
        last.commit()
    assert seconds_until_looked(crowded) is None
    with sessions.transaction() as giver:
        limits._lock(giver, KEY, "orders/fulfil")
        asking = sessions.blocked(limits.admit, flow.id, Bounds(1), 0, PAUSE)
        giver.execute(sa.delete(flow_limits))
        giver.commit()
    assert asking.result().has_slot
    assert seconds_until_looked(crowded) is not None


def test_a_cancel_under_way_is_waited_for_and_seen(sessions: Sessions, crowded: SqlFlowStore) -> None:
    """Else it would call the flow before it queues, and who queues is not called."""
    flow, driving = start(crowded), Driving(crowded)
    with sessions.transaction() as canceller:
        FlowManager(crowded.using(canceller)).request_cancel(flow.id)
        asking = sessions.blocked(limits.admit, flow.id, Bounds(0), 0, PAUSE)
        canceller.commit()
    assert not asking.result().has_slot
    assert driving.claimed(flow.id).flow.cancel_requested


def test_who_is_next_and_held_by_a_callers_open_transaction_is_passed_over(
    sessions: Sessions, crowded: SqlFlowStore
) -> None:
    first, second = start(crowded), start(crowded)
    for flow in first, second:
        admit(crowded, flow, Bounds(0))
    with sessions.transaction() as caller:
        FlowManager(crowded.using(caller)).request_cancel(first.id)
        assert settle(crowded, Bounds(1)) == [second.id]
        caller.commit()
    assert Driving(crowded).claimed(first.id).flow.cancel_requested
