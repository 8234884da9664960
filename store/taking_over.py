"""What a flow that goes back reads of another's history, and how it takes a part of it over.

Steps are copied with their times, each with an event that tells all of its row: nothing is left that would have to be
looked up in the other flow, which may be pruned, and the events give the rows back by themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy import Connection

from celery_flows.store.changes import Drive
from celery_flows.store.models import Flow, FlowEvent, FlowStep
from celery_flows.store.operations import (
    create_flow,
    dialect,
    each_event,
    get_flow,
    list_steps,
    now,
    reads_snapshot,
    writes,
)
from celery_flows.store.tables import flow_events, flow_steps
from celery_flows.store.transitions import jsonable

ROWS_AT_ONCE = 1000


@dataclass(slots=True)
class Told:
    """Where the events tell of a step: the id of its first, and of its last until now."""

    first: int
    last: int
    taken_over: bool  # from yet another flow


@dataclass(frozen=True, slots=True)
class Origin:
    """A flow with its steps, as of one moment, and what its events tell besides."""

    flow: Flow
    steps: Sequence[FlowStep]
    told: dict[str, Told] = field(default_factory=dict)  # by run id
    created: dict[str, Any] = field(default_factory=dict)  # what its first event tells
    states: dict[str, dict[str, Any]] = field(default_factory=dict)  # run id of a step that updated it → as of then

    @property
    def first_state(self) -> dict[str, Any]:
        """Its ``state_json`` when it was created."""
        state: dict[str, Any] = self.created.get("set", {}).get("state_json", {})
        return state

    @property
    def priority(self) -> int | None:
        """That it was started with; None: none, or by a version that did not tell."""
        return self.created.get("priority")


@dataclass(frozen=True, slots=True)
class Taken:
    """A closed step as the flow has it that takes it over; ``state``: the flow's, if the step updated that."""

    step: FlowStep
    state: dict[str, Any] | None = None

    def told(self) -> dict[str, Any]:
        """The event's payload."""
        row = {name: value for name, value in dict(self.step).items() if name not in ("flow_id", "run_id")}
        state = {} if self.state is None else {"state": self.state}
        return {**state, "run_id": self.step.run_id, "step": jsonable(row)}


@reads_snapshot
def read_origin(conn: Connection, flow_id: UUID) -> Origin | None:
    """A flow that another may take over from; None: no such flow."""
    flow = get_flow(conn, flow_id)
    if flow is None:
        return None
    origin = Origin(flow, list_steps(conn, flow_id))
    for event in each_event(conn, flow_id):
        _take_in(origin, event)
    for step in origin.steps:  # one that was inserted by hand is told of by no event
        origin.told.setdefault(step.run_id, Told(0, 0, taken_over=False))
    return origin


def _take_in(origin: Origin, event: FlowEvent) -> None:
    payload = event.payload_json
    if event.kind == "created":
        origin.created.update(payload)
    run_id = payload.get("run_id")
    if not isinstance(run_id, str):
        return
    if event.kind == "state_updated":
        origin.states[run_id] = payload["set"]["state_json"]
    elif event.kind == "step_taken_over" and "state" in payload:
        origin.states[run_id] = payload["state"]
    told = origin.told.setdefault(run_id, Told(event.id, event.id, event.kind == "step_taken_over"))
    told.last = event.id


@writes
def create_taking_over(conn: Connection, flow: Flow, drive: Drive, taken: Sequence[Taken]) -> bool:
    """:func:`create_flow`, with steps that are closed already, all in one transaction. False: the id is taken."""
    with dialect(conn).savepoint(conn):  # what else a caller's transaction holds is not ours to undo
        if not create_flow(conn, flow, {}, drive):
            return False
        at = now(conn)
        for begin in range(0, len(taken), ROWS_AT_ONCE):
            some = taken[begin : begin + ROWS_AT_ONCE]
            event = {"flow_id": flow.id, "kind": "step_taken_over", "at": at}
            conn.execute(sa.insert(flow_steps), [dict(each.step) for each in some])
            conn.execute(sa.insert(flow_events), [{**event, "payload_json": each.told()} for each in some])
    return True
