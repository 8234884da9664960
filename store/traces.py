"""What is kept of traces besides a flow's own ``trace_json``: the span of the last run of a dispatch row.

A run whose process was killed never tells of its span; the run that comes after it links to what stands here.
Written only for runs that are traced.
"""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy import Connection

from celery_flows.store.changes import Holder
from celery_flows.store.operations import reads, writes_once
from celery_flows.store.tables import flow_dispatch, flows

_d = flow_dispatch.c


@dataclass(frozen=True, slots=True)
class Trace:
    """What a run is to be traced as a part of."""

    flow: dict[str, str] | None  # the flow's trace context
    crashed: str | None  # the span of the run before, if it crashed


@reads
def find_trace(conn: Connection, run_id: str) -> Trace:
    """The trace that this dispatch row's run belongs to."""
    mine = sa.select(flows.c.trace_json, sa.case((_d.crash_count > 0, _d.run_span)))
    row = conn.execute(mine.join(flow_dispatch, flows.c.id == _d.flow_id).where(_d.run_id == run_id)).first()
    return Trace(None, None) if row is None else Trace(row[0], row[1])


@writes_once
def leave_span(conn: Connection, holder: Holder, span: str) -> None:
    """Says which span the run under this claim has; a claim that is over says nothing."""
    mine = sa.and_(_d.run_id == holder.run_id, _d.fence == holder.fence, _d.worker == holder.worker)
    conn.execute(sa.update(flow_dispatch).where(mine).values(run_span=span))
