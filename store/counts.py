"""What stands in the store, counted: for metrics.

Nothing here reads what has ended. The cost follows the flows that are open and the work that is due, not the rows of
the tables; whoever asks often is to keep the answer for a while. For a person to look at there is statistics.py, whose
figures stop at a bound; a curve needs the number, by definition.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

import sqlalchemy as sa
from sqlalchemy import Connection

from celery_flows.store.models import OPEN, FlowStatus
from celery_flows.store.operations import now, reads_snapshot
from celery_flows.store.tables import UtcDateTime, flow_dispatch, flow_heartbeats, flows

_d = flow_dispatch.c


@dataclass(frozen=True, slots=True)
class Waiting:
    """Rows of a kind that are due, or published, and that no worker holds."""

    kind: str
    count: int
    oldest_seconds: float  # how long the one has waited that has done so for the longest


@dataclass(frozen=True, slots=True)
class Counts:
    """What stands in the store, as of one moment."""

    open_flows: list[tuple[str, FlowStatus, int]]  # by definition and status
    waiting: list[Waiting]
    held: list[tuple[str, int]]  # leases, by kind
    queued: list[tuple[str, int]]  # for a slot of a limit, by definition
    silent_seconds: dict[str, float]  # since each chore's last heartbeat


@reads_snapshot
def count(conn: Connection, first_pause: float, max_pause: float, chores: tuple[str, ...]) -> Counts:
    """Counts what is open, due, held and queued.

    Args:
        first_pause, max_pause: between two publishings of a row, in seconds: ``due_at`` of a row that was published is
            that much later than it was published.
        chores: whose heartbeats are wanted.
    """
    at = now(conn)
    f = flows.c
    by_status = sa.select(f.controller_id, f.status, sa.func.count()).where(f.status.in_(OPEN))
    held = sa.select(_d.kind, sa.func.count()).where(_d.worker.isnot(None)).group_by(_d.kind)
    queued = sa.select(_d.task, sa.func.count()).where(_d.queued_at.isnot(None)).group_by(_d.task)
    beats = sa.select(flow_heartbeats.c.name, flow_heartbeats.c.at).where(flow_heartbeats.c.name.in_(chores))
    return Counts(
        [(row[0], row[1], row[2]) for row in conn.execute(by_status.group_by(f.controller_id, f.status))],
        _waiting(conn, at, first_pause, max_pause),
        [(row[0], row[1]) for row in conn.execute(held)],
        [(row[0], row[1]) for row in conn.execute(queued)],
        {name: (at - beat).total_seconds() for name, beat in conn.execute(beats)},
    )


def _waiting(conn: Connection, at: datetime, first_pause: float, max_pause: float) -> list[Waiting]:
    """Of a row that was published n times, ``due_at`` is when it would be published again."""
    soon = sa.literal(at + timedelta(seconds=2 * max_pause), UtcDateTime())
    free = sa.and_(_d.worker.is_(None), _d.due_at <= soon, sa.or_(_d.publish_count > 0, _d.due_at <= at))
    rows = conn.execute(
        sa.select(_d.kind, _d.publish_count, sa.func.count(), sa.func.min(_d.due_at))
        .where(free, sa.or_(_d.limit_key.is_(None), _d.has_slot))
        .group_by(_d.kind, _d.publish_count)
    )
    found: dict[str, Waiting] = {}
    for kind, times, rows_of, first in rows:
        seconds = max(0.0, (at - first).total_seconds() + _pauses(times, first_pause, max_pause))
        before = found.get(kind, Waiting(kind, 0, 0.0))
        found[kind] = Waiting(kind, before.count + rows_of, max(before.oldest_seconds, seconds))
    return list(found.values())


def _pauses(times: int, first: float, most: float) -> float:
    """How long a row has been paused in all that was published so many times; the second pause is as the first."""
    doubling = min(times, 32)  # by then the longest is reached
    longest = max(0, times - doubling) * most
    return longest + sum(min(most, first * 2.0 ** max(0, number - 1)) for number in range(doubling))
