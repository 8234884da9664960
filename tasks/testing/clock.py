"""The clock of a test: of the database and of this process, and nobody moves it but the test.

The store's statements read the time of the database by one expression in each dialect. Where a statement leaves for the
database, that expression is replaced by this clock's time: so it needs no rights in the database and nothing made
there, works on the application's own connections too, and statements are as they are outside of tests.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event

from celery_flows.store import clock, postgresql, sqlite
from celery_flows.store.errors import InvalidData
from celery_flows.tasks.testing.replaced import replaced

TICK = timedelta(microseconds=1)


class FlowClock:
    """Time stands still until the test moves it, but for a microsecond at each reading: what is later, is later.

    Flows, timers, leases, retries' pauses and every time in the store follow it. The clock of the machine, and with it
    ``datetime.now()``, does not.
    """

    def __init__(self) -> None:
        self._began = datetime.now(UTC)
        self._passed = timedelta()  # as the test has moved it
        self._ticks = itertools.count(1)
        self._ticked = 0
        self._meanwhile: Callable[[datetime], None] = self.move_to
        self._watch: Callable[[], None] | None = None
        self._watcher = 0  # the thread that is watched

    def now(self) -> datetime:
        """The time, in UTC."""
        return self._began + self._passed + self._ticked * TICK

    def advance(self, duration: timedelta | None = None, /, **units: float) -> None:
        """Lets time pass: ``advance(days=90)``, in the units of :class:`~datetime.timedelta`, or a timedelta.

        Workers and beat are there meanwhile: what falls due on the way is done at its own time, in order, and the flows
        whose schedules say so begin. Inside a step it only passes: the step takes that long.

        Raises:
            InvalidData: it is no duration, or goes back.
        """
        passes = _duration(duration, units)
        if passes < timedelta():
            raise self._goes_back()
        self._meanwhile(self.now())  # what is to be done now, takes a few ticks
        self._meanwhile(self.now() + passes)

    def advance_to(self, at: datetime) -> None:
        """Lets time pass until an aware time, as :meth:`advance` does.

        Raises:
            InvalidData: that is past, or naive, or no time.
        """
        at = _moment("flow_clock.advance_to", at)
        if at < self.now():
            raise self._goes_back()
        self._meanwhile(at)

    def move_to(self, at: datetime) -> None:
        """It is that time now, and nothing has happened meanwhile: neither worker nor beat was there. A time that has
        passed is no move.

        Raises:
            InvalidData: it is naive, or no time.
        """
        self._passed += max(_moment("flow_clock.move_to", at) - self.now(), timedelta())

    def _goes_back(self) -> InvalidData:
        now = f"{self.now():%Y-%m-%d %H:%M:%S}"
        return InvalidData("flow_clock", f"does not go back, and it is {now} UTC: reckon from flow_clock.now()")

    # ---- for the kit ----

    def works(self, meanwhile: Callable[[datetime], None]) -> None:
        """Who does what falls due until a time, and moves the clock there."""
        self._meanwhile = meanwhile

    def read(self) -> datetime:
        """The time, a tick later than at the last reading."""
        self._ticked = next(self._ticks)
        return self.now()

    @contextmanager
    def watched(self, watch: Callable[[], None]) -> Iterator[None]:
        """Has ``watch`` called before each statement of this thread; what it raises, stops whoever wants to make it."""
        with replaced(self, _watch=watch, _watcher=threading.get_ident()):
            yield

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The store's statements, and what measures leases, go by this clock."""
        event.listen(sa.Engine, "before_cursor_execute", self._tell, retval=True)
        try:
            with replaced(clock, read=self._seconds):
                yield
        finally:
            event.remove(sa.Engine, "before_cursor_execute", self._tell)

    def _seconds(self) -> float:
        return (self.read() - self._began).total_seconds()

    def _tell(
        self, connection: sa.Connection, _cursor: Any, statement: str, parameters: Any, _context: Any, _many: bool
    ) -> tuple[str, Any]:
        if self._watch is not None and threading.get_ident() == self._watcher:
            self._watch()
        at = self.read()
        if connection.dialect.name == "postgresql":
            statement = statement.replace(postgresql.NOW, f"CAST('{at.isoformat()}' AS timestamptz)")
        else:
            statement = statement.replace(sqlite.NOW, at.strftime("'%Y-%m-%d %H:%M:%S.%f'"))
        return statement, parameters


def _duration(duration: Any, units: dict[str, float]) -> timedelta:
    try:
        given = timedelta(**units)
    except TypeError as error:
        raise InvalidData("flow_clock.advance", f"takes the units of timedelta, as in days=90 ({error})") from None
    if duration is None:
        return given
    if not isinstance(duration, timedelta):
        takes = "takes a timedelta, or a number with its unit, as in seconds=60; advance_to(…) takes a time"
        raise InvalidData("flow_clock.advance", f"{takes}; not {duration!r}")
    return given + duration


def _moment(where: str, at: Any) -> datetime:
    if not isinstance(at, datetime):
        raise InvalidData(where, f"takes a datetime, not {at!r}; advance(…) takes how long")
    return clock.as_utc(where, at)
