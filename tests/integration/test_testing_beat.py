"""The test kit plays beat: where the clock of a test passes slots, their flows begin, as in production."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from celery import Celery
from celery.schedules import crontab

from celery_flows import Flows, FlowStatus, InvalidData, Run
from celery_flows.testing import FlowApp, FlowBeat, FlowClock, FlowCrash, FlowMessages, Spins, Stuck

HOUR, MINUTE = timedelta(hours=1), timedelta(minutes=1)
MIDNIGHT = datetime(2099, 1, 1, tzinfo=UTC)
_numbers = itertools.count(1)


class Shop:
    """An application with flows of the clock's; notes what they do."""

    def __init__(self) -> None:
        self.app = Celery(f"clocked-{next(_numbers)}", set_as_current=False)
        self.flows = Flows(self.app)
        self.seen: list[str] = []

    def define(self, name: str, schedule: Any = HOUR, *, lasts: timedelta = timedelta(), **options: Any) -> None:
        """Registers a flow that notes its slot, and again when it ends."""

        @self.flows.flow(name, schedule=schedule, **options)
        def noting(run: Run, slot: datetime) -> None:
            run.step(begin, slot)
            if lasts:
                run.sleep(lasts)
                run.step(end, slot)

        def begin(slot: datetime) -> None:
            self.seen.append(f"{name} {slot:%H:%M}")

        def end(slot: datetime) -> None:
            self.seen.append(f"end {slot:%H:%M}")


@pytest.fixture
def shop() -> Shop:
    """The application under test."""
    return Shop()


@pytest.fixture
def flow_celery_app(shop: Shop) -> Flows:
    return shop.flows


@pytest.fixture
def flow_store_url(database_url: str) -> str:
    return database_url


# ---- slots that are passed ------------------------------------------------------------------------------------------


def test_each_slot_that_passes_has_its_flow_at_its_own_time(
    shop: Shop, flow_app: FlowApp, flow_clock: FlowClock
) -> None:
    shop.define("hourly")
    flow_clock.move_to(MIDNIGHT - MINUTE)
    flow_clock.advance(hours=3)
    assert shop.seen == ["hourly 00:00", "hourly 01:00", "hourly 02:00"]
    for flow in flow_app.store.list_by_owner("default"):
        assert timedelta() <= flow.created_at - datetime.fromisoformat(flow.input_json) < timedelta(seconds=1)


def test_schedules_and_what_their_flows_wait_for_come_in_order(shop: Shop, flow_clock: FlowClock) -> None:
    shop.define("hourly", lasts=90 * MINUTE)
    shop.define("half", crontab(minute="*/30"))
    flow_clock.move_to(MIDNIGHT - MINUTE)
    flow_clock.advance_to(MIDNIGHT + 2 * HOUR - MINUTE)
    assert shop.seen == [
        "hourly 00:00", "half 00:00", "half 00:30", "hourly 01:00", "half 01:00", "half 01:30", "end 00:00",
    ]  # fmt: skip


def test_a_slot_is_due_at_the_moment_it_names_and_not_before(shop: Shop, flow_clock: FlowClock) -> None:
    shop.define("hourly")
    flow_clock.move_to(MIDNIGHT - MINUTE)
    flow_clock.advance(seconds=59.5)
    assert shop.seen == []
    flow_clock.advance_to(MIDNIGHT)
    assert shop.seen == ["hourly 00:00"]
    flow_clock.advance(minutes=59)
    assert shop.seen == ["hourly 00:00"]


def test_crontabs_go_by_the_clock_of_the_apps_time_zone(shop: Shop, flow_clock: FlowClock) -> None:
    shop.app.conf.update(timezone="Europe/Berlin")
    shop.define("nightly", crontab(hour=2, minute=30))
    flow_clock.move_to(datetime(2099, 3, 28, tzinfo=UTC))  # clocks are set forward on the 29th
    flow_clock.advance(days=3)
    assert shop.seen == ["nightly 01:30", "nightly 01:30", "nightly 00:30"]


def test_the_machines_time_makes_no_slot_due(shop: Shop, flow_app: FlowApp, flow_clock: FlowClock) -> None:
    shop.define("every minute", MINUTE)  # there always was one within the last minute, which is on time
    flow_app.run()
    assert shop.seen == []
    flow_clock.advance(minutes=1)
    assert len(shop.seen) == 1


def test_a_schedule_that_is_new_makes_up_for_nothing(shop: Shop, flow_app: FlowApp, flow_clock: FlowClock) -> None:
    shop.define("hourly", catch_up="all")
    flow_clock.move_to(MIDNIGHT + 10 * MINUTE)
    flow_app.run()
    assert shop.seen == []
    shop.define("another", catch_up="all")
    flow_clock.advance(hours=1)
    assert shop.seen == ["hourly 01:00", "another 01:00"]


# ---- what was missed, and what comes too soon -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("catch_up", "slots"), [("last", ["02:00"]), ("all", ["00:00", "01:00", "02:00"]), ("none", [])]
)
def test_slots_without_a_beat_are_made_up_for_as_the_flow_says(
    shop: Shop, flow_app: FlowApp, flow_clock: FlowClock, catch_up: str, slots: list[str]
) -> None:
    shop.define("hourly", catch_up=catch_up)
    flow_clock.move_to(MIDNIGHT - MINUTE)
    flow_app.run()
    flow_clock.move_to(MIDNIGHT + 2 * HOUR + 10 * MINUTE)
    flow_app.run()
    assert shop.seen == [f"hourly {slot}" for slot in slots]
    flow_clock.advance(hours=1)
    assert shop.seen[len(slots) :] == ["hourly 03:00"]


@pytest.mark.parametrize(
    ("options", "begun"),
    [
        ({"overlap": "allow"}, ["00:00", "01:00", "02:00", "03:00", "04:00", "05:00"]),
        ({"overlap": "skip"}, ["00:00", "03:00"]),
        ({"overlap": "wait"}, ["00:00", "02:00", "05:00"]),
        ({"overlap": "wait", "catch_up": "all"}, ["00:00", "01:00", "02:00"]),
    ],
)
def test_a_slot_that_comes_too_soon_is_seen_to_as_the_flow_says(
    shop: Shop, flow_clock: FlowClock, options: Any, begun: list[str]
) -> None:
    shop.define("hourly", lasts=2.5 * HOUR, **options)
    flow_clock.move_to(MIDNIGHT - MINUTE)
    flow_clock.advance_to(MIDNIGHT + 6 * HOUR - MINUTE)
    assert [each for each in shop.seen if not each.startswith("end")] == [f"hourly {slot}" for slot in begun]


def test_a_slot_that_waited_begins_when_the_flow_before_it_has_ended(
    shop: Shop, flow_app: FlowApp, flow_clock: FlowClock
) -> None:
    shop.define("hourly", lasts=90 * MINUTE, overlap="wait")
    flow_clock.move_to(MIDNIGHT - MINUTE)
    flow_clock.advance(minutes=100)
    assert shop.seen == ["hourly 00:00", "end 00:00", "hourly 01:00"]
    second, _ = shop.flows.search()
    assert timedelta() < second.created_at - MIDNIGHT - 90 * MINUTE < timedelta(seconds=1)


def test_a_step_that_takes_long_holds_beat_up_too(shop: Shop, flow_clock: FlowClock) -> None:
    def slow() -> None:
        flow_clock.advance(hours=2.5)

    @shop.flows.flow("slow")
    def slow_flow(run: Run) -> None:
        run.step(slow)

    shop.define("hourly", catch_up="all")
    flow_clock.move_to(MIDNIGHT - MINUTE)
    flow_clock.advance()
    slow_flow.start()
    flow_clock.advance()
    assert shop.seen == ["hourly 00:00", "hourly 01:00", "hourly 02:00"]


# ---- which schedules, and when --------------------------------------------------------------------------------------


def test_a_test_may_have_some_of_the_schedules_or_none(shop: Shop, flow_clock: FlowClock, flow_beat: FlowBeat) -> None:
    for name in ("one", "two", "three"):
        shop.define(name)
    flow_beat.only("one", "three")
    flow_clock.advance(hours=1)
    assert [each.split()[0] for each in shop.seen] == ["one", "three"]
    flow_beat.only()
    flow_clock.advance(days=1)
    assert len(shop.seen) == 2


def test_a_name_without_a_schedule_is_refused(shop: Shop, flow_beat: FlowBeat) -> None:
    @shop.flows.flow("by hand")
    def by_hand(run: Run) -> None: ...

    with pytest.raises(InvalidData, match="'by hand' has no schedule; there are none"):
        flow_beat.only("by hand")
    shop.define("hourly")
    with pytest.raises(InvalidData, match="'hurly' has no schedule; there are hourly"):
        flow_beat.only("hourly", "hurly")


def test_while_a_result_is_waited_for_nothing_begins_and_who_waits_in_vain_is_told(
    shop: Shop, flow_clock: FlowClock
) -> None:
    @shop.flows.flow("quarter")
    def quarter(run: Run, then: str) -> str:
        run.sleep(timedelta(days=90))
        return str(run.wait_for("payment", then)) if then else "over"

    shop.define("every minute", MINUTE)
    flow_clock.advance()
    assert quarter.start("").result() == "over"
    with pytest.raises(Stuck, match="waits for an event that nobody has sent"):
        quarter.start("o1").result()
    assert shop.seen == []
    flow_clock.advance()
    assert len(shop.seen) == 1  # the last of them is made up for


# ---- with faults ----------------------------------------------------------------------------------------------------


def test_a_flow_of_a_slot_outlives_its_worker_and_the_loss_of_its_message(
    shop: Shop, flow_app: FlowApp, flow_clock: FlowClock, flow_crash: FlowCrash, flow_messages: FlowMessages
) -> None:
    shop.define("hourly")
    flow_crash.at("begin")
    flow_messages.drop("hourly")
    flow_clock.move_to(MIDNIGHT - MINUTE)
    flow_clock.advance(hours=1)
    assert shop.seen == ["hourly 00:00", "hourly 00:00"]
    assert [flow.status for flow in shop.flows.search()] == [FlowStatus.FINISHED]


def test_many_slots_cost_no_patience(shop: Shop, flow_app: FlowApp, flow_clock: FlowClock) -> None:
    shop.define("hourly")
    flow_clock.advance(hours=3)  # the first statements of a process take longer
    flow_app.patience_seconds = 0.5
    flow_clock.advance(days=4)
    assert len(shop.seen) == 3 + 96


def test_who_spins_beside_a_schedule_is_stopped(shop: Shop, flow_app: FlowApp, flow_clock: FlowClock) -> None:
    def again() -> None: ...

    @shop.flows.flow("polls")
    def polls(run: Run) -> None:
        while True:
            run.step(again)
            run.sleep(timedelta(seconds=1))

    shop.define("hourly")
    polls.start()
    flow_app.patience_seconds = 2.0
    flow_clock.move_to(MIDNIGHT - timedelta(seconds=5))
    with pytest.raises(Spins, match=r"\(polls\) does not come to rest: after 2.2 s .* started by the clock: 1"):
        flow_clock.advance(days=1)


def test_who_lets_years_pass_is_told_what_to_do_instead(shop: Shop, flow_app: FlowApp, flow_clock: FlowClock) -> None:
    shop.define("hourly")
    flow_clock.advance(hours=3)  # the first statements of a process take longer
    flow_app.patience_seconds = 0.2
    with pytest.raises(
        Spins, match=r"started by the clock: .*flow_beat\.only\(…\), or set the date by flow_clock\.move_to\(…\)"
    ):
        flow_clock.advance(days=365)
