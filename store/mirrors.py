"""Mirrored flows: created with the steps that are planned, brought forward by what is seen of their tasks, ended when
nothing more is to come.

An observation never touches the flow's row, so a thousand members of a group do not queue for it. Whoever closes a
step looks, after its commit, whether any step is still live, and ends the flow if none is: of two that close the last
two steps at once, the later one to commit sees both. A task's record comes with those of the tasks it published, in
one statement, so a flow with work in it never looks over.

Messages get lost, and workers die before they tell. So each mirrored flow has a drive row without a task, told by its
options from that of a flow that waits: when it is due, the sweep looks whether the flow is over, or has been silent
for too long.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy import Connection

from celery_flows.store import transitions
from celery_flows.store.changes import End, change_of
from celery_flows.store.models import Flow, FlowMode, FlowStatus, FlowStepStatus
from celery_flows.store.observations import Observation, news
from celery_flows.store.operations import (
    change_flow,
    create_flow,
    lock_flow,
    now,
    reads,
    writes,
    writes_once,
)
from celery_flows.store.postgresql import NOW
from celery_flows.store.tables import flow_dispatch, flow_events, flow_steps, flows
from celery_flows.store.transitions import Transition
from celery_flows.store.validation import encode_json

_d, _s = flow_dispatch.c, flow_steps.c
OPTIONS = {"mirror": True}  # of the drive row

_LIVE = sa.or_(
    _s.status == FlowStepStatus.RUNNING, sa.and_(_s.status == FlowStepStatus.PENDING, _s.args_json.isnot(None))
)


# ---- creation and observations --------------------------------------------------------------------------------------


@writes
def create(conn: Connection, flow: Flow, seen: Sequence[Observation], look_seconds: float) -> bool:
    """Stores a mirrored flow, born running, with its first steps; False: id or key are taken, nothing was written."""
    if not create_flow(conn, flow, {}):
        return False
    observe(conn, seen)
    due_at = now(conn) + timedelta(seconds=look_seconds)
    row = {"run_id": str(flow.id), "flow_id": flow.id, "kind": "drive", "due_at": due_at, "options": OPTIONS}
    conn.execute(sa.insert(flow_dispatch).values(row))
    return True


@writes_once
def observe(conn: Connection, seen: Sequence[Observation]) -> set[UUID]:
    """Inserts the steps that are new, brings forward those that are known, each with its event; gives the flows in
    which something changed.

    No two observations of one step. What is late changes nothing; what belongs to no mirrored flow (it was pruned, or
    is managed) is dropped. A flow that has ended takes no more open steps.
    """
    if not seen:
        return set()
    return (_observe_at_once if conn.dialect.name == "postgresql" else _observe_one_by_one)(conn, seen)


_RANK = """CASE {0}.status WHEN 'pending' THEN CASE WHEN {0}.args_json IS NULL THEN 0 ELSE 1 END
    WHEN 'running' THEN 2 ELSE 3 END"""


@cache
def _observe_statement() -> sa.TextualSelect:
    ahead = f"(x.attempt, {_RANK.format('x')}) > (t.attempt, {_RANK.format('t')})".replace("x.", "excluded.")
    types = {
        "id": "uuid", "flow_id": "uuid", "run_id": "text", "task": "text", "status": "text", "attempt": "integer",
        "error": "jsonb", "called": "json",
    }  # fmt: skip
    arrays = ", ".join(f"CAST(:{name} AS {type_}[])" for name, type_ in types.items())
    # FOR SHARE: whoever ends the flow waits for us, then closes what we open; or we wait, and open nothing.
    return sa.text(
        f"""WITH i AS MATERIALIZED (SELECT * FROM unnest({arrays}) WITH ORDINALITY AS i({", ".join(types)}, n)),
            f AS MATERIALIZED (SELECT id, finished_at FROM flows
              WHERE id IN (SELECT flow_id FROM i) AND mode = 'mirrored' ORDER BY id FOR SHARE),
            s AS (INSERT INTO flow_steps AS t (id, flow_id, runtime, run_id, task, status, error_json, args_json,
                position, attempt, created_at, updated_at)
              SELECT i.id, f.id, 'mirrored', i.run_id, i.task, i.status, i.error, i.called, 0, i.attempt, {NOW}, {NOW}
              FROM i JOIN f ON f.id = i.flow_id
              WHERE f.finished_at IS NULL OR i.status NOT IN ('pending', 'running') ORDER BY i.n
              ON CONFLICT (flow_id, run_id) DO UPDATE SET
                status = CASE WHEN {ahead} THEN excluded.status ELSE t.status END,
                attempt = greatest(excluded.attempt, t.attempt),
                error_json = CASE WHEN {ahead} AND excluded.status = 'succeeded' THEN NULL
                  ELSE coalesce(excluded.error_json, t.error_json) END,
                args_json = coalesce(excluded.args_json, t.args_json), updated_at = {NOW}
              WHERE t.runtime = 'mirrored' AND t.status IN ('pending', 'running') AND ({ahead}
                OR (excluded.attempt = t.attempt AND excluded.error_json IS NOT NULL AND t.error_json IS NULL))
              RETURNING t.*),
            e AS (INSERT INTO flow_events (flow_id, kind, payload_json, at)
              SELECT s.flow_id, 'step_observed', jsonb_build_object('run_id', s.run_id, 'step', jsonb_build_object(
                'id', s.id, 'runtime', s.runtime, 'child_session_key', s.child_session_key, 'task', s.task,
                'status', s.status, 'result_json', s.result_json, 'error_json', s.error_json, 'position', s.position,
                'attempt', s.attempt, 'args_json', s.args_json)), s.updated_at FROM s)
            SELECT DISTINCT flow_id FROM s"""
    ).columns(flow_steps.c.flow_id)


def _observe_at_once(conn: Connection, seen: Sequence[Observation]) -> set[UUID]:
    seen = sorted(seen, key=lambda each: (each.flow_id, each.run_id))  # all lock in one order
    columns = {
        "id": [each.id for each in seen],
        "flow_id": [each.flow_id for each in seen],
        "run_id": [each.run_id for each in seen],
        "task": [each.task for each in seen],
        "status": [each.status.value for each in seen],
        "attempt": [each.attempt for each in seen],
        "error": [each.error and encode_json("error", each.error) for each in seen],
        "called": [each.called and encode_json("called", each.called) for each in seen],
    }
    return set(conn.execute(_observe_statement(), columns).scalars())


def _observe_one_by_one(conn: Connection, seen: Sequence[Observation]) -> set[UUID]:
    at = now(conn)
    return {each.flow_id for each in seen if _observe_one(conn, each, at)}


def _observe_one(conn: Connection, seen: Observation, at: datetime) -> bool:
    flow = sa.select(flows.c.finished_at).where(flows.c.id == seen.flow_id, flows.c.mode == FlowMode.MIRRORED)
    standing = conn.execute(flow).first()
    if standing is None:
        return False
    mine = sa.and_(_s.flow_id == seen.flow_id, _s.run_id == seen.run_id)
    known = conn.execute(sa.select(flow_steps).where(mine)).mappings().first()
    if known is not None:
        changed = news(known, seen)
        write: Any = sa.update(flow_steps).where(mine).values(**changed, updated_at=at)
    else:
        changed = {
            "id": seen.id, "flow_id": seen.flow_id, "runtime": "mirrored", "run_id": seen.run_id, "task": seen.task,
            "status": seen.status, "error_json": seen.error, "args_json": seen.called, "position": 0,
            "attempt": seen.attempt, "created_at": at,
        }  # fmt: skip
        if standing.finished_at is not None and not seen.status.is_terminal:
            return False
        write = sa.insert(flow_steps).values(**changed, updated_at=at)
    if not changed:
        return False
    row = conn.execute(write.returning(*flow_steps.c)).mappings().one()
    told = ("runtime", "child_session_key", "task", "status", "result_json", "error_json", "position", "attempt",
            "args_json")  # fmt: skip
    step = {"id": str(row["id"]), **{name: row[name] for name in told}}
    event = {"flow_id": seen.flow_id, "kind": "step_observed", "at": at}
    conn.execute(sa.insert(flow_events).values(**event, payload_json={"run_id": seen.run_id, "step": step}))
    return True


# ---- the end --------------------------------------------------------------------------------------------------------


@reads
def without_live_steps(conn: Connection, flow_ids: Collection[UUID]) -> list[UUID]:
    """Those of these mirrored flows that are open and have no live step: they may be over."""
    live = sa.exists().where(_s.flow_id == flows.c.id, _LIVE)
    mine = sa.select(flows.c.id).where(flows.c.id.in_(flow_ids), flows.c.mode == FlowMode.MIRRORED)
    return list(conn.execute(mine.where(flows.c.finished_at.is_(None), ~live)).scalars())


@writes
def end_if_over(conn: Connection, flow_id: UUID) -> FlowStatus | None:
    """Ends a mirrored flow of which nothing more is to come; says how it ended, None: it goes on, or had ended.

    That is when no step is live, and either all are closed, or one failed or was cancelled: then those that are only
    planned will never be published, and are cancelled with the flow's end. Planned steps after nothing but successes
    are yet to come: Celery tells nobody that it is about to publish a chord's body.
    """
    flow = lock_flow(conn, flow_id)
    if flow is None or not _is_mirrored(flow):
        return None
    transition = _ending(conn, flow)
    return None if transition is None else _end(conn, flow, transition)


def _is_mirrored(flow: Flow) -> bool:
    return flow.mode is FlowMode.MIRRORED and flow.status is FlowStatus.RUNNING


def _end(conn: Connection, flow: Flow, transition: Transition) -> FlowStatus:
    return change_flow(conn, change_of(flow, transition, drive=End())).flow.status


def _ending(conn: Connection, flow: Flow) -> Transition | None:
    """What ends the flow, whose row is locked; None: nothing yet."""
    live = sa.func.count().filter(_LIVE)
    counted = sa.select(live, _s.status, sa.func.count()).where(_s.flow_id == flow.id).group_by(_s.status)
    counts, lives = dict.fromkeys(FlowStepStatus, 0), 0
    for alive, status, count in conn.execute(counted):
        counts[FlowStepStatus(status)] = count
        lives += alive
    went_wrong = counts[FlowStepStatus.FAILED] or counts[FlowStepStatus.CANCELLED]
    if lives or not any(counts.values()) or (counts[FlowStepStatus.PENDING] and not went_wrong):
        return None
    if flow.cancel_requested:
        return transitions.cancel(flow)
    if counts[FlowStepStatus.FAILED]:
        return transitions.fail(flow, "step_failed", _first_error(conn, flow.id))
    return transitions.cancel(flow) if counts[FlowStepStatus.CANCELLED] else transitions.finish(flow)


def _first_error(conn: Connection, flow_id: UUID) -> dict[str, Any] | None:
    failed = sa.select(_s.error_json).where(_s.flow_id == flow_id, _s.status == FlowStepStatus.FAILED)
    error: dict[str, Any] | None = conn.scalar(failed.order_by(_s.updated_at, _s.id).limit(1))
    return error


# ---- the sweep's look -----------------------------------------------------------------------------------------------

LOST = "MirrorLost"  # the error's type of a flow of which nothing was heard any more


@dataclass(frozen=True, slots=True)
class Standing:
    """A mirrored flow that is due to be looked at."""

    flow_id: UUID
    cancel_requested: bool
    open_run_ids: tuple[str, ...]


@reads
def standing(conn: Connection, flow_id: UUID) -> Standing | None:
    """A mirrored flow that runs; None: it has ended."""
    mine = sa.select(flows.c.cancel_requested).where(flows.c.id == flow_id, flows.c.finished_at.is_(None))
    row = conn.execute(mine).first()
    if row is None:
        return None
    is_open = _s.status.in_((FlowStepStatus.PENDING, FlowStepStatus.RUNNING))
    run_ids = conn.execute(sa.select(_s.run_id).where(_s.flow_id == flow_id, is_open)).scalars()
    return Standing(flow_id, row.cancel_requested, tuple(run_ids))


@writes
def look(conn: Connection, flow_id: UUID, silent_seconds: float) -> FlowStatus | None:
    """Ends a mirrored flow that is over, is to be cancelled, or of which nothing was seen for ``silent_seconds``; else
    has it looked at again when that time will be over."""
    flow = lock_flow(conn, flow_id)
    mine = sa.and_(_d.run_id == str(flow_id), _d.options.isnot(None))
    if flow is None or not _is_mirrored(flow):
        conn.execute(sa.delete(flow_dispatch).where(mine))
        return None
    transition = transitions.cancel(flow) if flow.cancel_requested else _ending(conn, flow)
    seen_at: datetime | None = conn.scalar(sa.select(sa.func.max(_s.updated_at)).where(_s.flow_id == flow_id))
    due_at = max(flow.created_at, seen_at or flow.created_at) + timedelta(seconds=silent_seconds)
    if transition is None and due_at <= now(conn):
        message = f"nothing was seen of its tasks for {silent_seconds:.0f} seconds"
        transition = transitions.fail(flow, "lost", {"type": LOST, "message": message})
    if transition is not None:
        return _end(conn, flow, transition)
    conn.execute(sa.update(flow_dispatch).where(mine).values(due_at=due_at))
    return None
