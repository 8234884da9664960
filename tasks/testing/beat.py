"""Beat, in the test's own process: it looks at the flows' schedules whenever a slot has come."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

from celery_flows.store import InvalidData
from celery_flows.tasks.registry import FlowDefinition
from celery_flows.tasks.runtime import Runtime
from celery_flows.tasks.schedule import ON_TIME_SECONDS, Schedule
from celery_flows.tasks.slots import try_to_start
from celery_flows.tasks.testing.asked import check_name
from celery_flows.tasks.testing.clock import FlowClock


class FlowBeat:
    """A beat on the clock of the test: where that passes, it starts the flows whose schedules say so.

    It began with the test. So no slot is due because of the machine's time, at which that happened to be.
    """

    def __init__(self, runtime: Runtime, clock: FlowClock) -> None:
        self._runtime, self._clock = runtime, clock
        self._began = clock.now()
        self._only: tuple[str, ...] | None = None  # None: all

    def only(self, *names: str) -> None:
        """Has it know the schedules of these flow definitions, and no others; without a name, none.

        Raises:
            InvalidData: it is no name, or there is no definition of it that has a schedule.
        """
        there = [each.name for each in self._runtime.registry if each.schedule is not None]
        for name in names:
            check_name("flow_beat.only", name)
            if name not in there:
                raise InvalidData("flow_beat.only", f"{name!r} has no schedule; there are {', '.join(there) or 'none'}")
        self._only = names

    # ---- for the kit ----

    def look(self) -> int:
        """Starts the flows whose slots are due; says how many."""
        return sum(try_to_start(self._runtime, each) for each, _ in self._known())

    def next_slot(self) -> datetime | None:
        """The first slot that is to come."""
        now, zone = self._clock.now(), self._runtime.app.timezone
        coming = (schedule.slot_after(now, zone) for _, schedule in self._known())
        return min((slot for slot in coming if slot is not None), default=None)

    def due_slots(self, schedule: Schedule, now: datetime, last: datetime | None) -> list[datetime]:
        """The slots that are to be started now. A schedule that nobody has looked at is no new one: beat was there."""
        last = now - timedelta(seconds=ON_TIME_SECONDS) if last is None else last
        return [slot for slot in schedule.due(now, last, self._runtime.app.timezone) if slot > self._began]

    def _known(self) -> Iterator[tuple[FlowDefinition[Any, Any], Schedule]]:
        for each in self._runtime.registry:
            if each.schedule is not None and (self._only is None or each.name in self._only):
                yield each, each.schedule
