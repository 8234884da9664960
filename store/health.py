"""Facts to tell by whether all is well: heartbeats of the chores, and what stands in ``flow_dispatch`` for too long.

Facts only: what they mean, and what to do, is said by whoever asks. Not for the hot path: some of these read a table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from random import Random
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy import Connection

from celery_flows.store.models import OPEN, FlowStatus
from celery_flows.store.operations import insert_into, now, reads, writes
from celery_flows.store.tables import IS_PAUSED, UtcDateTime, flow_dispatch, flow_heartbeats, flow_steps, flows

_d = flow_dispatch.c
# What a worker is to be called to. A paused flow's rows wait for nobody.
_PAUSED = sa.exists().where(flows.c.id == _d.flow_id, IS_PAUSED)
_WORK = sa.and_(_d.kind.in_(("drive", "step")), _d.task.isnot(None), ~_PAUSED)

SHOWN = 20  # rows of a kind that are told one by one


# ---- heartbeats -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """When somebody last did a chore."""

    name: str
    at: datetime  # by the database's clock
    every_seconds: float  # how often somebody should
    report: dict[str, Any]  # what came of it


@writes
def record_heartbeat(conn: Connection, name: str, every_seconds: float, report: dict[str, Any]) -> None:
    """Says that this chore has been done just now, whoever did it."""
    row = {"at": now(conn), "every_seconds": every_seconds, "report": report}
    beat = insert_into(conn, flow_heartbeats).values(name=name, **row)
    conn.execute(beat.on_conflict_do_update(index_elements=["name"], set_=row))


@reads
def list_heartbeats(conn: Connection) -> dict[str, Heartbeat]:
    """The last heartbeat of each chore, by name."""
    return {row.name: Heartbeat(*row) for row in conn.execute(sa.select(*flow_heartbeats.c))}


# ---- work that waits ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Group:
    """Rows of ``flow_dispatch`` that have something in common."""

    count: int
    queue: str | None
    task: str | None


@reads
def list_waiting(conn: Connection) -> list[Group]:
    """Work that a worker is to take now and none holds, by queue (None: the default one)."""
    wanted = sa.or_(_d.due_at <= now(conn), _d.publish_count > 0)
    return _grouped(conn, sa.and_(_WORK, _d.worker.is_(None), wanted), by_task=False)


@reads
def list_unclaimed(conn: Connection, times: int) -> list[Group]:
    """Work that was published so many times, and that no worker has taken."""
    return _grouped(conn, sa.and_(_WORK, _d.worker.is_(None), _d.publish_count >= times))


@reads
def list_needed_tasks(conn: Connection) -> list[Group]:
    """The tasks that the steps of open flows are in need of."""
    return _grouped(conn, sa.and_(_WORK, _d.kind == "step"))


@reads
def list_needed_definitions(conn: Connection) -> list[tuple[str, int, int]]:
    """The definitions that open flows are in need of: name, version, and how many flows."""
    flow = flows.c
    driven = sa.join(flow_dispatch, flows, flow.id == _d.flow_id)
    by = (flow.controller_id, flow.definition_version)
    wanted = sa.and_(_d.kind == "drive", _d.task.isnot(None), ~IS_PAUSED)
    asked = sa.select(*by, sa.func.count()).select_from(driven).where(wanted).group_by(*by)
    return [(row[0], row[1], row[2]) for row in conn.execute(asked.order_by(*by))]


@reads
def list_refused(conn: Connection, error_type: str) -> list[tuple[UUID, str, str]]:
    """Open flows that something of this type keeps from going on: id, definition, and its message; some of them."""
    flow = flows.c
    refused = sa.and_(flow.status.in_(OPEN), flow.error_json.isnot(None))
    rows = conn.execute(sa.select(flow.id, flow.controller_id, flow.error_json).where(refused).limit(SHOWN))
    return [(row[0], row[1], row[2]["message"]) for row in rows if row[2].get("type") == error_type]


@dataclass(frozen=True, slots=True)
class Queue:
    """Flows of a definition that have queued for a slot for long."""

    definition: str
    count: int
    since: datetime  # the one that has done so for the longest


@reads
def list_queued(conn: Connection, seconds: float) -> list[Queue]:
    """Flows that have queued for a slot of their limit for longer than this, by definition."""
    before = sa.literal(now(conn) - timedelta(seconds=seconds), UtcDateTime())
    asked = sa.select(_d.task, sa.func.count(), sa.func.min(_d.queued_at)).where(_d.queued_at < before, ~_PAUSED)
    return [Queue(*row) for row in conn.execute(asked.group_by(_d.task).order_by(_d.task))]


def _grouped(conn: Connection, where: sa.ColumnElement[bool], *, by_task: bool = True) -> list[Group]:
    by = [_d.queue, _d.task] if by_task else [_d.queue]
    rows = conn.execute(sa.select(sa.func.count(), *by).where(where).group_by(*by).order_by(*by))
    return [Group(row[0], row[1], row[2] if by_task else None) for row in rows]


@dataclass(frozen=True, slots=True)
class Row:
    """One row of ``flow_dispatch``."""

    run_id: str
    flow_id: UUID | None
    kind: str
    task: str | None
    worker: str | None
    crash_count: int
    since: datetime | None


_ROW = (_d.run_id, _d.flow_id, _d.kind, _d.task, _d.worker, _d.crash_count)


@reads
def overdue(conn: Connection, seconds: float) -> tuple[int, datetime | None]:
    """How many rows have been due for longer than this, and since when the first: sweeps look at what is due."""
    late = _d.due_at < sa.literal(now(conn) - timedelta(seconds=seconds), UtcDateTime())
    count, first = conn.execute(sa.select(sa.func.count(), sa.func.min(_d.due_at)).where(late)).one()
    return count, first


@reads
def list_stalled(conn: Connection, seconds: float) -> list[Row]:
    """Work that is held, its lease renewed, and of which nothing has been recorded for longer than this."""
    before = sa.literal(now(conn) - timedelta(seconds=seconds), UtcDateTime())
    same_step = sa.and_(flow_steps.c.flow_id == _d.flow_id, flow_steps.c.run_id == _d.run_id)
    recorded = sa.case((_d.kind == "drive", flows.c.updated_at), else_=flow_steps.c.updated_at)
    joined = flow_dispatch.join(flows, flows.c.id == _d.flow_id).outerjoin(flow_steps, same_step)
    held = sa.select(*_ROW, recorded.label("since")).select_from(joined).where(_d.worker.isnot(None), recorded < before)
    return [Row(*row) for row in conn.execute(held.order_by(recorded).limit(SHOWN))]


@reads
def list_crashing(conn: Connection, times: int) -> list[Row]:
    """Work that has killed its workers so many times in a row, and is being tried again."""
    killing = sa.select(*_ROW, _d.due_at).where(_d.crash_count >= times)
    return [Row(*row) for row in conn.execute(killing.order_by(_d.crash_count.desc()).limit(SHOWN))]


@reads
def list_failures(conn: Connection, seconds: float, types: Sequence[str]) -> list[UUID]:
    """Flows that failed within the last ``seconds`` for one of these reasons; of the last thousand that failed."""
    since = sa.literal(now(conn) - timedelta(seconds=seconds), UtcDateTime())
    failed = sa.select(flows.c.id, flows.c.error_json).where(flows.c.status == FlowStatus.FAILED)
    rows = conn.execute(failed.where(flows.c.rest_at >= since).order_by(flows.c.rest_at.desc()).limit(1000))
    return [row.id for row in rows if (row.error_json or {}).get("type") in types]


@reads
def has_open_flows(conn: Connection) -> bool:
    """Whether there is anything to do at all."""
    return conn.scalar(sa.select(flows.c.id).where(flows.c.status.in_(OPEN)).limit(1)) is not None


# ---- a sample to audit ----------------------------------------------------------------------------------------------


@reads
def sample_ids(conn: Connection, size: int, rng: Random) -> list[UUID]:
    """Flows to audit: the latest, and a stretch from any time between the oldest and them. At most ``size`` of each."""
    ids = sa.select(flows.c.id).order_by(flows.c.id.desc())
    latest = list(conn.scalars(ids.limit(size)))
    oldest = conn.scalar(sa.select(flows.c.id).order_by(flows.c.id).limit(1))
    if oldest is None or not latest or len(latest) < size:
        return latest
    begin = UUID(int=rng.randint(oldest.int, latest[-1].int))  # ids of version 7 are in the order of creation
    return latest + list(conn.scalars(ids.where(flows.c.id < begin).limit(size)))
