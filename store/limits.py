"""Limits: how many flows may be at work, and how many may begin within some time, of those that share a limit's key.

A limited flow has a slot while it is at work. Slots are given under the lock of the limit's row in ``flow_limits``, one
giver at a time, each counting anew in a statement after the lock; they are freed by a mere write of the drive row. So a
count may be too high for a moment, never too low. A slot is a column of the row that is its holder's lease: it cannot
outlive the flow, and after a crash the flow still has it, is offered to workers again, and goes on.

Who frees a slot gives it on afterwards, in a transaction of its own. Should it die in between, or not know that there
was one (a flow is ended by hand), a sweep does so: while somebody queues, the limit's row falls due again and again.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy import Connection

from celery_flows.store.dispatch import Hint, is_claimable
from celery_flows.store.models import TERMINAL
from celery_flows.store.operations import insert_into, lock_flow, now, reads, writes, writes_once
from celery_flows.store.tables import IS_PAUSED, UtcDateTime, flow_dispatch, flow_events, flow_limits, flows

_d, _l = flow_dispatch.c, flow_limits.c
_PAUSED = sa.exists().where(flows.c.id == _d.flow_id, IS_PAUSED)
_IN_QUEUE = _d.queued_at.isnot(None)

AT_ONCE = 100  # slots that are given in one transaction
POLL_SECONDS = 1.0  # before somebody looks whether a slot was freed, should nobody have said so
RATE_POLL_SECONDS = 60.0  # at most, where a rate says when the next one may begin
IDLE_SECONDS = 3600.0  # before somebody looks whether a limit is still in use
NEVER_YET = datetime(1970, 1, 1, tzinfo=UTC)  # until the transaction that makes the row says when
FORGOTTEN_SECONDS = 86_400.0  # after which an unused limit goes whose definition nobody knows


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a limit lets through; None: whatever comes."""

    at_once: int | None = None  # flows that have a slot
    starts: int | None = None  # flows that begin within any window
    window_seconds: float = 0.0

    def recent(self, starts: Sequence[float], at: float) -> list[float]:
        """Those of these starts that still count."""
        return [] if self.starts is None else [start for start in starts if start > at - self.window_seconds]


@dataclass(frozen=True, slots=True)
class Waiting:
    """A limited flow that is due and has no slot."""

    definition: str
    priority: int | None


@dataclass(frozen=True, slots=True)
class Admission:
    """What came of asking for a slot."""

    has_slot: bool
    others: list[Hint]  # flows that were given one besides: their workers are to be called


# ---- who asks for a slot --------------------------------------------------------------------------------------------


@reads
def find_waiting(conn: Connection, flow_id: UUID) -> Waiting | None:
    """The flow, if all that keeps it from being claimed may be that it has no slot."""
    asked = sa.select(_d.task, _d.priority).where(_without_slot(flow_id, now(conn)))
    row = conn.execute(asked).first()
    return None if row is None else Waiting(*row)


def _without_slot(flow_id: UUID, at: datetime) -> sa.ColumnElement[bool]:
    limited = sa.and_(_d.run_id == str(flow_id), _d.limit_key.isnot(None), ~_d.has_slot)
    return sa.and_(limited, _d.worker.is_(None), is_claimable(at))


@writes
def admit(conn: Connection, flow_id: UUID, bounds: Bounds, urgency: int, first_pause: float) -> Admission:
    """Has a flow that is due take its place in the queue, and gives free slots to those who are next.

    Args:
        urgency: which of the queue come first: the lowest, and of these the longest in it.
        first_pause: seconds before the sweep publishes those that were given a slot again.
    """
    flow = lock_flow(conn, flow_id)  # in the claim's order; and a cancel that is under way is seen, or comes after
    at = now(conn)
    if flow is None or flow.status in TERMINAL or flow.paused_at is not None or flow.cancel_requested:
        return Admission(False, [])
    if flow.deadline_at is not None and flow.deadline_at <= at:
        return Admission(False, [])
    queued = sa.update(flow_dispatch).where(_without_slot(flow_id, at))
    queued = queued.values(
        queued_at=sa.func.coalesce(_d.queued_at, sa.literal(at, UtcDateTime())), urgency=urgency,
        publish_count=0, due_at=flow.deadline_at,
    )  # fmt: skip
    row = conn.execute(queued.returning(_d.limit_key, _d.task)).first()
    if row is None:  # somebody else was here, or this is asked again after a lost reply
        has_slot = sa.select(_d.has_slot).where(_d.run_id == str(flow_id), _d.worker.is_(None))
        return Admission(bool(conn.scalar(has_slot)), [])
    given = settle(conn, row.limit_key, row.task, bounds, first_pause)
    others = [hint for hint in given if hint.flow_id != flow_id]
    return Admission(len(others) < len(given), others)


# ---- who gives slots ------------------------------------------------------------------------------------------------


@writes
def settle(conn: Connection, key: str, definition: str, bounds: Bounds, first_pause: float) -> list[Hint]:
    """Gives what is free of a limit to those who are next, and says who they are: their workers are to be called."""
    log = _lock(conn, key, definition)
    at = now(conn)
    to_begin, began = _begun(conn, log) if bounds.starts is not None else ([], [])
    recent = bounds.recent(began, at.timestamp())
    free = AT_ONCE
    if bounds.at_once is not None:
        free = min(AT_ONCE, max(0, bounds.at_once - _count(conn, key)))
    may_begin = free if bounds.starts is None else min(free, max(0, bounds.starts - len(recent) - len(to_begin)))
    given = _next(conn, key, free, may_begin)
    _give(conn, [row.run_id for row in given], at + timedelta(seconds=first_pause))
    pause = 0.0 if len(given) == AT_ONCE else POLL_SECONDS
    if bounds.starts is not None:
        to_begin += [str(row.flow_id) for row in given if row.fence == 0]
        starts = [*recent, *[at.timestamp()] * len(to_begin)]
        if len(given) < free and len(starts) >= bounds.starts:
            # Who still queues has yet to begin: others would have been given the slots that are left.
            pause = min(starts[-bounds.starts] + bounds.window_seconds - at.timestamp(), RATE_POLL_SECONDS)
    _look_again(conn, key, bounds, [*recent, *to_begin], at, pause)
    return [Hint(row.run_id, row.flow_id, row.kind, row.task, row.queue, row.priority, row.options) for row in given]


def _lock(conn: Connection, key: str, definition: str) -> list[float | str]:
    """Takes the limit's row, which is made if it is not there; gives its log of starts."""
    made = insert_into(conn, flow_limits).values(key=key, definition=definition, due_at=NEVER_YET, recent_starts=[])
    locked = made.on_conflict_do_update(index_elements=["key"], set_={"definition": definition})
    log: list[float | str] = conn.execute(locked.returning(_l.recent_starts)).scalar_one()
    return log


def _begun(conn: Connection, log: Sequence[float | str]) -> tuple[list[str], list[float]]:
    """Of the flows that were let begin: those that have not by now, be it that no worker is free, and when the others
    did. Those are counted by their start, and these as if it were now."""
    began = [entry for entry in log if not isinstance(entry, str)]
    named = [UUID(entry) for entry in log if isinstance(entry, str)]
    if not named:
        return [], began
    # In this order: one that begins in between has its event then.
    yet_to = sa.select(_d.flow_id).where(_d.run_id.in_([str(each) for each in named]), _d.has_slot, _d.fence == 0)
    waiting = set(conn.scalars(yet_to))
    started = sa.and_(flow_events.c.flow_id.in_(named), flow_events.c.kind == "started")
    starts = {
        row.flow_id: row.at for row in conn.execute(sa.select(flow_events.c.flow_id, flow_events.c.at).where(started))
    }
    began += [at.timestamp() for at in starts.values()]
    return [str(each) for each in named if each in waiting - starts.keys()], sorted(began)


def _count(conn: Connection, key: str) -> int:
    """How many have a slot. A flow that was paused while nobody drove it is not at work, and cannot be claimed to free
    its own: that is done here."""
    held = sa.and_(_d.limit_key == key, _d.has_slot)
    idle = sa.and_(held, _d.worker.is_(None), _d.open_members == 0, _PAUSED)
    count, unused = conn.execute(sa.select(sa.func.count(), sa.func.count().filter(idle)).where(held)).one()
    if not unused:
        return int(count)
    found = sa.select(_d.run_id).where(idle).with_for_update(of=flow_dispatch, skip_locked=True)
    run_ids = conn.scalars(found).all()
    conn.execute(sa.update(flow_dispatch).where(_d.run_id.in_(run_ids)).values(has_slot=False))
    return int(count) - len(run_ids)


def _next(conn: Connection, key: str, free: int, may_begin: int) -> Sequence[sa.Row[Any]]:
    """Those who are next; rows that somebody holds locked are left for the next time."""
    if may_begin == free:
        return _first(conn, key, free)
    begun, new = _first(conn, key, free, _d.fence > 0), _first(conn, key, may_begin, _d.fence == 0)
    return sorted([*begun, *new], key=lambda row: (row.urgency, row.queued_at, row.run_id))[:free]


def _first(conn: Connection, key: str, limit: int, *where: sa.ColumnElement[bool]) -> Sequence[sa.Row[Any]]:
    if limit == 0:
        return []
    queue = sa.select(flow_dispatch).where(_queues(key), *where).order_by(_d.urgency, _d.queued_at, _d.run_id)
    return conn.execute(queue.limit(limit).with_for_update(of=flow_dispatch, skip_locked=True)).all()


def _queues(key: str) -> sa.ColumnElement[bool]:
    return sa.and_(_d.limit_key == key, _IN_QUEUE, ~_PAUSED)


def _give(conn: Connection, run_ids: Sequence[str], due_at: datetime) -> None:
    if not run_ids:
        return
    given = {"has_slot": True, "queued_at": None, "urgency": None, "publish_count": 1, "due_at": due_at}
    conn.execute(sa.update(flow_dispatch).where(_d.run_id.in_(run_ids)).values(given))


def _look_again(
    conn: Connection, key: str, bounds: Bounds, log: Sequence[float | str], at: datetime, pause: float
) -> None:
    """Says when somebody must look again, ``pause`` seconds from now if somebody queues; or that the limit is out of
    use."""
    mine = _l.key == key
    of_key = sa.exists().where(_d.limit_key == key)
    asked = sa.select(sa.exists().where(_queues(key)), of_key.where(_d.has_slot), of_key.where(_IN_QUEUE))
    queues, holds, is_paused = conn.execute(asked).one()
    if not queues:
        if holds or is_paused:
            pause = IDLE_SECONDS
        elif log:
            last = max((entry for entry in log if not isinstance(entry, str)), default=at.timestamp())
            pause = last + bounds.window_seconds - at.timestamp()
        else:
            conn.execute(sa.delete(flow_limits).where(mine))
            return
    due_at = at + timedelta(seconds=pause)
    conn.execute(sa.update(flow_limits).where(mine).values(due_at=due_at, recent_starts=list(log)))


# ---- who looks whether slots are free -------------------------------------------------------------------------------


@reads
def list_due(conn: Connection, definitions: Collection[str], limit: int) -> list[tuple[str, str]]:
    """Limits of these definitions that somebody must look at: key and definition. Those of others are left to workers
    that know them."""
    due = sa.and_(_l.due_at <= sa.literal(now(conn), UtcDateTime()), _l.definition.in_(definitions))
    rows = conn.execute(sa.select(_l.key, _l.definition).where(due).order_by(_l.due_at).limit(limit))
    return [(row.key, row.definition) for row in rows]


@writes_once
def prune(conn: Connection) -> int:
    """Deletes limits that are out of use and that nobody has looked at for a day: no worker knows their definitions."""
    before = sa.literal(now(conn) - timedelta(seconds=FORGOTTEN_SECONDS), UtcDateTime())
    used = sa.exists().where(_d.limit_key == _l.key, sa.or_(_d.has_slot, _IN_QUEUE))
    return conn.execute(sa.delete(flow_limits).where(_l.due_at < before, ~used)).rowcount


# ---- who is asked ---------------------------------------------------------------------------------------------------


@reads
def queued_since(conn: Connection, flow_id: UUID) -> datetime | None:
    """Since when the flow has queued for a slot; None: it does not."""
    return conn.scalar(sa.select(_d.queued_at).where(_d.run_id == str(flow_id)))
