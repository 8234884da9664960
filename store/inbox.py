"""External events: stored before they are delivered, handed over one by one, first in first out.

An emitter only inserts: the event, and a *look* row that the sweep settles should the emitter die. Emitter, waiter and
sweep all *look* alike, each after a commit of its own: they lock the oldest event that is not consumed and the flow
that has waited longest for it, and resume that flow with that event in one transaction. Whichever of event and wait
commits last, its look sees both.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy import Connection

from celery_flows.store import transitions
from celery_flows.store.changes import Change, StepWrite, Wake, change_of, follow_up
from celery_flows.store.errors import FlowNotFound
from celery_flows.store.models import Flow, FlowStatus, FlowStepStatus
from celery_flows.store.operations import change_flow, dialect, lock_flow, now, reads, writes
from celery_flows.store.tables import FLOW_COLUMNS, flow_dispatch, flow_inbox, flow_steps, flows
from celery_flows.store.validation import check_name, encode_json
from celery_flows.store.waits import due_at, event_key

_d, _i = flow_dispatch.c, flow_inbox.c


@writes
def emit(
    conn: Connection, topic: str, correlation_id: str, payload: Any, event_id: UUID, look_after_seconds: float
) -> bool:
    """Stores an event and the row that has it looked at; False: this event id is stored already.

    Inserts only, so it fits into any caller's transaction and waits for nobody.
    """
    check_name("topic", topic)
    check_name("correlation_id", correlation_id)
    encode_json("payload", payload)
    if conn.scalar(sa.select(_i.position).where(_i.id == event_id)) is not None:
        return False
    at = now(conn)
    conn.execute(
        sa.insert(flow_inbox).values(
            id=event_id, topic=topic, correlation_id=correlation_id, event_key=event_key(topic, correlation_id),
            payload_json=payload, created_at=at,
        )
    )  # fmt: skip
    look = {"run_id": str(event_id), "kind": "look", "due_at": at + timedelta(seconds=look_after_seconds)}
    conn.execute(sa.insert(flow_dispatch).values(look))
    return True


@reads
def is_stored(conn: Connection, event_id: UUID) -> bool | None:
    """Whether :func:`emit` committed and only its reply was lost; None: it did not."""
    return True if conn.scalar(sa.select(_i.position).where(_i.id == event_id)) is not None else None


@reads
def is_taken(conn: Connection, event_id: UUID) -> bool:
    """Whether the event was handed over, or is the next to be: a flow waits for it, and no other event comes first."""
    event = conn.execute(sa.select(_i.position, _i.event_key, _i.consumed_by).where(_i.id == event_id)).one()
    if event.consumed_by is not None:
        return True
    earlier = sa.and_(_i.event_key == event.event_key, _i.consumed_by.is_(None), _i.position < event.position)
    if conn.scalar(sa.select(_i.position).where(earlier).limit(1)) is not None:
        return False
    return conn.scalar(_longest_waiting(conn, event.event_key).with_only_columns(flows.c.id)) is not None


@writes
def hand_over_next(conn: Connection, key: str) -> UUID | None:
    """Hands the oldest event of ``key`` to the flow that has waited longest; gives its id, None if either is missing.

    The event's lock is waited for, never skipped: the one who holds it may still roll back, and order would be lost.
    """
    event = conn.execute(
        sa.select(_i.position, _i.id, _i.topic, _i.correlation_id, _i.payload_json)
        .where(_i.event_key == key, _i.consumed_by.is_(None))
        .order_by(_i.position)
        .limit(1)
        .with_for_update()
    ).first()
    if event is None:
        return None
    row = conn.execute(_longest_waiting(conn, key).with_for_update(key_share=True)).mappings().first()
    if row is None:
        return None
    flow = Flow.of_row(row)
    conn.execute(sa.update(flow_inbox).where(_i.position == event.position).values(consumed_by=flow.id))
    conn.execute(sa.delete(flow_dispatch).where(_d.run_id == str(event.id)))
    change_flow(
        conn, resumption(conn, flow, {"topic": event.topic, "correlation_id": event.correlation_id}, event.payload_json)
    )
    return flow.id


def _longest_waiting(conn: Connection, key: str) -> sa.Select[Any]:
    """The flow that has waited longest for an event of this key. Its step tells since when: whatever wakes the flow in
    between, or is written to its row, moves ``rest_at``. A flow that no definition drives has none."""
    waits = sa.and_(flows.c.wait_key == key, flows.c.status == FlowStatus.WAITING, flows.c.cancel_requested.is_(False))
    step = sa.and_(flow_steps.c.flow_id == flows.c.id, flow_steps.c.run_id == dialect(conn).wait_run_id())
    since = sa.select(flow_steps.c.created_at).where(step).scalar_subquery()
    first = sa.func.coalesce(since, flows.c.rest_at), flows.c.id
    return sa.select(*FLOW_COLUMNS).where(waits).order_by(*first).limit(1)


def resumption(conn: Connection, flow: Flow, told: dict[str, Any], payload: Any) -> Change:
    """The change that resumes a waiting flow with an event: a driven flow's wait step is closed with the payload, any
    other finds it in its state under ``resume_event``."""
    assert flow.wait_json is not None
    run_id = flow.wait_json.get("run_id")
    patch = {"resume_event": payload} if run_id is None else None
    transition = transitions.resume(flow, patch)
    step = None if run_id is None else _closed_wait(conn, flow.id, run_id, payload)
    return replace(change_of(flow, transition, step=step, drive=Wake(), forgive=True), payload=told)


def _closed_wait(conn: Connection, flow_id: UUID, run_id: str, payload: Any) -> StepWrite | None:
    step = conn.execute(
        sa.select(flow_steps.c.task, flow_steps.c.position, flow_steps.c.id, flow_steps.c.args_json).where(
            flow_steps.c.flow_id == flow_id, flow_steps.c.run_id == run_id
        )
    ).first()
    if step is None:
        return None
    result = encode_json("payload", payload)
    args = None if step.args_json is None else encode_json("args", step.args_json)
    return StepWrite(run_id, step.task, FlowStepStatus.SUCCEEDED, step.position, result=result, args=args, id=step.id)


@reads
def key_of(conn: Connection, event_id: str) -> str | None:
    """The key of a stored event."""
    key: str | None = conn.scalar(sa.select(_i.event_key).where(_i.id == UUID(event_id)))
    return key


@writes
def drop_look(conn: Connection, run_id: str) -> None:
    """Forgets a look row: everything that could be handed over has been, and the next waiter looks for itself."""
    conn.execute(sa.delete(flow_dispatch).where(_d.run_id == run_id, _d.kind == "look"))


# ---- flows that no definition drives --------------------------------------------------------------------------------


@writes
def settle_wait(conn: Connection, flow_id: UUID, at: datetime | None = None) -> str | None:
    """Ends the wait of an undriven flow that is due at ``at`` (None: by the database's clock).

    Says ``resumed`` or ``cancelled``, or None if it waits on.
    A timer that fired and an external wait that timed out both resume the flow; the latter has ``resume_event`` None
    and ``wait_timed_out`` true in its state.
    """
    flow = lock_flow(conn, flow_id)
    mine = sa.and_(_d.run_id == str(flow_id), _d.task.is_(None), _d.options.is_(None))
    if flow is None or flow.status is not FlowStatus.WAITING:
        conn.execute(sa.delete(flow_dispatch).where(mine))
        return None
    if flow.cancel_requested:
        transition = transitions.cancel(flow)
        change_flow(conn, change_of(flow, transition, drive=follow_up(FlowStatus.CANCELLED, None, transition.kind)))
        return "cancelled"
    due = due_at(flow.wait_json)
    if due is None or due > (at or now(conn)):
        conn.execute(sa.update(flow_dispatch).where(mine).values(due_at=due))
        return None
    assert flow.wait_json is not None
    timed_out = flow.wait_json["kind"] == "external_event"
    patch = {"resume_event": None, "wait_timed_out": True} if timed_out else None
    change_flow(conn, change_of(flow, transitions.resume(flow, patch)))
    conn.execute(sa.delete(flow_dispatch).where(mine))
    return "resumed"


@writes
def resume_by_hand(conn: Connection, flow_id: UUID, payload: dict[str, Any] | None, write_id: UUID) -> Flow:
    """Resumes a waiting flow in somebody's name: a driven flow's wait ends with ``payload``, into any other's state it
    is merged.

    Raises:
        FlowNotFound, AlreadyTerminal, CancelPending, IllegalTransition, InvalidData: nothing was written.
    """
    encode_json("payload", payload)
    flow = lock_flow(conn, flow_id)
    if flow is None:
        raise FlowNotFound(flow_id)
    transition = transitions.resume(flow, payload)
    driven = flow.wait_json is not None and "run_id" in flow.wait_json
    change = resumption(conn, flow, {}, payload) if driven else change_of(flow, transition, drive=Wake())
    return change_flow(conn, replace(change, write_id=write_id)).flow


@reads
def awaited_key(conn: Connection, flow_id: UUID) -> str | None:
    """The key of the event that a flow waits for, if it does."""
    key: str | None = conn.scalar(sa.select(flows.c.wait_key).where(flows.c.id == flow_id))
    return key


@writes
def resume_external(conn: Connection, flow_id: UUID, topic: str, correlation_id: str, payload: Any) -> bool:
    """Resumes one flow if it waits for just this event; False if it does not. Nothing is kept in the inbox."""
    encode_json("payload", payload)
    flow = lock_flow(conn, flow_id)
    if flow is None or flow.status is not FlowStatus.WAITING or flow.cancel_requested:
        return False
    wait = flow.wait_json or {}
    if (wait.get("topic"), wait.get("correlation_id")) != (topic, correlation_id):
        return False
    change_flow(conn, resumption(conn, flow, {"topic": topic, "correlation_id": correlation_id}, payload))
    return True
