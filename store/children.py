"""Child flows: what of them is done in their parents' name, each in a transaction of its own.

A child's terminal transition only makes the parent's row for it due; whoever sees that closes the parent's step with
the child's outcome. So no transaction ever holds both flows' rows, and dying in between loses nothing. The same the
other way: a parent that ends leaves an order to cancel each child, which is carried out in the child's name.
"""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy import Connection

from celery_flows.store.changes import ORDER, Completion, Holder
from celery_flows.store.dispatch import complete_step
from celery_flows.store.models import Flow, FlowStatus, FlowStepStatus
from celery_flows.store.operations import find_step_by_run_id, lock_flow, reads, writes, writes_once
from celery_flows.store.tables import flow_dispatch
from celery_flows.store.validation import encode_json

_d = flow_dispatch.c


@dataclass(frozen=True, slots=True)
class Settled:
    """A step that was a child is closed; ``woke``: its flow's driver is due now and nobody holds it."""

    flow_id: UUID
    woke: bool


@writes
def settle_child(conn: Connection, run_id: str) -> Settled | None:
    """Closes the parent's step with the outcome of the child, which has ended; None: somebody else did."""
    parent_id = conn.scalar(sa.select(_d.flow_id).where(_d.run_id == run_id, _d.kind == "child"))
    step = None if parent_id is None else find_step_by_run_id(conn, parent_id, run_id)
    if parent_id is None or step is None or step.child_session_key is None:
        return None
    child = lock_flow(conn, UUID(step.child_session_key))
    if child is not None and not child.status.is_terminal:  # opened again by hand
        conn.execute(sa.update(flow_dispatch).where(_d.run_id == run_id).values(due_at=None))
        return None
    completed = complete_step(conn, _outcome(Holder(run_id, 0, None), parent_id, child))
    return None if completed is None else Settled(parent_id, completed.woke)


def _outcome(holder: Holder, parent_id: UUID, child: Flow | None) -> Completion:
    if child is None:
        error = {"type": "ChildMissing", "message": "the child flow was deleted"}
        return Completion(holder, parent_id, FlowStepStatus.FAILED, error=error)
    if child.status is FlowStatus.FINISHED:
        result = encode_json("result", child.result_json)
        return Completion(holder, parent_id, FlowStepStatus.SUCCEEDED, result=result)
    if child.status is FlowStatus.CANCELLED:
        return Completion(holder, parent_id, FlowStepStatus.CANCELLED)
    reason = child.state_json.get("failure", {}).get("reason", "")
    by_hand = {"type": "FlowFailed", "message": str(reason)}
    return Completion(holder, parent_id, FlowStepStatus.FAILED, error=child.error_json or by_hand)


def is_order(run_id: str) -> bool:
    """Whether this row is the order to cancel a child whose parent has ended."""
    return run_id.startswith(ORDER)


@reads
def child_to_cancel(conn: Connection, run_id: str) -> UUID | None:
    """The child that an order is about; None: it has been carried out."""
    return conn.scalar(sa.select(_d.flow_id).where(_d.run_id == run_id, _d.kind == "child"))


@writes_once
def drop_order(conn: Connection, run_id: str) -> None:
    """The order has been carried out."""
    conn.execute(sa.delete(flow_dispatch).where(_d.run_id == run_id, _d.kind == "child"))
