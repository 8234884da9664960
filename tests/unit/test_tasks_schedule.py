"""The slots of a schedule: which moments they are, over changes of the clocks too, and which of them are due."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import islice, pairwise
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from celery.schedules import crontab, schedule
from hypothesis import given, settings
from hypothesis import strategies as st

from celery_flows import InvalidData
from celery_flows.tasks.schedule import MOST_SLOTS, Schedule, parse_schedule

BERLIN, NEW_YORK, LORD_HOWE, APIA = map(
    ZoneInfo, ("Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Pacific/Apia")
)


def made(every: Any, catch_up: str = "last", overlap: str = "allow") -> Schedule:
    return parse_schedule("nightly", every, catch_up, overlap)


def slots(every: Any, before: str, zone: Any = UTC, number: int = 3) -> list[str]:
    """The last slots up to a moment in UTC, on the zone's clock."""
    moment = datetime.fromisoformat(before).replace(tzinfo=UTC)
    return [
        f"{slot.astimezone(zone):%Y-%m-%d %H:%M %z}" for slot in islice(made(every).slots_before(moment, zone), number)
    ]


def test_a_crontab_names_times_on_the_zones_clock() -> None:
    assert slots(crontab(hour=3, minute=0), "2026-01-03 01:59", BERLIN, 2) == [
        "2026-01-02 03:00 +0100",
        "2026-01-01 03:00 +0100",
    ]
    assert slots(crontab(hour=3, minute=0), "2026-01-03 02:00", BERLIN, 1) == [
        "2026-01-03 03:00 +0100"
    ]  # that one included


def test_all_parts_of_a_crontab_must_hold() -> None:
    thirteenth = crontab(minute=0, hour=0, day_of_month=13, day_of_week="fri")
    assert slots(thirteenth, "2026-12-31 00:00") == [
        "2026-11-13 00:00 +0000",
        "2026-03-13 00:00 +0000",
        "2026-02-13 00:00 +0000",
    ]
    assert slots(crontab(minute=0, hour=0, day_of_month=29, month_of_year=2), "2026-01-01 00:00", number=2) == [
        "2024-02-29 00:00 +0000", "2020-02-29 00:00 +0000",
    ]  # fmt: skip
    assert slots(crontab(minute=0, hour=0, day_of_week="sun"), "2026-11-24 00:00", number=1) == [
        "2026-11-22 00:00 +0000"
    ]


def test_an_interval_goes_by_no_clock_but_time_itself() -> None:
    assert slots(timedelta(hours=6), "2026-03-29 13:00", BERLIN, 3) == [
        "2026-03-29 14:00 +0200", "2026-03-29 08:00 +0200", "2026-03-29 01:00 +0100",
    ]  # fmt: skip
    assert [made(each).every for each in (90, 90.0, schedule(90))] == [timedelta(seconds=90)] * 3


def test_a_time_that_is_left_out_falls_as_much_later() -> None:
    """On 2026-03-29 clocks in Berlin go from 02:00 to 03:00."""
    assert slots(crontab(hour=2, minute=30), "2026-03-31 00:00", BERLIN) == [
        "2026-03-30 02:30 +0200", "2026-03-29 03:30 +0200", "2026-03-28 02:30 +0100",
    ]  # fmt: skip


def test_a_time_that_comes_twice_is_taken_the_first_time() -> None:
    """On 2026-10-25 clocks in Berlin go from 03:00 to 02:00."""
    assert slots(crontab(hour=2, minute=30), "2026-10-27 00:00", BERLIN) == [
        "2026-10-26 02:30 +0100", "2026-10-25 02:30 +0200", "2026-10-24 02:30 +0200",
    ]  # fmt: skip


def test_a_crontab_of_every_hour_knows_hours_that_come_twice_and_none_that_are_left_out() -> None:
    hourly = crontab(minute=30)
    assert slots(hourly, "2026-10-25 02:00", BERLIN, 4) == [
        "2026-10-25 02:30 +0100", "2026-10-25 02:30 +0200", "2026-10-25 01:30 +0200", "2026-10-25 00:30 +0200",
    ]  # fmt: skip
    assert slots(hourly, "2026-03-29 02:00", BERLIN) == [
        "2026-03-29 03:30 +0200", "2026-03-29 01:30 +0100", "2026-03-29 00:30 +0100",
    ]  # fmt: skip


def test_a_day_that_a_zone_leaves_out_gives_no_slot_twice() -> None:
    """Samoa had no 30 December 2011."""
    assert slots(crontab(hour=12, minute=0), "2012-01-01 00:00", APIA) == [
        "2012-01-01 12:00 +1400", "2011-12-31 12:00 +1400", "2011-12-29 12:00 -1000",
    ]  # fmt: skip


parts = st.sets(st.integers(0, 59), min_size=1, max_size=3)
hours = st.one_of(st.just("*"), st.sets(st.integers(0, 23), min_size=1, max_size=4).map(sorted))


@settings(max_examples=60, deadline=None)
@given(
    minutes=parts, hours=hours, zone=st.sampled_from([UTC, BERLIN, NEW_YORK, LORD_HOWE]),
    moment=st.datetimes(datetime(2024, 1, 1), datetime(2027, 1, 1)),  # noqa: DTZ001
)  # fmt: skip
def test_slots_descend_are_named_by_the_crontab_and_do_not_depend_on_who_asks_when(
    minutes: set[int], hours: Any, zone: Any, moment: datetime
) -> None:
    by = made(crontab(minute=sorted(minutes), hour=hours))
    found = list(islice(by.slots_before(moment.replace(tzinfo=UTC), zone), 80))
    assert all(later > earlier for later, earlier in pairwise(found))
    assert found[0] <= moment.replace(tzinfo=UTC)
    assert list(islice(by.slots_before(found[10], zone), 70)) == found[10:]
    days = {slot.astimezone(zone).date() for slot in found[:-1]}
    assert len(days) >= (max(days) - min(days)).days  # none is left out
    assert all(slot.second == slot.microsecond == 0 for slot in found)


# ---- which are due --------------------------------------------------------------------------------------------------

NOW = datetime(2026, 5, 1, 12, 0, 5, tzinfo=UTC)
SLOT = NOW.replace(second=0)
MINUTE, DAY = timedelta(minutes=1), timedelta(days=1)
DAILY = crontab(hour=12, minute=0)


def test_a_slot_is_due_once() -> None:
    assert made(DAILY).due(NOW, SLOT - DAY, UTC) == [SLOT]
    assert made(DAILY).due(NOW, SLOT, UTC) == []
    assert made(DAILY).due(SLOT - MINUTE, SLOT - DAY, UTC) == []


@pytest.mark.parametrize("catch_up", ["last", "all", "none"])
def test_a_new_schedule_makes_up_for_nothing_not_even_the_slot_of_this_minute(catch_up: str) -> None:
    """It was deployed some seconds after its slot."""
    assert made(DAILY, catch_up).due(NOW, None, UTC) == []
    assert made(1, catch_up).due(NOW, None, UTC) == []
    assert made(1, catch_up).due(NOW, NOW - timedelta(seconds=1), UTC) == [NOW]


@pytest.mark.parametrize(("catch_up", "days"), [("last", [0]), ("all", [2, 1, 0]), ("none", [])])
def test_what_was_missed_is_made_up_for_as_catch_up_says(catch_up: str, days: list[int]) -> None:
    """Nobody looked for three days; the clock is past today's slot."""
    assert made(DAILY, catch_up).due(NOW + 10 * MINUTE, SLOT - 3 * DAY, UTC) == [SLOT - n * DAY for n in days]


@pytest.mark.parametrize(("catch_up", "days"), [("last", [0]), ("all", [2, 1, 0]), ("none", [0])])
def test_a_slot_that_is_on_time_stands_for_those_that_were_missed(catch_up: str, days: list[int]) -> None:
    assert made(DAILY, catch_up).due(NOW, SLOT - 3 * DAY, UTC) == [SLOT - n * DAY for n in days]


@pytest.mark.parametrize("catch_up", ["last", "all", "none"])
def test_all_slots_of_this_minute_are_on_time(catch_up: str) -> None:
    found = made(20, catch_up).due(NOW, NOW - timedelta(seconds=46), UTC)
    assert found == [SLOT - timedelta(seconds=40), SLOT - timedelta(seconds=20), SLOT]


def test_catching_up_has_a_bound_and_takes_the_newest() -> None:
    found = made(60, "all").due(NOW, SLOT - DAY, UTC)
    assert len(found) == MOST_SLOTS
    assert found[-1] == SLOT
    assert made(1).due(NOW, datetime(1970, 1, 2, tzinfo=UTC), UTC)[-1] == NOW  # however long ago


@pytest.mark.parametrize("every", ["0 3 * * *", 0, 0.5, -60, True, float("nan"), float("inf"), timedelta(0)])
def test_what_is_no_schedule_is_refused(every: Any) -> None:
    with pytest.raises(InvalidData, match="flow nightly: its schedule must be a crontab"):
        made(every)


def test_slots_that_wait_are_made_up_for() -> None:
    with pytest.raises(InvalidData, match=r"flow nightly: has slots that wait, .* must be last or all"):
        made(60, "none", "wait")


@pytest.mark.parametrize("options", [{"catch_up": "yes"}, {"overlap": "queue"}, {"catch_up": None}])
def test_unknown_policies_are_refused(options: Any) -> None:
    with pytest.raises(InvalidData, match=r"flow nightly: \w+ must be one of "):
        made(DAILY, **options)


# ---- the next one ---------------------------------------------------------------------------------------------------


def test_the_next_slot_comes_after_the_moment() -> None:
    assert made(DAILY).slot_after(SLOT - DAY, UTC) == SLOT
    assert made(DAILY).slot_after(SLOT - MINUTE, UTC) == SLOT
    assert made(3600).slot_after(SLOT, UTC) == SLOT + timedelta(hours=1)
    leap_day = made(crontab(minute=0, hour=0, day_of_month=29, month_of_year=2))
    assert leap_day.slot_after(NOW, UTC) == datetime(2028, 2, 29, tzinfo=UTC)


@settings(max_examples=60, deadline=None)
@given(
    minutes=parts, hours=hours, zone=st.sampled_from([UTC, BERLIN, NEW_YORK, LORD_HOWE, APIA]),
    moment=st.datetimes(datetime(2024, 1, 1), datetime(2027, 1, 1)),  # noqa: DTZ001
)  # fmt: skip
def test_who_goes_from_slot_to_slot_comes_to_the_same_as_who_looks_back(
    minutes: set[int], hours: Any, zone: Any, moment: datetime
) -> None:
    by = made(crontab(minute=sorted(minutes), hour=hours))
    behind = list(islice(by.slots_before(moment.replace(tzinfo=UTC), zone), 60))[::-1]
    assert [by.slot_after(slot, zone) for slot in behind[:-1]] == behind[1:]
