"""Limits: who may be at work, who is next, and that no slot is lost."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa
from pydantic import BaseModel

from celery_flows import FlowDefinition, FlowHandle, InvalidData, Limit, Retry, Run
from celery_flows.store import FlowStatus, dispatch, limits
from celery_flows.store.tables import flow_dispatch, flow_events, flow_heartbeats, flow_limits, flows
from celery_flows.tasks import runtime as runtime_module
from celery_flows.tasks import slots as of_schedules
from tests.integration.conftest import MakeBench
from tests.support.bench import Bench

HOUR, MINUTE = timedelta(hours=1), timedelta(minutes=1)

_d = flow_dispatch.c


class Order(BaseModel):
    id: str
    tenant: str = "acme"


def sleeping(bench: Bench, name: str = "orders/fulfil", **options: Any) -> FlowDefinition[str, str]:
    """A limited flow of two steps with a wait in between."""

    @bench.flows.flow(name, **options)
    def fulfil(run: Run, order: str) -> str:
        run.step(bench.effects.append, f"{order} begins")
        run.wait_for("paid", order)
        run.step(bench.effects.append, f"{order} ends")
        return order

    return fulfil


def calling(bench: Bench, **options: Any) -> FlowDefinition[str, str]:
    """A limited flow with a Celery step, at which it can be held."""

    @bench.task("charge")
    def charge(order: str) -> str:
        bench.effects.append(order)
        return order

    @bench.flows.flow("orders/charge", **options)
    def fulfil(run: Run, order: str) -> str:
        return run.step(charge, order)

    return fulfil


def slots(bench: Bench) -> set[UUID]:
    return {row.flow_id for row in bench.query(sa.select(_d.flow_id).where(_d.has_slot))}


def queued(bench: Bench) -> list[UUID]:
    """Those who queue, the next one first."""
    queue = sa.select(_d.flow_id).where(_d.queued_at.isnot(None)).order_by(_d.urgency, _d.queued_at)
    return [row.flow_id for row in bench.query(queue)]


def kept_limits(bench: Bench) -> list[Any]:
    return bench.query(sa.select(flow_limits))


def drive_all(bench: Bench, handles: list[FlowHandle[Any]]) -> None:
    for handle in handles:
        bench.drive(handle.id)


# ---- how many at once -----------------------------------------------------------------------------------------------


def test_so_many_are_at_work_and_the_others_queue_in_the_order_they_came(bench: Bench) -> None:
    flow = calling(bench, limit=Limit(2))
    handles = [flow.start(str(n)) for n in range(5)]
    drive_all(bench, handles)
    assert slots(bench) == {handles[0].id, handles[1].id}
    assert queued(bench) == [handle.id for handle in handles[2:]]
    members = [("step", row.run_id) for handle in handles[:2] for row in bench.rows(handle.id)[1:]]
    assert bench.claimable() == sorted(members)
    bench.work()
    assert sorted(bench.effects) == ["0", "1", "2", "3", "4"]
    assert (slots(bench), queued(bench), kept_limits(bench)) == (set(), [], [])


def test_a_key_of_the_input_has_a_limit_of_its_own(bench: Bench) -> None:
    @bench.flows.flow("orders/fulfil", limit=Limit(1, per=lambda order: order.tenant))
    def fulfil(run: Run, order: Order) -> None:
        run.gather([hold.s(order.id)])

    @bench.task("hold")
    def hold(order: str) -> None:
        bench.effects.append(order)

    handles = [fulfil.start(Order(id=str(n), tenant=tenant)) for n, tenant in enumerate(("a", "a", "b", "b"))]
    drive_all(bench, handles)
    assert slots(bench) == {handles[0].id, handles[2].id}
    bench.work()
    assert sorted(bench.effects) == ["0", "1", "2", "3"]


def test_definitions_share_nothing(bench: Bench) -> None:
    handles = [sleeping(bench, name, limit=Limit(1)).start("x") for name in ("orders/a", "orders/b")]
    keys = {bench.rows(handle.id)[0].limit_key for handle in handles}
    assert keys == {'["orders/a"]', '["orders/b"]'}


def test_who_waits_for_what_is_not_his_own_work_frees_the_slot(bench: Bench) -> None:
    flow = sleeping(bench, limit=Limit(1))
    first, second = flow.start("one"), flow.start("two")
    drive_all(bench, [first, second])
    assert bench.effects == ["one begins", "two begins"]
    assert (slots(bench), queued(bench)) == (set(), [])
    bench.flows.emit("paid", "one")
    bench.flows.emit("paid", "two")
    bench.work()
    assert bench.effects[2:] == ["one ends", "two ends"]


def test_who_waits_for_celery_steps_of_his_own_keeps_it(bench: Bench) -> None:
    flow = calling(bench, limit=Limit(1))
    first, second = flow.start("one"), flow.start("two")
    drive_all(bench, [first, second])
    assert (slots(bench), queued(bench)) == ({first.id}, [second.id])
    assert bench.rows(first.id)[0].worker is None
    bench.work()
    assert [first.result(0), second.result(0)] == ["one", "two"]


def test_a_parent_and_its_children_of_one_limit_do_not_wait_for_each_other(bench: Bench) -> None:
    @bench.flows.flow("tree", limit=Limit(1))
    def tree(run: Run, depth: int) -> int:
        run.step(bench.effects.append, depth)
        return depth + (sum(run.gather([tree.s(depth - 1), tree.s(depth - 1)])) if depth else 0)

    assert bench.finish(tree.start(2)) == 4
    assert kept_limits(bench) == []


def test_children_are_limited_as_other_flows_are(bench: Bench) -> None:
    child = calling(bench, limit=Limit(2))

    @bench.flows.flow("parent")
    def parent(run: Run) -> list[str]:
        return run.gather(child.s(str(n)) for n in range(5))

    handle = parent.start()
    bench.drive(handle.id)
    drives = [UUID(run_id) for kind, run_id in bench.claimable() if kind == "drive"]
    for flow_id in drives:
        bench.drive(flow_id)
    assert (len(slots(bench)), len(queued(bench))) == (2, 3)
    assert bench.finish(handle) == [str(n) for n in range(5)]


def test_a_pause_before_a_retry_frees_the_slot(bench: Bench) -> None:
    @bench.flows.flow("flaky", limit=Limit(1), retry=Retry(2, initial=timedelta(seconds=1), jitter=False))
    def flaky(run: Run, order: str) -> str:
        return run.step(once, order)

    def once(order: str) -> str:
        bench.effects.append(order)
        if bench.effects.count(order) == 1:
            raise RuntimeError(order)
        return order

    handles = [flaky.start(order) for order in ("one", "two")]
    bench.work()
    assert (bench.effects, slots(bench)) == (["one", "two"], set())
    assert [bench.finish(handle) for handle in handles] == ["one", "two"]


def test_a_flow_that_goes_on_as_another_queues_like_any_new_one(bench: Bench) -> None:
    @bench.flows.flow("again", limit=Limit(1))
    def again(run: Run, left: int) -> int:
        run.step(bench.effects.append, left)
        if left:
            run.restart_as(left - 1)
        return left

    assert bench.finish(again.start(2)) == 0
    assert (bench.effects, kept_limits(bench)) == ([2, 1, 0], [])


def test_flows_that_are_started_together_or_later_are_limited_too(bench: Bench) -> None:
    flow = calling(bench, limit=Limit(1))
    handles = [*flow.start_many(["a", "b", "c"]), flow.start("d", countdown=HOUR)]
    assert len({bench.rows(handle.id)[0].limit_key for handle in handles}) == 1
    bench.pass_time()
    bench.sweep()
    drive_all(bench, handles)
    assert (len(slots(bench)), len(queued(bench))) == (1, 3)
    bench.work()
    assert sorted(bench.effects) == ["a", "b", "c", "d"]


def test_slots_of_a_schedule_are_limited_by_their_time(bench: Bench) -> None:
    @bench.flows.flow("hourly", schedule=HOUR, limit=Limit(1, per=lambda slot: slot.hour))
    def hourly(run: Run, slot: datetime) -> int:
        return slot.hour

    of_schedules.start_due(bench.runtime)
    with bench.store.engine.begin() as connection:
        last = {"slot": "2020-01-01T00:00:00+00:00", "flow": None}
        connection.execute(
            sa.update(flow_heartbeats).where(flow_heartbeats.c.name == "schedule hourly").values(report=last)
        )
    assert of_schedules.start_due(bench.runtime) >= 1  # two, if the hour strikes just now
    for flow_id, hour in bench.query(sa.select(flows.c.id, flows.c.input_json)):
        assert bench.rows(flow_id)[0].limit_key == f'["hourly", {datetime.fromisoformat(hour).hour}]'
    bench.work()


# ---- no slot is lost ------------------------------------------------------------------------------------------------


def test_after_a_crash_the_flow_still_has_its_slot_and_frees_it(bench: Bench) -> None:
    flow = calling(bench, limit=Limit(1))
    lost, other = flow.start("lost"), flow.start("other")
    assert bench.store.run(dispatch.claim_drive, lost.id, "w", 30.0) is None, "it has no slot yet"
    bench.store.run(limits.admit, lost.id, limits.Bounds(1), 0, 5.0)
    assert bench.store.run(dispatch.claim_drive, lost.id, "w", 30.0) is not None
    bench.drive(other.id)
    assert (slots(bench), queued(bench)) == ({lost.id}, [other.id])
    bench.end_leases()  # and w is never heard of again
    bench.sweep()
    assert (slots(bench), queued(bench)) == ({lost.id}, [other.id]), "nobody else is let in while it may still run"
    bench.work()
    assert bench.effects == ["lost", "other"]
    assert "reclaimed" in bench.kinds(lost.id)


def test_a_slot_that_nobody_gave_on_is_given_on_by_a_sweep(bench: Bench) -> None:
    flow = calling(bench, limit=Limit(1))
    first, second = flow.start("first"), flow.start("second")
    drive_all(bench, [first, second])
    bench.flows.manager.cancel(first.id)  # knows of no limits
    assert (slots(bench), bench.claimable()) == (set(), [])
    assert bench.sweep().admitted == 0, "it is not time to look again"
    bench.pass_time()
    assert bench.sweep().admitted == 1
    assert slots(bench) == {second.id}
    bench.work()
    assert bench.effects == ["second"]


def test_a_slot_that_was_given_and_whose_message_was_lost_is_offered_again(bench: Bench) -> None:
    flow = calling(bench, limit=Limit(1))
    first, second = flow.start("first"), flow.start("second")
    drive_all(bench, [first, second])
    bench.flows.manager.cancel(first.id)
    bench.pass_time()
    bench.sweep()
    bench.messages()  # taken, and lost
    bench.pass_time()
    assert bench.sweep().published >= 1
    assert str(second.id) in {message.id for message in bench.messages()}


def test_a_cancel_of_one_that_queues_needs_no_slot(bench: Bench) -> None:
    flow = calling(bench, limit=Limit(1))
    first, second = flow.start("first"), flow.start("second")
    drive_all(bench, [first, second])
    second.cancel()
    bench.drive(second.id)
    assert second.status() is FlowStatus.CANCELLED
    assert (slots(bench), queued(bench)) == ({first.id}, [])
    bench.work()


def test_a_deadline_strikes_in_the_queue(bench: Bench) -> None:
    flow = calling(bench, limit=Limit(1), timeout=HOUR)
    first, second = flow.start("first"), flow.start("second")
    drive_all(bench, [first, second])
    deadline = second.get().deadline_at
    assert bench.rows(second.id)[0].due_at == deadline
    past = datetime.fromisoformat("2020-01-01T00:00:00+00:00")
    with bench.store.engine.begin() as connection:
        connection.execute(sa.update(flow_dispatch).where(_d.run_id == str(second.id)).values(due_at=past))
        revised = sa.update(flows).where(flows.c.id == second.id).values(deadline_at=past)
        connection.execute(revised)
    bench.sweep()
    bench.drive(second.id)
    assert second.status() is FlowStatus.FAILED
    assert slots(bench) == {first.id}
    with bench.store.engine.begin() as connection:  # or its history would not be whole
        connection.execute(sa.update(flows).where(flows.c.id == second.id).values(deadline_at=deadline))
    bench.work()


def test_one_that_is_paused_in_the_queue_lets_the_others_pass(bench: Bench) -> None:
    flow = calling(bench, limit=Limit(1))
    handles = [flow.start(order) for order in ("first", "second", "third")]
    drive_all(bench, handles)
    handles[1].pause()
    bench.work()
    assert bench.effects == ["first", "third"]
    assert queued(bench) == [handles[1].id]
    handles[1].unpause()
    bench.work()
    assert bench.effects == ["first", "third", "second"]
    assert kept_limits(bench) == []


def test_one_that_is_paused_with_a_slot_that_nobody_uses_frees_it(bench: Bench) -> None:
    flow = calling(bench, limit=Limit(1))
    first, second = flow.start("first"), flow.start("second")
    bench.store.run(limits.admit, first.id, limits.Bounds(1), 0, 5.0)
    first.pause()
    bench.drive(second.id)
    (step,) = [row.run_id for row in bench.rows(second.id)[1:]]
    bench.run_step(step)
    assert bench.effects == ["second"]
    first.unpause()
    bench.work()
    assert bench.effects == ["second", "first"]


def test_a_worker_that_stops_leaves_the_flow_its_slot(bench: Bench) -> None:
    flow = calling(bench, limit=Limit(1))
    first, second = flow.start("first"), flow.start("second")
    bench.store.run(limits.admit, first.id, limits.Bounds(1), 0, 5.0)
    claim = bench.store.run(dispatch.claim_drive, first.id, "w", 30.0)
    assert claim is not None
    assert bench.store.run(dispatch.hand_back, claim.holder)
    bench.drive(second.id)
    assert (slots(bench), queued(bench)) == ({first.id}, [second.id])
    bench.work()


def test_one_that_is_put_off_for_long_frees_its_slot(bench: Bench) -> None:
    flow = calling(bench, limit=Limit(1))
    first = flow.start("first")
    bench.store.run(limits.admit, first.id, limits.Bounds(1), 0, 5.0)
    claim = bench.store.run(dispatch.claim_drive, first.id, "w", 30.0)
    assert claim is not None
    assert bench.store.run(dispatch.hand_back, claim.holder, 60.0)
    assert slots(bench) == set()
    bench.pass_time()
    bench.work()


def test_a_limit_that_is_out_of_use_leaves_nothing_behind(bench: Bench) -> None:
    flow = calling(bench, limit=Limit(1, per=str))
    handles = [flow.start(str(n)) for n in range(3)]
    drive_all(bench, handles)
    assert len(kept_limits(bench)) == 3
    bench.work()
    assert kept_limits(bench) == []


def test_a_limit_whose_definition_nobody_knows_any_more_is_pruned(bench: Bench) -> None:
    bench.store.run(limits.settle, "gone", "gone", limits.Bounds(starts=5, window_seconds=9.0), 5.0)
    past = datetime.fromisoformat("2020-01-01T00:00:00+00:00")
    with bench.store.engine.begin() as connection:
        row = {"key": "left", "definition": "gone", "due_at": past, "recent_starts": [1.5]}
        connection.execute(sa.insert(flow_limits).values(row))
    bench.sweep()
    assert [row.key for row in kept_limits(bench)] == ["left"]
    assert bench.store.run(limits.prune) == 1


# ---- what the code says now -----------------------------------------------------------------------------------------


def test_a_limit_that_is_lifted_lets_all_who_queue_through(make_bench: MakeBench) -> None:
    before, after = make_bench(), make_bench()
    flow = calling(before, limit=Limit(1))
    calling(after)
    drive_all(before, [flow.start(str(n)) for n in range(4)])
    assert len(queued(before)) == 3
    after.pass_time()
    assert after.sweep().admitted == 3
    after.work()
    assert sorted(after.effects) == ["0", "1", "2", "3"]


def test_a_limit_that_is_lowered_holds_once_those_before_it_are_done(make_bench: MakeBench) -> None:
    before, after = make_bench(), make_bench()
    flow = calling(before, limit=Limit(3))
    calling(after, limit=Limit(1))
    drive_all(before, [flow.start(str(n)) for n in range(5)])
    assert len(slots(before)) == 3
    after.pass_time()
    assert after.sweep().admitted == 0
    most = 0
    for _ in range(20):
        for kind, run_id in after.claimable()[:1]:
            after.drive(UUID(run_id)) if kind == "drive" else after.run_step(run_id)
        if len(after.effects) > 2:
            most = max(most, len(slots(after)))
    assert most == 1
    assert sorted(after.effects) == ["0", "1", "2", "3", "4"]


def test_a_worker_that_does_not_know_the_definition_leaves_it_to_another(make_bench: MakeBench) -> None:
    knows, other = make_bench(), make_bench()
    handle = calling(knows, limit=Limit(1)).start("x")
    other.drive(handle.id)
    assert (slots(knows), queued(knows)) == (set(), [])
    assert other.claimable() != []
    knows.work()
    assert handle.result(0) == "x"


# ---- priority -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("broker", "order"), [("amqp://", ["9", "5", "none"]), ("redis://", ["none", "5", "9"])])
def test_the_most_urgent_are_next_as_the_broker_has_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, broker: str, order: list[str]
) -> None:
    monkeypatch.setattr(runtime_module, "broker_scheme", lambda app: broker.partition(":")[0])
    flow = calling(bench, limit=Limit(1))
    handles = [flow.start("first"), flow.start("5", priority=5), flow.start("none"), flow.start("9", priority=9)]
    drive_all(bench, handles)
    bench.work()
    assert bench.effects == ["first", *order]


# ---- how many within a time -----------------------------------------------------------------------------------------


def moved(connection: sa.Connection, entry: float | str, back: timedelta) -> float | str:
    """A start in a limit's log, so much earlier; of a flow that has not begun, as it is."""
    if isinstance(entry, str):
        mine = sa.and_(flow_events.c.flow_id == UUID(entry), flow_events.c.kind == "started")
        at: datetime | None = connection.scalar(sa.select(flow_events.c.at).where(mine))
        return entry if at is None else (at - back).timestamp()
    return entry - back.total_seconds()


def move_starts(bench: Bench, back: timedelta) -> None:
    """As if so much time had passed, for limits."""
    with bench.store.engine.begin() as connection:
        for row in connection.execute(sa.select(flow_limits)).all():
            log = [moved(connection, entry, back) for entry in row.recent_starts]
            values = {"recent_starts": log, "due_at": row.due_at - back}
            connection.execute(sa.update(flow_limits).where(flow_limits.c.key == row.key).values(values))


def test_so_many_begin_within_any_window(bench: Bench) -> None:
    flow = sleeping(bench, limit=Limit(2, every=MINUTE))
    handles = [flow.start(str(n)) for n in range(5)]
    bench.work()
    assert bench.effects == ["0 begins", "1 begins"]
    move_starts(bench, MINUTE - timedelta(seconds=5))
    assert bench.sweep().admitted == 0
    move_starts(bench, timedelta(seconds=6))
    assert bench.sweep().admitted == 2
    bench.work()
    assert bench.effects == [f"{n} begins" for n in range(4)]
    assert queued(bench) == [handles[4].id]


def test_what_was_let_begin_while_no_worker_was_free_does_not_begin_at_once(bench: Bench) -> None:
    """Slots were given as the time went on, and as many began together as had piled up."""
    flow = sleeping(bench, limit=Limit(2, every=MINUTE))
    handles = [flow.start(str(n)) for n in range(6)]
    drive_all(bench, handles[:4])
    assert bench.effects == ["0 begins", "1 begins"]
    for _ in range(3):
        move_starts(bench, MINUTE)
        bench.sweep()
    assert len(slots(bench)) == 2, "they have not begun: they count as if they did now"
    bench.work()
    assert bench.effects == [f"{n} begins" for n in range(4)]
    move_starts(bench, MINUTE)
    bench.sweep()
    bench.work()
    assert bench.effects == [f"{n} begins" for n in range(6)]


def test_going_on_is_no_start(bench: Bench) -> None:
    flow = sleeping(bench, limit=Limit(2, every=HOUR))
    handles = [flow.start(str(n)) for n in range(3)]
    bench.work()
    bench.flows.emit("paid", "0")
    bench.work()
    assert handles[0].status() is FlowStatus.FINISHED
    assert bench.effects == ["0 begins", "1 begins", "0 ends"]


def test_a_rate_and_a_number_at_once_hold_together(bench: Bench) -> None:
    flow = calling(bench, limit=Limit(3, every=HOUR, at_once=2))
    handles = [flow.start(str(n)) for n in range(5)]
    drive_all(bench, handles)
    assert slots(bench) == {handles[0].id, handles[1].id}
    bench.work()
    assert sorted(bench.effects) == ["0", "1", "2"]
    assert (slots(bench), len(queued(bench))) == (set(), 2)
    (limit,) = kept_limits(bench)
    assert len(limit.recent_starts) == 3
    move_starts(bench, HOUR)
    bench.sweep()
    bench.work()
    assert sorted(bench.effects) == ["0", "1", "2", "3", "4"]
    assert len(kept_limits(bench)) == 1, "its starts still count"
    move_starts(bench, 2 * HOUR)
    bench.sweep()
    assert kept_limits(bench) == []


def test_begun_flows_pass_those_that_may_not_begin_yet(bench: Bench) -> None:
    flow = sleeping(bench, limit=Limit(1, every=HOUR, at_once=1))
    handles = [flow.start(str(n)) for n in range(3)]
    bench.work()
    bench.flows.emit("paid", "0")
    bench.work()
    assert handles[0].status() is FlowStatus.FINISHED
    assert queued(bench) == [handles[1].id, handles[2].id]


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Limit(0), "limit: must be a whole number from 1"),
        (lambda: Limit(True), "limit: must be a whole number from 1"),
        (lambda: Limit(2.5), "limit: must be a whole number from 1"),  # type: ignore[arg-type]
        (lambda: Limit(3, at_once=2), "limit at_once: goes with every="),
        (lambda: Limit(3, every=MINUTE, at_once=0), "limit at_once: must be a whole number from 1"),
        (lambda: Limit(3, every=timedelta(0)), "limit every: must be a timedelta"),
        (lambda: Limit(3, every=60), "limit every: must be a timedelta"),  # type: ignore[arg-type]
        (lambda: Limit(1001, every=MINUTE), "limit: is 1001 within a time; 1000 are allowed"),
        (lambda: Limit(3, per="tenant"), "limit per: must be a function"),  # type: ignore[arg-type]
    ],
)
def test_a_bad_limit_is_refused(make: Callable[[], Limit], said: str) -> None:
    with pytest.raises(InvalidData, match=said):
        make()


def test_a_limit_that_does_not_fit_its_flow_is_refused(bench: Bench) -> None:
    with pytest.raises(InvalidData, match=r"limit of flow a: must be a Limit"):

        @bench.flows.flow("a", limit=3)  # type: ignore[arg-type]
        def a(run: Run) -> None: ...

    with pytest.raises(InvalidData, match=r"limit of flow b: has per=, and the flow takes no input"):

        @bench.flows.flow("b", limit=Limit(3, per=str))
        def b(run: Run) -> None: ...


class Tenant(StrEnum):
    ACME = "acme"


@pytest.mark.parametrize(
    ("per", "said"),
    [
        (lambda order: order.missing, "limit per: raised AttributeError for this input"),
        (lambda order: None, "limit per: must give text or a whole number, not NoneType"),
        (lambda order: 1.5, "limit per: must give text or a whole number, not float"),
        (lambda order: True, "limit per: must give text or a whole number, not bool"),
        (lambda order: "", "limit per: must not be empty"),
        (lambda order: "x" * 201, "limit per: is 201 characters long; 200 are allowed"),
        (lambda order: "a\0b", "limit per: contains a NUL"),
    ],
)
def test_a_key_that_is_none_is_refused_before_anything_is_written(
    bench: Bench, per: Callable[[Order], Any], said: str
) -> None:
    @bench.flows.flow("orders/fulfil", limit=Limit(3, per=per))
    def fulfil(run: Run, order: Order) -> None: ...

    @bench.flows.flow("parent")
    def parent(run: Run) -> None:
        run.flow(fulfil, Order(id="1"))

    with pytest.raises(InvalidData, match=said):
        fulfil.start(Order(id="1"))
    with pytest.raises(InvalidData, match=said.replace("limit per:", r"limit per of inputs\[0\]:")):
        fulfil.start_many([Order(id="1")])
    assert bench.query(sa.select(flows.c.id)) == []
    handle = parent.start()
    bench.work()
    assert handle.status() is FlowStatus.FAILED
    assert len(bench.query(sa.select(flows.c.id))) == 1


@pytest.mark.parametrize(("value", "key"), [("acme", '"acme"'), (Tenant.ACME, '"acme"'), (3, "3"), ("3", '"3"')])
def test_a_key_is_text_or_a_whole_number(bench: Bench, value: Any, key: str) -> None:
    @bench.flows.flow("orders/fulfil", limit=Limit(3, per=lambda order: value))
    def fulfil(run: Run, order: Order) -> None: ...

    handle = fulfil.start(Order(id="1"))
    assert bench.rows(handle.id)[0].limit_key == f'["orders/fulfil", {key}]'
    bench.work()


def test_the_key_is_of_the_input_as_the_flow_takes_it(bench: Bench) -> None:
    """Also where it comes as JSON, from a message or the command line."""

    @bench.flows.flow("orders/fulfil", limit=Limit(3, per=lambda order: order.tenant))
    def fulfil(run: Run, order: Order) -> str:
        return order.tenant

    started = bench.app.tasks["flows.start"].apply(kwargs={"name": "orders/fulfil", "input": {"id": "1"}}, throw=True)
    flow_id = UUID(started.get())
    assert bench.rows(flow_id)[0].limit_key == '["orders/fulfil", "acme"]'
    bench.work()


def test_unlimited_flows_know_nothing_of_it(bench: Bench) -> None:
    handle = calling(bench).start("x")
    assert bench.rows(handle.id)[0].limit_key is None
    bench.work()
    assert kept_limits(bench) == []
