"""A store in a dictionary, with nothing but what the contract requires: for what the base class provides."""

from __future__ import annotations

from itertools import count
from typing import Any
from uuid import UUID

from celery_flows.store import (
    DuplicateFlow,
    DuplicateStep,
    Flow,
    FlowEvent,
    FlowNotFound,
    FlowStatus,
    FlowStep,
    FlowStore,
    RevisionMismatch,
    StepNotFound,
)
from tests.support.samples import now


class MemoryFlowStore(FlowStore):
    """The twelve required methods."""

    def __init__(self) -> None:
        self.flows: dict[UUID, Flow] = {}
        self.steps: dict[UUID, FlowStep] = {}
        self.events: list[FlowEvent] = []
        self._ids = count(1)

    def insert(self, flow: Flow) -> None:
        if flow.id in self.flows:
            raise DuplicateFlow(flow.id)
        self.flows[flow.id] = flow

    def get(self, flow_id: UUID) -> Flow | None:
        return self.flows.get(flow_id)

    def list_by_owner(self, owner_session_key: str, limit: int | None = 100, after: Flow | None = None) -> list[Flow]:
        return [flow for flow in self.flows.values() if flow.owner_session_key == owner_session_key][:limit]

    def list_by_status(self, status: FlowStatus, limit: int | None = 100, after: Flow | None = None) -> list[Flow]:
        return [flow for flow in self.flows.values() if flow.status is status][:limit]

    def update_with_revision(self, flow: Flow) -> Flow:
        known = self.flows.get(flow.id)
        if known is None:
            raise FlowNotFound(flow.id)
        if known.revision != flow.revision:
            raise RevisionMismatch(flow.id, flow.revision, known.revision)
        self.flows[flow.id] = flow.but(revision=flow.revision + 1, updated_at=now())
        return self.flows[flow.id]

    def append_event(self, flow_id: UUID, kind: str, payload: dict[str, Any]) -> FlowEvent:
        event = FlowEvent(id=next(self._ids), flow_id=flow_id, kind=kind, payload_json=payload, at=now())
        self.events.append(event)
        return event

    def list_events(self, flow_id: UUID, limit: int | None = 100, after: FlowEvent | None = None) -> list[FlowEvent]:
        return [event for event in reversed(self.events) if event.flow_id == flow_id][:limit]

    def insert_step(self, step: FlowStep) -> None:
        if self.find_step_by_run_id(step.flow_id, step.run_id):
            raise DuplicateStep(step.flow_id, step.run_id)
        self.steps[step.id] = step

    def update_step(self, step: FlowStep) -> FlowStep:
        if step.id not in self.steps:
            raise StepNotFound(step.id)
        self.steps[step.id] = step.but(updated_at=now())
        return self.steps[step.id]

    def get_step(self, step_id: UUID) -> FlowStep | None:
        return self.steps.get(step_id)

    def list_steps(self, flow_id: UUID, limit: int | None = None, after: FlowStep | None = None) -> list[FlowStep]:
        return [step for step in self.steps.values() if step.flow_id == flow_id][:limit]

    def find_step_by_run_id(self, flow_id: UUID, run_id: str) -> FlowStep | None:
        return next((step for step in self.list_steps(flow_id) if step.run_id == run_id), None)
