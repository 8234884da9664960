"""What was seen of a task that Celery runs by itself, and what of it is news. Pure.

A step only goes forward: by attempt, and within an attempt planned → published → running → closed. Observations come
from several processes and may come late or twice, so whatever is not ahead of the row is no news. A step is *planned*
while its task is known and not yet published (``args_json`` is empty), and *live* from then on until it is closed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import UUID

from celery_flows.store.models import FlowStepStatus, new_id

PENDING, RUNNING, SUCCEEDED = FlowStepStatus.PENDING, FlowStepStatus.RUNNING, FlowStepStatus.SUCCEEDED


@dataclass(frozen=True, slots=True)
class Observation:
    """One task of a mirrored flow, as seen just now."""

    flow_id: UUID
    run_id: str  # the Celery task id
    task: str
    status: FlowStepStatus
    attempt: int = 1
    error: Mapping[str, Any] | None = None  # {"type", "message"} of this attempt, or of the one before a retry
    called: Mapping[str, Any] | None = None  # {"parent_id"}: who published it; None: nobody yet
    id: UUID = field(default_factory=new_id)  # of the step's row, should this be the first that is seen of it


def in_order(seen: Sequence[Observation]) -> list[Observation]:
    """The same, with ids that are in this order: rows that are made at one time are listed by them."""
    return [replace(each, id=id_) for each, id_ in zip(seen, sorted(new_id() for _ in seen), strict=True)]


def rank(status: FlowStepStatus, called: Mapping[str, Any] | None) -> int:
    """How far a step is within its attempt."""
    if status.is_terminal:
        return 3
    return 2 if status is RUNNING else int(called is not None)


def news(row: Mapping[Any, Any], seen: Observation) -> dict[str, Any]:
    """The columns of a step that an observation changes; none, if it is late or known."""
    if row["runtime"] != "mirrored" or FlowStepStatus(row["status"]).is_terminal:
        return {}
    here = row["attempt"], rank(FlowStepStatus(row["status"]), row["args_json"])
    there = seen.attempt, rank(seen.status, seen.called)
    called = row["args_json"] if seen.called is None else dict(seen.called)
    if there > here:
        error = None if seen.status is SUCCEEDED else seen.error or row["error_json"]
        return {"status": seen.status, "attempt": seen.attempt, "error_json": error, "args_json": called}
    if there[0] == here[0] and seen.error is not None and row["error_json"] is None:
        return {"error_json": dict(seen.error), "args_json": called}  # why it is tried again, told after it was
    return {}
