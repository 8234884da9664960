"""How much there is of everything, at a cost that does not grow with it.

Nothing here counts a whole table. A count stops at :data:`BOUND`; beyond that PostgreSQL's planner says what it
expects, by the statistics of its last ANALYZE, and SQLite, which keeps none, says nothing more.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy import Connection

from celery_flows.store.models import FlowStatus
from celery_flows.store.operations import dialect, now, reads, reads_snapshot
from celery_flows.store.tables import UtcDateTime, flow_dispatch, flow_inbox, flows

BOUND = 10_000  # rows that are looked at, at most, for one figure
HOUR = timedelta(hours=1)

_d, _f, _i = flow_dispatch.c, flows.c, flow_inbox.c


@dataclass(frozen=True, slots=True)
class Count:
    """A number, and how far it can be relied on."""

    number: int
    precision: Literal["exact", "estimate", "at least"] = "exact"

    def __str__(self) -> str:
        return {"exact": "", "estimate": "about ", "at least": "over "}[self.precision] + f"{self.number:,}"


@dataclass(frozen=True, slots=True)
class Waiting:
    """Rows that wait for something, and since when the first of them."""

    count: Count
    since: datetime | None


@dataclass(frozen=True, slots=True)
class Recent:
    """The flows created last: how many of each definition are in which status."""

    flows: int  # all of them; at most BOUND
    since: datetime | None  # when the first of them was created
    definitions: dict[str, dict[FlowStatus, int]]


@dataclass(frozen=True, slots=True)
class Work:
    """What stands in ``flow_dispatch``."""

    due: Waiting  # that no worker holds, and that the sweep should have looked at by now
    published: Count  # whose message is sent, and that no worker has claimed yet
    leases: Count  # held by workers
    workers: tuple[str, ...]  # their tokens, as far as they were counted
    queued: Waiting  # flows, for a slot of their limit
    next_due_at: datetime | None


@dataclass(frozen=True, slots=True)
class Statistics:
    """How much there is, as of one moment by the database's clock."""

    at: datetime
    flows: dict[FlowStatus, Count]
    last_hour: dict[FlowStatus, Count]  # that came to this status, and are in it still
    recent: Recent
    work: Work
    inbox: Waiting  # external events that are kept until a flow waits for them


@reads_snapshot
def take(conn: Connection, published_seconds: float) -> Statistics:
    """Reads it all.

    Args:
        published_seconds: the longest pause after which a published message that nobody took is sent again.
    """
    at = now(conn)
    since = sa.literal(at - HOUR, UtcDateTime())
    return Statistics(
        at=at,
        flows={status: _count(conn, _of(status)) for status in FlowStatus},
        last_hour={status: _count(conn, _of(status).where(_f.rest_at >= since)) for status in FlowStatus},
        recent=_recent(conn),
        work=_work(conn, at, published_seconds),
        inbox=_waiting(conn, sa.select(_i.created_at).where(_i.consumed_by.is_(None))),
    )


@reads
def count_flows(conn: Connection) -> Count:
    """How many flows there are, in whatever status."""
    return _count(conn, sa.select(_f.id))


def _of(status: FlowStatus) -> sa.Select[Any]:
    # Ordered, so that an index is followed: without, the whole table is read in the hope of a full page.
    return sa.select(_f.id).where(_f.status == status).order_by(_f.rest_at.desc())


def _count(conn: Connection, query: sa.Select[Any]) -> Count:
    limited = query.limit(BOUND + 1).subquery()
    number = conn.scalar(sa.select(sa.func.count()).select_from(limited)) or 0
    if number <= BOUND:
        return Count(number)
    planned = dialect(conn).planned_rows(conn, query)
    # Tables that were never analysed are thought to be small.
    known = planned is not None and planned > BOUND
    return Count(planned, "estimate") if known else Count(BOUND, "at least")


def _waiting(conn: Connection, times: sa.Select[Any]) -> Waiting:
    """Of a query that gives one time a row. Beyond the bound, the first time is that of the rows looked at."""
    limited = times.limit(BOUND + 1).subquery()
    number, since = conn.execute(sa.select(sa.func.count(), sa.func.min(limited.c[0]))).one()
    return Waiting(Count(number) if number <= BOUND else Count(BOUND, "at least"), since)


def _recent(conn: Connection) -> Recent:
    latest = sa.select(_f.controller_id, _f.status, _f.created_at).order_by(_f.created_at.desc(), _f.id.desc())
    of = latest.limit(BOUND).subquery().c
    grouped = sa.select(of.controller_id, of.status, sa.func.count(), sa.func.min(of.created_at))
    rows = conn.execute(grouped.group_by(of.controller_id, of.status).order_by(of.controller_id)).all()
    definitions: dict[str, dict[FlowStatus, int]] = {}
    for name, status, count, _ in rows:
        definitions.setdefault(name, {})[status] = count
    return Recent(sum(row[2] for row in rows), min((row[3] for row in rows), default=None), definitions)


def _work(conn: Connection, at: datetime, published_seconds: float) -> Work:
    moment = sa.literal(at, UtcDateTime())
    soon = sa.literal(at + timedelta(seconds=published_seconds), UtcDateTime())
    free = _d.worker.is_(None)
    by_due = sa.select(_d.due_at).order_by(_d.due_at)
    # A published row is due again when it is to be published once more: so it is found by that, not by a walk.
    near = sa.select(_d.publish_count).where(free, _d.due_at <= soon).order_by(_d.due_at).limit(BOUND).subquery()
    published = conn.scalar(sa.select(sa.func.count()).select_from(near).where(near.c.publish_count > 0)) or 0
    looked_at = conn.scalar(sa.select(sa.func.count()).select_from(near)) or 0
    held = list(conn.scalars(sa.select(_d.worker).where(_d.worker.isnot(None)).limit(BOUND + 1)))
    return Work(
        due=_waiting(conn, by_due.where(free, _d.due_at <= moment)),
        published=Count(published, "at least" if looked_at == BOUND else "exact"),
        leases=Count(len(held)) if len(held) <= BOUND else Count(BOUND, "at least"),
        workers=tuple(sorted(Counter(held))),
        queued=_waiting(conn, sa.select(_d.queued_at).where(_d.queued_at.isnot(None))),
        next_due_at=conn.scalar(by_due.where(_d.due_at > moment).limit(1)),
    )
