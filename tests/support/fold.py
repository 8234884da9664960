"""Rebuilds a flow's row and its steps from its events, and holds the result against what is stored."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from typing import Any
from uuid import UUID

from celery_flows.store import Flow, FlowEvent, FlowStep, FlowStore
from celery_flows.store.models import TERMINAL


def fold_flow(events: Iterable[FlowEvent]) -> Flow:
    """The flow's row, from its events with a revision, in the order of these."""
    row: dict[str, Any] = {}
    for event in sorted((e for e in events if e.revision is not None), key=lambda e: e.revision or 0):
        if not row:
            row = {"id": event.flow_id, "created_at": event.at}
        row |= event.payload_json["set"]
        row |= {"revision": event.revision, "updated_at": event.at}
        if row["status"] in TERMINAL:
            row["finished_at"] = event.at
    return Flow(**row)


def fold_steps(events: Iterable[FlowEvent]) -> dict[str, FlowStep]:
    """The steps by run id, from the events that tell of one, each run id's in the order of event ids."""
    rows: dict[str, dict[str, Any]] = {}
    for event in sorted((e for e in events if "step" in e.payload_json), key=lambda e: e.id):
        told = dict(event.payload_json["step"])
        ran = timedelta(microseconds=told.pop("elapsed_us", 0))
        run_id = event.payload_json["run_id"]
        row = rows.setdefault(run_id, {"flow_id": event.flow_id, "run_id": run_id, "created_at": event.at - ran})
        row |= {"updated_at": event.at, **told}
    return {run_id: FlowStep(**row) for run_id, row in rows.items()}


def assert_whole(store: FlowStore, flow_id: UUID) -> list[FlowEvent]:
    """The flow's history has no gap and gives its rows back; returns it, oldest first."""
    flow = store.get(flow_id)
    assert flow is not None
    events = store.list_events(flow_id, None)[::-1]
    revisions = sorted(event.revision for event in events if event.revision is not None)
    assert revisions == list(range(1, flow.revision + 1))
    assert fold_flow(events) == flow
    assert fold_steps(events) == {step.run_id: step for step in store.list_steps(flow_id)}
    return events
