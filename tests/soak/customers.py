"""The customers: start flows, no more than may be open at once, send the events that these wait for, cancel some."""

from __future__ import annotations

import itertools
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from uuid import UUID, uuid4

import sqlalchemy as sa

from celery_flows import AlreadyTerminal, FlowStatus
from celery_flows.store import FlowError
from celery_flows.store.operations import reads
from celery_flows.store.tables import flows
from tests.soak.application import TOPIC, Application, Kind, Order

MAX_OPEN = 20  # two cores are to be busy, not drowned, and little is to wait for want of a process
SHARERS = 3  # flows that wait for events of one key
EVENT_SECONDS, CANCEL_SECONDS = (0.0, 3.0), (0.0, 3.0)  # after the start
AGAIN_SECONDS = 1.0  # after a failure


@dataclass
class Customers:
    """What they have started, and what they mean to do."""

    application: Application
    rng: random.Random
    name: str = field(default_factory=lambda: f"soak {uuid4().hex[:8]}")  # in a database that others have used
    started: dict[UUID, Kind] = field(default_factory=dict)
    open: set[UUID] = field(default_factory=set)
    refused: Counter[str] = field(default_factory=Counter)  # calls that could not be made, and were made again
    _plans: list[tuple[float, Callable[[], object]]] = field(default_factory=list)
    _pending: tuple[Kind, str, Order] | None = None  # what is to be started next
    _numbers: itertools.count[int] = field(default_factory=itertools.count)
    _events: itertools.count[int] = field(default_factory=itertools.count)

    def tick(self, *, starting: bool) -> None:
        """Does what is due; with ``starting``, starts flows until there are as many as may be."""
        self._settle()
        while starting and len(self.open) < MAX_OPEN and self._start():
            pass
        now = time.monotonic()
        due = [plan for plan in self._plans if plan[0] <= now]
        self._plans = [plan for plan in self._plans if plan[0] > now]
        for _, action in due:
            if not self._try(action):
                self._plan((AGAIN_SECONDS, AGAIN_SECONDS), action)

    def anything_open(self) -> bool:
        """Whether a flow is open, be it a child whose parent has ended."""
        found: list[bool] = []
        return not self._try(lambda: found.append(self.application.flows.store.run(is_open, self.name))) or found[0]

    def _settle(self) -> None:
        """Strikes off those that have ended."""

        def look() -> None:
            ended = self.application.flows.store.run(ended_of, list(self.open))
            self.open.difference_update(ended)

        self._try(look)

    def _start(self) -> bool:
        """Starts the next flow; a start that failed is made again with its key, so that it cannot start two."""
        if self._pending is None:
            number = next(self._numbers)
            ours = [kind for kind in self.application.kinds if not kind.by_parents]
            kind = self.rng.choice(ours)
            group = f"shared {number // (SHARERS * len(ours))}" if kind.shares else f"own {number}"
            self._pending = kind, f"{self.name} {number}", Order(key=f"{self.name} {kind.name} {group}")
        kind, key, order = self._pending

        def start() -> None:
            handle = kind.definition.start(order, key=key, owner=self.name)
            self.started[handle.id] = kind
            self.open.add(handle.id)
            self._pending = None
            self._plan_for(kind, handle.id, order)

        return self._try(start)

    def _plan_for(self, kind: Kind, flow_id: UUID, order: Order) -> None:
        """As many events as a flow waits for; where it need not wait for ever, one half of the time."""
        for _ in range(kind.hears):
            if self.rng.random() < (1.0 if kind.patient else 0.5):
                self._plan(EVENT_SECONDS, lambda: self._emit(order.key))
        if kind.cancelled:
            self._plan(CANCEL_SECONDS, lambda: self._cancel(flow_id))

    def _plan(self, between: tuple[float, float], action: Callable[[], object]) -> None:
        self._plans.append((time.monotonic() + self.rng.uniform(*between), action))

    def _emit(self, key: str) -> None:
        self.application.flows.emit(TOPIC, key, {"number": next(self._events)})

    def _cancel(self, flow_id: UUID) -> None:
        try:
            self.application.flows.handle(flow_id).cancel()
        except AlreadyTerminal:
            self.refused["cancelled too late"] += 1

    def _try(self, action: Callable[[], object]) -> bool:
        try:
            action()
        except FlowError as error:
            self.refused[type(error).__name__] += 1
            return False
        return True


@reads
def is_open(conn: sa.Connection, owner: str) -> bool:
    """Whether one of this owner's flows is."""
    theirs = sa.select(flows.c.id).where(flows.c.owner_session_key == owner, flows.c.finished_at.is_(None))
    return conn.execute(theirs.limit(1)).first() is not None


@reads
def ended_of(conn: sa.Connection, flow_ids: Sequence[UUID]) -> list[UUID]:
    """Those of these flows that have ended."""
    ended = [status for status in FlowStatus if status.is_terminal]
    return list(
        conn.execute(sa.select(flows.c.id).where(flows.c.id.in_(flow_ids), flows.c.status.in_(ended))).scalars()
    )
