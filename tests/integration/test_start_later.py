"""Starts that are held back, by the store and not by the broker; and starts that are more urgent than others."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
import sqlalchemy as sa

from celery_flows import FlowCancelled, FlowStatus, InvalidData, Run
from celery_flows.store import operations as op
from celery_flows.store.tables import flows
from celery_flows.tasks.publish import Publisher
from celery_flows.worker.doctor import examine
from tests.integration.conftest import MakeBench
from tests.support.bench import Bench
from tests.support.waiting import until

HOUR = timedelta(hours=1)


def doubling(bench: Bench, **options: Any) -> Any:
    @bench.flows.flow("doubles", **options)
    def doubles(run: Run, n: int) -> int:
        return 2 * run.step(int, n)

    return doubles


def in_an_hour(bench: Bench) -> datetime:
    return bench.store.run(op.now) + HOUR


LATER = pytest.mark.parametrize(
    "later",
    [lambda _: {"countdown": 3600}, lambda _: {"countdown": HOUR}, lambda bench: {"eta": in_an_hour(bench)}],
    ids=["seconds", "timedelta", "eta"],
)


@LATER
def test_nothing_is_sent_and_nothing_can_be_claimed_before_its_time(bench: Bench, later: Any) -> None:
    handle = doubling(bench).start(4, **later(bench))
    [row] = bench.rows(handle.id)
    assert row.publish_count == 0
    assert abs(row.due_at - in_an_hour(bench)) < timedelta(seconds=10)
    bench.drive(handle.id)  # a message that is not ours
    assert (bench.messages(), bench.claimable(), bench.sweep().due) == ([], [], 0)
    assert handle.status() is FlowStatus.CREATED
    bench.pass_time()
    assert bench.sweep().published == 1
    assert [message.id for message in bench.messages()] == [str(handle.id)]
    assert bench.finish(handle) == 8


def test_it_begins_by_itself_when_its_time_has_come(bench: Bench) -> None:
    handle = doubling(bench).start(4, countdown=0.2)
    until(lambda: bench.sweep().published == 1, "a sweep finds it due")
    assert bench.finish(handle) == 8


def test_many_begin_later_too(bench: Bench) -> None:
    handles = doubling(bench).start_many(range(40), countdown=HOUR)
    assert (bench.messages(), bench.claimable(), bench.sweep().due) == ([], [], 0)
    bench.pass_time()
    assert bench.sweep().published == 40
    bench.work()
    assert handles[39].result(0) == 78


def test_its_history_tells_of_the_delay(bench: Bench) -> None:
    at = in_an_hour(bench)
    flow = doubling(bench)
    told = [
        bench.store.list_events(flow.start(4, **later).id)[0].payload_json for later in ({"eta": at}, {"countdown": 9})
    ]
    assert (told[0]["eta"], told[1]["countdown"]) == (at.isoformat(), 9.0)


def test_an_eta_of_any_time_zone_is_the_same_instant(bench: Bench) -> None:
    at = in_an_hour(bench).replace(microsecond=0)
    handle = doubling(bench).start(4, eta=at.astimezone(timezone(timedelta(hours=-7))))
    [row] = bench.rows(handle.id)
    assert row.due_at == at


@pytest.mark.parametrize("past", [{"countdown": -5}, {"countdown": 0}, {"eta": datetime(2020, 1, 1, tzinfo=UTC)}])
def test_a_time_that_has_passed_is_now(bench: Bench, past: Any) -> None:
    handle = doubling(bench).start(4, **past)
    bench.sweep()
    assert [message.id for message in bench.messages()] == [str(handle.id)]
    assert bench.finish(handle) == 8


def test_a_cancel_before_it_begins_is_carried_out_at_once(bench: Bench) -> None:
    handle = doubling(bench).start(4, countdown=HOUR)
    handle.cancel()
    assert [message.id for message in bench.messages()] == [str(handle.id)]
    bench.work()
    with pytest.raises(FlowCancelled):
        handle.result(0)
    assert bench.store.list_steps(handle.id) == []


def test_it_keeps_its_time_whatever_else_is_done_to_it(bench: Bench) -> None:
    handle = doubling(bench).start(4, countdown=HOUR)
    due = bench.rows(handle.id)[0].due_at
    bench.flows.manager.pause(handle.id)
    bench.flows.manager.unpause(handle.id)
    bench.flows.manager.update_state(handle.id, {"note": 1})
    assert bench.rows(handle.id)[0].due_at == due
    assert bench.claimable() == []
    bench.pass_time()
    assert bench.finish(handle) == 8


def test_a_flow_that_was_paused_before_it_began_goes_on_at_once(bench: Bench) -> None:
    handle = doubling(bench).start(4)
    bench.flows.manager.pause(handle.id)
    bench.flows.manager.unpause(handle.id)
    assert bench.sweep().published == 1
    assert bench.finish(handle) == 8


def test_a_key_is_taken_from_the_start_on(bench: Bench) -> None:
    flow = doubling(bench)
    first = flow.start(4, key="a", countdown=HOUR)
    assert flow.start(4, key="a").id == first.id
    assert (bench.messages(), bench.claimable()) == ([], [])
    first.cancel()
    bench.work()


def test_a_rollback_takes_it_back(bench: Bench) -> None:
    with bench.store.engine.connect() as caller:
        doubling(bench).start(4, countdown=HOUR, session=caller)
        caller.rollback()
    assert bench.query(sa.select(flows.c.id)) == []


def test_doctor_finds_nothing_wrong_with_it(bench: Bench) -> None:
    doubling(bench).start(4, countdown=HOUR)
    found = {finding.kind for finding in examine(bench.runtime, reply_seconds=0.1)}
    assert found <= {"sweep_silent", "beat_silent"}  # there are no workers here, and that is all


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"countdown": "3600"}, "countdown: must be seconds or a timedelta"),
        ({"countdown": True}, "countdown: must be seconds or a timedelta"),
        ({"countdown": float("nan")}, "countdown: must be seconds or a timedelta"),
        ({"countdown": 1e12}, "countdown: is more than 36500 days"),
        ({"countdown": timedelta.max}, "countdown: is more than 36500 days"),
        ({"eta": datetime(2030, 1, 1)}, "eta: needs a time zone"),  # noqa: DTZ001
        ({"eta": "2030-01-01T00:00:00Z"}, "eta: must be a datetime with a time zone"),
        ({"eta": datetime(2030, 1, 1, tzinfo=UTC), "countdown": 5}, "eta: cannot be given together with countdown"),
        ({"priority": -1}, "priority: must be a whole number from 0 to 255"),
        ({"priority": 256}, "priority: must be"),
        ({"priority": 1.0}, "priority: must be"),
        ({"priority": True}, "priority: must be"),
    ],
)
def test_bad_times_and_priorities_are_refused(bench: Bench, bad: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidData, match=said):
        doubling(bench).start(4, **bad)
    assert bench.query(sa.select(flows.c.id)) == []


def test_a_start_past_the_horizon_is_refused(make_bench: MakeBench) -> None:
    bench = make_bench(timer_horizon_days=1)
    flow = doubling(bench)
    for field, later in ("countdown", {"countdown": 25 * HOUR}), ("eta", {"eta": in_an_hour(bench) + 24 * HOUR}):
        with pytest.raises(InvalidData, match=rf"{field}: is more than 1 days away \(flow_timer_horizon_days\)"):
            flow.start(4, **later)
    handles = [flow.start(4, countdown=23 * HOUR), flow.start(4, eta=in_an_hour(bench))]
    bench.pass_time()
    assert [bench.finish(handle) for handle in handles] == [8, 8]


# ---- priorities -----------------------------------------------------------------------------------------------------


def test_the_priority_of_a_start_goes_before_its_definitions(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []
    send = bench.app.send_task

    def noting(*args: Any, **options: Any) -> Any:
        sent.append(options["priority"])
        return send(*args, **options)

    monkeypatch.setattr(bench.app, "send_task", noting)
    flow = doubling(bench, priority=7)
    handles = [flow.start(4), flow.start(4, priority=0), flow.start(4, priority=255)]
    assert [bench.rows(handle.id)[0].priority for handle in handles] == [7, 0, 255]
    assert sent == [7, 0, 255]
    bench.pass_time()
    bench.sweep()
    assert sorted(sent[3:]) == [0, 7, 255]
    bench.work()


def test_a_child_has_its_definitions_priority(bench: Bench) -> None:
    child = doubling(bench, priority=7)

    @bench.flows.flow("parent")
    def parent(run: Run) -> int:
        return sum(run.gather(child.s(n) for n in (1, 2)))

    handle = parent.start()
    bench.drive(handle.id)
    children = bench.query(sa.select(flows.c.id).where(flows.c.parent_flow_id == handle.id))
    assert [bench.rows(row.id)[0].priority for row in children] == [7, 7]
    assert bench.finish(handle) == 6


def test_a_bad_priority_of_a_definition_is_refused(bench: Bench) -> None:
    with pytest.raises(InvalidData, match="priority: must be a whole number from 0 to 255"):
        doubling(bench, priority=300)


@pytest.mark.parametrize(("broker", "order"), [("amqp", [9, 5, None]), ("redis", [None, 5, 9])])
def test_the_most_urgent_is_sent_first_as_the_broker_has_it(make_bench: MakeBench, broker: str, order: Any) -> None:
    bench = make_bench()
    flow = doubling(bench)
    flow.start_many([1], priority=5)
    flow.start_many([2])
    flow.start_many([3], priority=9)
    bench.pass_time()
    sent = []

    class Noting(Publisher):
        _scheme = broker

        def _send(self, producer: Any, hint: Any) -> None:
            sent.append(hint.priority)

    bench.runtime.publisher = Noting(bench.app, bench.runtime.settings)
    assert bench.sweep().published == 3
    assert sent == order
    bench.work()


def test_a_start_at_a_time_that_has_passed_has_its_whole_time(bench: Bench) -> None:
    @bench.flows.flow("punctual", timeout=timedelta(hours=1))
    def punctual(run: Run) -> str:
        return run.step(str, "done")

    handle = punctual.start(eta=bench.store.run(op.now) - timedelta(hours=2))
    assert bench.finish(handle) == "done"
