"""Child flows: what of them is done in their parents' name, each in a transaction of its own.

A child's terminal transition only makes the parent's row for it due; whoever sees that closes the parent's step with
the child's outcome. So no transaction ever holds both flows' rows, and dying in between loses nothing. The same the
other way: a parent that ends leaves an order to cancel each child, which is carried out in the child's name.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy import Connection

from celery_flows.store.changes import ORDER, Completion, Holder
from celery_flows.store.dispatch import complete_step
from celery_flows.store.models import Flow, FlowStatus, FlowStepStatus
from celery_flows.store.operations import find_step_by_run_id, get_flow, lock_flow, reads, writes, writes_once
from celery_flows.store.tables import flow_dispatch, flows

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
    parent = get_flow(conn, parent_id)
    is_told = parent is not None and parent.cancel_requested and not (step.args_json or {}).get("cleanup")
    outcome = _outcome(Holder(run_id, 0, None), parent_id, child, parent_is_cancelled=is_told)
    completed = complete_step(conn, outcome)
    return None if completed is None else Settled(parent_id, completed.woke)


def _outcome(holder: Holder, parent_id: UUID, child: Flow | None, *, parent_is_cancelled: bool) -> Completion:
    """What the parent is told, for good: a replay must not come to another answer because of a later cancel."""
    if child is None:
        error = {"type": "ChildMissing", "message": "the child flow was deleted"}
        return Completion(holder, parent_id, FlowStepStatus.FAILED, error=error)
    if child.status is FlowStatus.FINISHED:
        # Not measured again: it was accepted, and jsonb may write it longer.
        result = json.dumps(child.result_json, ensure_ascii=False)
        return Completion(holder, parent_id, FlowStepStatus.SUCCEEDED, result=result)
    if child.status is FlowStatus.CANCELLED and parent_is_cancelled:
        return Completion(holder, parent_id, FlowStepStatus.CANCELLED)
    if child.status is FlowStatus.CANCELLED:  # for itself, or because another member failed
        cancelled = {"type": "FlowCancelled", "message": "the flow was cancelled", "engine": True}
        return Completion(holder, parent_id, FlowStepStatus.FAILED, error=cancelled)
    reason = child.state_json.get("failure", {}).get("reason", "")
    by_hand = {"type": "FlowFailed", "message": str(reason)}
    return Completion(holder, parent_id, FlowStepStatus.FAILED, error=child.error_json or by_hand)


@reads
def list_unasked(conn: Connection, parent_id: UUID) -> list[UUID]:
    """The open children of a flow that have not been asked to cancel."""
    mine = sa.select(flows.c.id).where(flows.c.parent_flow_id == parent_id, flows.c.finished_at.is_(None))
    return list(conn.scalars(mine.where(flows.c.cancel_requested.is_(False)).order_by(flows.c.id)))


@reads
def lineage(conn: Connection, flow_id: UUID, most: int) -> tuple[str, ...]:
    """The names of the definitions of a flow and of those that it is a child of, the outermost first and its own last;
    of so many at most."""
    own = sa.select(flows.c.controller_id, flows.c.parent_flow_id, sa.literal(1).label("level"))
    chain = own.where(flows.c.id == flow_id).cte("chain", recursive=True)
    parent = sa.select(flows.c.controller_id, flows.c.parent_flow_id, chain.c.level + 1)
    chain = chain.union_all(parent.join(chain, flows.c.id == chain.c.parent_flow_id).where(chain.c.level < most))
    return tuple(conn.scalars(sa.select(chain.c.controller_id).order_by(chain.c.level.desc())))


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
