"""Retention: ended flows are deleted once they have been kept for long enough, their steps and events with them.

A batch is a transaction of its own, and passes over what others have locked; so any number may prune at once, nobody
waits for it for longer than a batch takes, and whoever is interrupted has lost nothing: the next one goes on. What is
past its retention is found by an index over just that, without looking at what is kept.

What a batch deletes is handed to an archive first, in the same transaction: what it does not take is not deleted, and
what was not deleted after all it is handed again.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy import Connection

from celery_flows.store.errors import InvalidData
from celery_flows.store.models import TERMINAL, Flow, FlowEvent, FlowStatus, FlowStep, Record
from celery_flows.store.operations import now, reads, writes
from celery_flows.store.script import Call, Pause, Script, attempts
from celery_flows.store.tables import EVENT_COLUMNS, FLOW_COLUMNS, UtcDateTime, flow_events, flow_steps, flows

BATCH = 500  # flows: larger ones were little quicker, and hold their locks for longer
PAUSE = 0.1  # of a batch's own time, after it: what else is done in the database gets its turn

Archive = Callable[[Sequence[str]], object]
Progress = Callable[[int], object]

_f = flows.c


@dataclass(frozen=True, slots=True)
class Retention:
    """For how many days ended flows are kept that say nothing of it themselves.

    Raises:
        InvalidData: a number is negative.
    """

    days: float  # those that finished or were cancelled
    failed_days: float

    def __post_init__(self) -> None:
        if self.days < 0:
            raise InvalidData("retain_days", "must not be negative")
        if self.failed_days < 0:
            raise InvalidData("retain_failed_days", "must not be negative")


@dataclass(frozen=True, slots=True)
class Past:
    """Flows that are past their retention: those of this status, kept for so long, that ended before then."""

    retain_seconds: int | None  # as the flows themselves say
    status: FlowStatus
    before: datetime


@dataclass(frozen=True, slots=True)
class Batch:
    """How many flows were deleted, and the last that was looked at; None: there was none."""

    count: int
    last: tuple[datetime, UUID] | None


class Whole(Record):
    """All that is known of a flow: what an archive is handed, as JSON."""

    flow: Flow
    steps: list[FlowStep]  # oldest first
    events: list[FlowEvent]  # oldest first


def prune(retention: Retention, *, archive: Archive | None = None, progress: Progress | None = None) -> Script[int]:
    """Deletes all that is past its retention, batch by batch; says how many flows.

    A flow that says for how long it is kept is kept for so long. A child whose parent is open is kept.

    Args:
        archive: is handed what is about to be deleted, a line of JSON for each flow (a :class:`Whole`), within the
            transaction; what it raises is raised here, and its batch is not deleted.
        progress: is told how many flows have been deleted so far, after each batch.
    """
    pruned = 0
    past: list[Past] = yield from attempts(Call(list_past, (retention,)))
    for each in past:
        last = None
        while True:
            began = time.monotonic()
            batch: Batch = yield from attempts(Call(prune_batch, (each, last, BATCH, archive)))
            if (last := batch.last) is None:
                break
            pruned += batch.count
            if progress is not None:
                progress(pruned)
            yield Pause(PAUSE * (time.monotonic() - began))
    return pruned


def count(retention: Retention, most: int) -> Script[int]:
    """How many flows :func:`prune` would delete now; it stops counting at ``most``."""
    counted = 0
    past: list[Past] = yield from attempts(Call(list_past, (retention,)))
    for each in past:
        counted += yield from attempts(Call(count_past, (each, most - counted)))
    return counted


@reads
def list_past(conn: Connection, retention: Retention) -> list[Past]:
    """What there is to look for; costs a look into the index for each retention that some flow has of its own."""
    at = now(conn)
    past: list[Past] = []
    for retain_seconds in [None, *_own_retentions(conn)]:
        for status in sorted(TERMINAL):
            days = retention.failed_days if status is FlowStatus.FAILED else retention.days
            kept = days * 86_400 if retain_seconds is None else retain_seconds
            try:
                past.append(Past(retain_seconds, status, at - timedelta(seconds=kept)))
            except OverflowError:  # for ever
                continue
    return past


def _own_retentions(conn: Connection) -> Iterator[int]:
    last = -1
    while True:
        following = sa.select(sa.func.min(_f.retain_seconds)).where(
            _f.retain_seconds > last, _f.finished_at.isnot(None)
        )
        found = conn.scalar(following)
        if found is None:
            return
        yield (last := found)


@reads
def count_past(conn: Connection, past: Past, most: int) -> int:
    """How many flows these are; ``most`` at most."""
    some = _ids(past, None).limit(most).subquery()
    return conn.scalar(sa.select(sa.func.count()).select_from(some)) or 0


@writes
def prune_batch(
    conn: Connection, past: Past, after: tuple[datetime, UUID] | None, size: int, archive: Archive | None = None
) -> Batch:
    """Deletes at most ``size`` of these flows: the first that ended, after the one of this time and id."""
    chosen = _ids(past, after).order_by(_f.finished_at, _f.id).limit(size).with_for_update(skip_locked=True, of=flows)
    ids: Any = sa.select(chosen.cte("chosen").c.id)
    if archive is not None:
        ids = [row.id for row in conn.execute(chosen)]
        archive(_lines(conn, ids))
    deleted = conn.execute(sa.delete(flows).where(_f.id.in_(ids)).returning(_f.finished_at, _f.id)).all()
    return Batch(len(deleted), max(((row.finished_at, row.id) for row in deleted), default=None))


def _ids(past: Past, after: tuple[datetime, UUID] | None) -> sa.Select[Any]:
    parent = flows.alias("parent")
    # Looked up for each flow: a join would be planned over the whole table.
    has_ended = sa.select(parent.c.finished_at.isnot(None)).where(parent.c.id == _f.parent_flow_id).scalar_subquery()
    kept = _f.retain_seconds.is_(None) if past.retain_seconds is None else _f.retain_seconds == past.retain_seconds
    chosen = sa.select(_f.finished_at, _f.id).where(
        kept,
        _f.status == past.status,
        _f.finished_at < sa.literal(past.before, UtcDateTime()),
        sa.func.coalesce(has_ended, sa.true()),
    )
    if after is None:
        return chosen
    at, flow_id = sa.literal(after[0], UtcDateTime()), sa.literal(after[1], sa.Uuid())
    return chosen.where(sa.tuple_(_f.finished_at, _f.id) > sa.tuple_(at, flow_id))


def _lines(conn: Connection, ids: Sequence[UUID]) -> list[str]:
    steps, events = defaultdict[UUID, list[FlowStep]](list), defaultdict[UUID, list[FlowEvent]](list)
    s, e = flow_steps.c, flow_events.c
    for row in conn.execute(sa.select(flow_steps).where(s.flow_id.in_(ids)).order_by(s.created_at, s.id)).mappings():
        steps[row["flow_id"]].append(FlowStep.of_row(row))
    for row in conn.execute(sa.select(*EVENT_COLUMNS).where(e.flow_id.in_(ids)).order_by(e.id)).mappings():
        events[row["flow_id"]].append(FlowEvent.of_row(row))
    ended = conn.execute(sa.select(*FLOW_COLUMNS).where(_f.id.in_(ids)).order_by(_f.finished_at, _f.id)).mappings()
    whole = (Whole.of_row({"flow": Flow.of_row(r), "steps": steps[r["id"]], "events": events[r["id"]]}) for r in ended)
    return [each.model_dump_json() for each in whole]
