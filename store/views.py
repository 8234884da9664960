"""What an operator looks at beside the records: the work of a flow, its children, events as they come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy import Connection

from celery_flows.store.models import Flow, FlowEvent, FlowStep
from celery_flows.store.operations import reads
from celery_flows.store.tables import (
    EVENT_COLUMNS,
    FLOW_COLUMNS,
    flow_dispatch,
    flow_events,
    flow_inbox,
    flow_steps,
    flows,
)
from celery_flows.store.waits import event_key

_d, _e, _f, _s = flow_dispatch.c, flow_events.c, flows.c, flow_steps.c


@dataclass(frozen=True, slots=True)
class Dispatched:
    """A row of ``flow_dispatch``: a thing that may need a worker."""

    run_id: str
    kind: str
    task: str | None
    queue: str | None  # None: the default one
    due_at: datetime | None  # when somebody must look again: to publish, to end a lease, to fire a timer
    worker: str | None  # who holds it
    publish_count: int  # above 0: published, waiting for a worker
    crash_count: int


_DISPATCHED = (_d.run_id, _d.kind, _d.task, _d.queue, _d.due_at, _d.worker, _d.publish_count, _d.crash_count)


@reads
def list_dispatched(conn: Connection, flow_id: UUID, limit: int) -> list[Dispatched]:
    """What of a flow may need a worker: the drive row, then what is held, then by the time at which it is due."""
    mine = sa.select(*_DISPATCHED).where(_d.flow_id == flow_id)
    ordered = mine.order_by(_d.kind != "drive", _d.worker.is_(None), _d.due_at).limit(limit)
    return [Dispatched(*row) for row in conn.execute(ordered)]


@reads
def list_children(conn: Connection, flow_id: UUID, limit: int) -> list[Flow]:
    """The flows that this one has started as its children, oldest first."""
    children = sa.select(*FLOW_COLUMNS).where(_f.parent_flow_id == flow_id)
    rows = conn.execute(children.order_by(_f.created_at, _f.id).limit(limit)).mappings()
    return [Flow.of_row(row) for row in rows]


@reads
def list_last_steps(conn: Connection, flow_id: UUID, limit: int) -> list[FlowStep]:
    """A flow's last steps, oldest first."""
    mine = sa.select(flow_steps).where(_s.flow_id == flow_id)
    rows = conn.execute(mine.order_by(_s.created_at.desc(), _s.position.desc()).limit(limit)).mappings().all()
    return [FlowStep.of_row(row) for row in reversed(rows)]


@reads
def has_kept_event(conn: Connection, topic: str, correlation_id: str) -> bool:
    """Whether an external event of this topic and correlation id is kept, for no flow has waited for it yet."""
    inbox = flow_inbox.c
    kept = sa.select(inbox.position).where(
        inbox.event_key == event_key(topic, correlation_id), inbox.consumed_by.is_(None)
    )
    return conn.scalar(kept.limit(1)) is not None


# ---- events as they come --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Told:
    """An event, and whose it is."""

    event: FlowEvent
    definition: str
    owner: str
    step: str | None  # the name of the step that it is about


@reads
def list_event_ids(conn: Connection, after: int, limit: int, flow_id: UUID | None = None) -> list[int]:
    """The ids of events after this one, in order; of all flows, or of one."""
    ids = sa.select(_e.id).where(_e.id > after).order_by(_e.id).limit(limit)
    return list(conn.scalars(ids if flow_id is None else ids.where(_e.flow_id == flow_id)))


@reads
def list_last_event_ids(conn: Connection, limit: int, flow_id: UUID | None = None) -> list[int]:
    """The ids of the last events, in order."""
    ids = sa.select(_e.id).order_by(_e.id.desc()).limit(limit)
    return list(conn.scalars(ids if flow_id is None else ids.where(_e.flow_id == flow_id)))[::-1]


@reads
def list_told(conn: Connection, event_ids: Sequence[int]) -> list[Told]:
    """These events, in order, but for those that were pruned meanwhile."""
    joined = flow_events.join(flows, _f.id == _e.flow_id)
    told = sa.select(*EVENT_COLUMNS, _f.controller_id, _f.owner_session_key).select_from(joined)
    rows = conn.execute(told.where(_e.id.in_(event_ids)).order_by(_e.id)).mappings().all()
    events = [FlowEvent.of_row(row) for row in rows]
    steps = name_steps(conn, events)
    whose = [(row["controller_id"], row["owner_session_key"]) for row in rows]
    return [Told(event, *of, steps.get(event.id)) for event, of in zip(events, whose, strict=True)]


@reads
def name_steps(conn: Connection, events: Sequence[FlowEvent]) -> dict[int, str]:
    """The names of the steps that events are about, by event id: most events tell a step's run id alone."""
    told = {event.id: (event.flow_id, event.payload_json.get("run_id")) for event in events}
    about = {event_id: key for event_id, key in told.items() if isinstance(key[1], str)}
    flow_ids, run_ids = {flow_id for flow_id, _ in about.values()}, {run_id for _, run_id in about.values()}
    named = sa.select(_s.flow_id, _s.run_id, _s.task).where(_s.flow_id.in_(flow_ids), _s.run_id.in_(run_ids))
    names = {(row.flow_id, row.run_id): row.task for row in conn.execute(named)} if about else {}
    return {event_id: names[key] for event_id, key in about.items() if key in names}
