"""Flows that the clock starts: one for each slot, whoever looks; beat only says when to."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from celery.schedules import crontab

from celery_flows import Flows, FlowStatus, InvalidData, Run
from celery_flows.store import operations as op
from celery_flows.store import schedules
from celery_flows.store.tables import flow_heartbeats, flows
from celery_flows.tasks import runtime, slots
from tests.integration.conftest import MakeBench
from tests.integration.test_engine_app import OUR_ENTRIES, shop
from tests.support.bench import Bench

HOUR = timedelta(hours=1)
ROW = flow_heartbeats.c.name == "schedule hourly"


def hourly(bench: Bench, **options: Any) -> Any:
    """A flow of every hour, whose schedule somebody has looked at before."""

    @bench.flows.flow("hourly", schedule=HOUR, **options)
    def hourly(run: Run, slot: datetime) -> datetime:
        return run.step(_same, slot)

    looked_before(bench)
    return hourly


def looked_before(bench: Bench) -> None:
    """Has somebody look at the schedule for the first time."""
    at = bench.store.run(op.now)
    told = {"slot": at.isoformat(), "flow": None}
    with bench.store.engine.begin() as connection:
        connection.execute(sa.delete(flow_heartbeats).where(ROW))
        connection.execute(
            sa.insert(flow_heartbeats).values(name="schedule hourly", at=at, every_seconds=0.0, report=told)
        )


def hourly_with(bench: Bench, catch_up: str) -> Any:
    """The same flow, defined anew: its slots wait."""

    @bench.flows.flow("hourly", schedule=HOUR, overlap="wait", catch_up=catch_up)  # type: ignore[arg-type]
    def hourly(run: Run, slot: datetime) -> datetime:
        return run.step(_same, slot)

    return hourly


def _same(slot: datetime) -> datetime:
    return slot


def look(bench: Bench) -> int:
    """What a worker does with beat's message."""
    bench.app.tasks["flows.look"].apply(kwargs={"name": "hourly"}, throw=True)
    return len(started(bench))


def started(bench: Bench) -> list[Any]:
    """The flows that the clock started in this test, oldest slot first."""
    query = sa.select(flows.c.id, flows.c.idempotency_key, flows.c.status, flows.c.input_json)
    mine = query.where(flows.c.requester_origin == "schedule")
    return bench.query(mine.order_by(flows.c.idempotency_key))


def last_looked(bench: Bench, ago: timedelta) -> datetime:
    """Has nobody looked for so long; gives the database's time."""
    at = bench.store.run(op.now)
    row = sa.select(flow_heartbeats.c.report).where(ROW)
    with bench.store.engine.begin() as connection:
        told = {**connection.execute(row).scalar_one(), "slot": (at - ago).isoformat()}
        connection.execute(sa.update(flow_heartbeats).where(ROW).values(report=told))
    return at


def test_a_slot_starts_one_flow_with_the_slot_as_its_input(bench: Bench) -> None:
    hourly(bench)
    bench.messages()
    assert look(bench) == 0
    at = last_looked(bench, 3 * HOUR)
    assert look(bench) == 1
    [flow] = started(bench)
    slot = datetime.fromisoformat(flow.input_json)
    assert slot == at.replace(minute=0, second=0, microsecond=0)
    assert flow.idempotency_key == f"slot {slot.isoformat()}"
    assert [message.id for message in bench.messages()] == [str(flow.id)]
    assert bench.store.list_events(flow.id)[0].payload_json["slot"] == slot.isoformat()
    assert bench.finish(bench.flows.handle(flow.id)) == slot
    assert [look(bench) for _ in range(3)] == [1, 1, 1]


def test_whoever_looks_too_early_has_the_flow_begin_at_its_slot(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    hourly(bench)
    monkeypatch.setattr(runtime, "AHEAD", HOUR)
    bench.messages()
    assert (look(bench), look(bench)) == (1, 1)
    [flow] = started(bench)
    [row] = bench.rows(flow.id)
    assert (row.due_at, row.publish_count) == (datetime.fromisoformat(flow.input_json), 0)
    assert (bench.messages(), bench.claimable()) == ([], [])


def test_many_who_look_at_once_start_one_flow_for_each_slot(make_bench: MakeBench) -> None:
    benches = [make_bench() for _ in range(4)]
    for bench in benches:
        hourly(bench, catch_up="all")
    last_looked(benches[0], 5 * HOUR)
    barrier = threading.Barrier(4)

    def look_at_once(bench: Bench) -> None:
        barrier.wait(10)
        slots.start_due(bench.runtime)

    threads = [threading.Thread(target=look_at_once, args=(bench,)) for bench in benches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    keys = [flow.idempotency_key for flow in started(benches[0])]
    assert len(keys) == len(set(keys)) == 5
    benches[0].work()


def test_beats_sweep_looks_too_since_its_messages_may_be_lost(bench: Bench) -> None:
    hourly(bench)
    last_looked(bench, 3 * HOUR)
    bench.app.tasks["flows.sweep"].apply(throw=True)
    assert len(started(bench)) == 1
    bench.work()


def test_the_loss_of_what_was_seen_to_doubles_nothing(bench: Bench) -> None:
    hourly(bench, catch_up="all")
    last_looked(bench, 3 * HOUR)
    assert look(bench) == 3
    last_looked(bench, 3 * HOUR)  # as after a restore of that row
    assert look(bench) == 3
    bench.work()


@pytest.mark.parametrize(("catch_up", "number"), [("last", 1), ("all", 3), ("none", 0)])
def test_what_was_missed_is_made_up_for_as_the_flow_says(bench: Bench, catch_up: str, number: int) -> None:
    hourly(bench, catch_up=catch_up)
    at = last_looked(bench, 3 * HOUR)
    on_time = at.minute == 0  # the hour's slot is then no missed one
    assert look(bench) == (1 if on_time and catch_up == "none" else number)
    assert look(bench) == len(started(bench))
    bench.work()


def test_a_new_schedule_starts_nothing_for_the_time_before_it(bench: Bench) -> None:
    yesterday = datetime.now(UTC) - timedelta(hours=2)

    @bench.flows.flow("hourly", schedule=crontab(hour=yesterday.hour, minute=0), catch_up="all")
    def hourly(run: Run) -> None: ...

    assert (look(bench), look(bench)) == (0, 0)


def test_a_slot_is_skipped_while_the_flow_of_the_one_before_is_open(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    hourly(bench, overlap="skip", catch_up="all")
    last_looked(bench, 3 * HOUR)
    assert look(bench) == 1  # the first of three; it is open when the others are seen to
    assert caplog.text.count("skips its slot") == 2
    last_looked(bench, HOUR)
    assert look(bench) == 1
    newest = bench.store.run(op.now).replace(minute=0, second=0, microsecond=0)
    assert list(slots.skipped(bench.runtime)) == [("hourly", schedules.Skipped(3, newest))]
    bench.work()
    last_looked(bench, HOUR)
    assert look(bench) == 2
    assert [left_out.count for _, left_out in slots.skipped(bench.runtime)] == [3]
    assert [flow.status for flow in started(bench)] == [FlowStatus.FINISHED, FlowStatus.CREATED]
    bench.work()


@pytest.mark.parametrize(("catch_up", "ages"), [("last", [2, 0]), ("all", [2, 1, 0])])
def test_a_slot_may_wait_for_the_flow_of_the_one_before(bench: Bench, catch_up: str, ages: list[int]) -> None:
    hourly(bench, overlap="wait", catch_up="all")
    last_looked(bench, timedelta(hours=3))
    assert (look(bench), look(bench)) == (1, 1)
    bench.runtime.registry._definitions.clear()
    waits_by = hourly_with(bench, catch_up)
    assert look(bench) == 1
    assert list(slots.missed(bench.runtime)) == []  # doctor finds nothing wrong with it
    for number in range(2, len(ages) + 1):
        bench.work()
        assert look(bench) == number
    bench.work()
    assert look(bench) == len(ages)
    newest = datetime.fromisoformat(started(bench)[-1].input_json)
    begun = [(newest - datetime.fromisoformat(flow.input_json)) // HOUR for flow in started(bench)]
    assert (waits_by.schedule.overlap, begun) == ("wait", ages)


@pytest.mark.parametrize("overlap", ["skip", "wait"])
def test_a_flow_that_has_gone_on_as_another_is_open_until_that_one_ends(bench: Bench, overlap: Any) -> None:
    """Whatever has been pruned of its first lives."""

    @bench.flows.flow("hourly", schedule=HOUR, overlap=overlap, catch_up="all")
    def hourly(run: Run, slot: datetime) -> None:
        if run.approval("what next").granted:
            run.restart_as(slot)

    looked_before(bench)
    last_looked(bench, 3 * HOUR)
    assert look(bench) == 1
    bench.work()
    handle = bench.flows.handle(started(bench)[0].id)
    handle.approve("what next", by="ann")
    bench.work()
    with bench.store.engine.begin() as connection:
        connection.execute(sa.delete(flows).where(flows.c.continued_as.isnot(None)))
    last_looked(bench, 2 * HOUR)
    assert look(bench) == 1
    [last] = bench.flows.search(definition="hourly", status="waiting")
    bench.flows.handle(last.id).reject("what next", by="ann")
    bench.work()
    last_looked(bench, 2 * HOUR)
    assert look(bench) == 2
    bench.work()


def test_by_default_they_may_overlap(bench: Bench) -> None:
    hourly(bench, catch_up="all")
    last_looked(bench, 2 * HOUR)
    assert look(bench) == 2
    bench.work()


def test_a_definition_that_fails_to_be_looked_at_does_not_keep_others_from_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hourly(bench)
    last_looked(bench, 3 * HOUR)

    @bench.flows.flow("another", schedule=HOUR)
    def another(run: Run) -> None: ...

    start = schedules.start_due

    def failing(conn: Any, name: str, *args: Any, **options: Any) -> Any:
        if "another" in name:
            raise InvalidData("slot", "cannot be")
        return start(conn, name, *args, **options)

    failing.mode = start.mode  # type: ignore[attr-defined]
    monkeypatch.setattr(schedules, "start_due", failing)
    bench.runtime.registry._definitions = dict(reversed(bench.runtime.registry._definitions.items()))
    slots.start_due(bench.runtime)
    assert len(started(bench)) == 1
    assert "the schedule of flow 'another' is not seen to yet (InvalidData)" in caplog.text
    bench.work()


def test_priority_and_queue_are_the_definitions(bench: Bench) -> None:
    hourly(bench, priority=7, queue="slow lane")
    last_looked(bench, 3 * HOUR)
    look(bench)
    [row] = bench.rows(started(bench)[0].id)
    assert (row.priority, row.queue) == (7, "slow lane")
    bench.work()


# ---- beat's entries -------------------------------------------------------------------------------------------------


def test_schedules_join_the_users_own_entries() -> None:
    app = shop(beat_schedule={"greet": {"task": "shop.greet", "schedule": 60.0}})
    made = Flows(app)
    at_three = crontab(hour=3)

    @made.flow("nightly", schedule=at_three)
    def nightly(run: Run) -> None: ...

    app.finalize()

    @made.flow("late", schedule=timedelta(minutes=5))
    def late(run: Run) -> None: ...

    entries = app.conf.beat_schedule
    assert set(entries) == {"greet", *OUR_ENTRIES, "celery-flows: nightly", "celery-flows: late"}
    nights, lates = entries["celery-flows: nightly"], entries["celery-flows: late"]
    assert (nights["task"], nights["kwargs"], nights["schedule"]) == ("flows.look", {"name": "nightly"}, at_three)
    assert (lates["schedule"], lates["options"]) == (300.0, {"expires": 60.0})


def test_a_flow_with_a_schedule_takes_its_slot_or_nothing(bench: Bench) -> None:
    with pytest.raises(InvalidData, match="flow hourly: has a schedule: its input must be a datetime"):

        @bench.flows.flow("hourly", schedule=HOUR)
        def hourly(run: Run, n: int) -> None: ...


def test_a_slot_that_is_made_up_for_has_its_whole_time(bench: Bench) -> None:
    """Its deadline counted from the slot, and had passed before it was begun."""

    @bench.flows.flow("nightly", schedule=timedelta(hours=4), timeout=timedelta(hours=1))
    def nightly(run: Run, slot: datetime) -> str:
        return run.step(str, "made")

    at = bench.store.run(op.now)
    seen = {"slot": (at - timedelta(hours=12)).isoformat(), "flow_id": None}
    with bench.store.engine.begin() as connection:
        row = {"name": "schedule nightly", "at": at, "every_seconds": 0.0, "report": seen}
        connection.execute(sa.insert(flow_heartbeats).values(row))
    assert slots.try_to_start(bench.runtime, nightly) == 1
    bench.work()
    [flow] = bench.flows.search()
    assert (flow.status, flow.error_json) == (FlowStatus.FINISHED, None)
