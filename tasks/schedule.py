"""When flows are started by the clock: the slots of a schedule.

A slot is a moment at which a flow is due to start: of a crontab, each time on the clock of the application's time zone
that it names; of an interval, each multiple of it since 1970. Who asks, how often and when makes no difference.

Where clocks are set forward, a time that is left out falls as much later (02:30 becomes 03:30). Where they are set
back, a time that comes twice is taken once, the first time; but both times by a crontab of every hour.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, tzinfo
from typing import Any, Literal, get_args

from celery.schedules import crontab, schedule

from celery_flows.store.errors import InvalidData
from celery_flows.store.schedules import Overlap

CatchUp = Literal["last", "all", "none"]

ON_TIME_SECONDS = 60.0  # a slot that nobody has looked at for longer was missed
MOST_SLOTS = 100  # that are started at once, and the newest of them
DAYS_ALL = 366 * 28 + 1  # within so many, every day of a month has been every day of a week
HOURS = 24


@dataclass(frozen=True, slots=True)
class Times:
    """What a crontab names; every part of it must hold."""

    minutes: frozenset[int]
    hours: frozenset[int]
    weekdays: frozenset[int]  # Sunday is 0
    days: frozenset[int]
    months: frozenset[int]

    def has(self, day: date) -> bool:
        """Whether this day is one of those."""
        return day.month in self.months and day.day in self.days and day.isoweekday() % 7 in self.weekdays


@dataclass(frozen=True, slots=True)
class Schedule:
    """When to start a flow, and what to do about slots that were missed or come too soon."""

    entry: Any  # for beat: a crontab or an interval in seconds
    every: Times | timedelta
    catch_up: CatchUp = "last"
    overlap: Overlap = "allow"

    def slots_before(self, moment: datetime, zone: tzinfo) -> Iterator[datetime]:
        """The slots up to this moment, that one included, the latest first; in UTC."""
        if isinstance(self.every, timedelta):
            return _multiples(self.every, moment)
        return _named_times(self.every, moment, zone)

    def slot_after(self, moment: datetime, zone: tzinfo) -> datetime | None:
        """The first slot after this moment, in UTC; None: it is farther away than anybody looks."""
        if isinstance(self.every, timedelta):
            return EPOCH + ((moment - EPOCH) // self.every + 1) * self.every
        days = _days(self.every, moment.astimezone(zone).date() - timedelta(days=1), 1)
        slots = (slot for day in days for slot in sorted(_slots_of(self.every, day, zone)))
        return next((slot for slot in slots if slot > moment), None)

    def due(self, now: datetime, last: datetime | None, zone: tzinfo) -> list[datetime]:
        """The slots to be started now, oldest first.

        Args:
            now: the database's clock.
            last: the last slot that was seen to; None: nobody has looked at this schedule before, so it begins now, and
                no slot that has passed is its own.
        """
        if last is None:
            return []
        on_time_since = now - timedelta(seconds=ON_TIME_SECONDS)
        slots: list[datetime] = []
        for slot in self.slots_before(now, zone):
            if slot <= last or len(slots) == MOST_SLOTS:
                break
            slots.append(slot)
        on_time = [slot for slot in slots if slot > on_time_since]
        missed = slots[len(on_time) :]
        if self.catch_up == "all":
            return [*on_time, *missed][::-1]
        return (missed[:1] if self.catch_up == "last" and not on_time else on_time)[::-1]


def refuse_without_schedule(name: str, catch_up: str, overlap: str) -> None:
    """Says nothing if a flow without a schedule is not told what to do about slots.

    Raises:
        InvalidData: it is; nobody would hear that it has none.
    """
    for option, given, default in ("catch_up", catch_up, "last"), ("overlap", overlap, "allow"):
        if given != default:
            raise InvalidData(f"{option} of flow {name}", "goes with schedule=, which is missing")


def parse_schedule(name: str, every: Any, catch_up: str, overlap: str) -> Schedule:
    """The schedule that a flow is defined with.

    Raises:
        InvalidData: naming the flow and what can be given.
    """
    for option, given, known in ("catch_up", catch_up, CatchUp), ("overlap", overlap, Overlap):
        if given not in get_args(known):
            raise InvalidData(f"flow {name}", f"{option} must be one of {', '.join(get_args(known))}")
    if (catch_up, overlap) == ("none", "wait"):
        raise InvalidData(f"flow {name}", "has slots that wait, and makes up for none: catch_up must be last or all")
    found = _times(every) if isinstance(every, crontab) else _interval(every)
    if isinstance(found, Times) and next(_named_times(found, datetime.now(UTC), UTC), None) is not None:
        return Schedule(every, found, catch_up, overlap)  # type: ignore[arg-type]
    if isinstance(found, timedelta) and found >= timedelta(seconds=1):
        return Schedule(found.total_seconds(), found, catch_up, overlap)  # type: ignore[arg-type]
    raise InvalidData(
        f"flow {name}", "its schedule must be a crontab that names days there are, or an interval of a second or more"
    )


def _times(every: Any) -> Times:
    parts = (every.minute, every.hour, every.day_of_week, every.day_of_month, every.month_of_year)
    return Times(*map(frozenset, parts))


def _interval(every: Any) -> timedelta | None:
    if isinstance(every, schedule):
        every = vars(every)["run_every"]
    if isinstance(every, int | float) and not isinstance(every, bool):
        with suppress(ValueError, OverflowError):  # not a number, or farther than time goes
            return timedelta(seconds=every)
    return every if isinstance(every, timedelta) else None


def _multiples(interval: timedelta, moment: datetime) -> Iterator[datetime]:
    number = (moment - EPOCH) // interval
    while number >= 0:
        yield EPOCH + number * interval
        number -= 1


EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def _named_times(times: Times, moment: datetime, zone: tzinfo) -> Iterator[datetime]:
    last = moment + timedelta(microseconds=1)
    tomorrow = moment.astimezone(zone).date() + timedelta(days=1)  # clocks that are set back may make it today again
    for day in _days(times, tomorrow, -1):
        for slot in sorted(_slots_of(times, day, zone), reverse=True):
            if slot < last:  # where clocks skip a day, its times fall on those of the next
                last = slot
                yield slot


def _days(times: Times, first: date, step: int) -> Iterator[date]:
    """The days that are named, from the first on; a step of -1 goes back."""
    days = (first + timedelta(days=number * step) for number in range(DAYS_ALL))
    return (day for day in days if times.has(day))


def _slots_of(times: Times, day: date, zone: tzinfo) -> set[datetime]:
    folds = (0, 1) if len(times.hours) == HOURS else (0,)
    return {
        datetime.combine(day, time(hour, minute, fold=fold), zone).astimezone(UTC)
        for hour in times.hours
        for minute in times.minutes
        for fold in folds
    }
