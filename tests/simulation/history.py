"""The histories as far as they are told: each new event is folded in, and the rows must be what the folds come to."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from celery_flows.store.fold import FLOW_FIELDS, STEP_FIELDS, TELL_OF_STEPS, Fold, differing
from celery_flows.store.models import OPEN_STEP, TERMINAL, Flow, FlowEvent, FlowStep
from celery_flows.store.tables import EnumText, JsonText, UtcDateTime, flow_events, flow_steps, flows
from tests.simulation.world import Violation, short

Query = Callable[..., list[tuple[Any, ...]]]


def _reader(type_: Any) -> Callable[[Any], Any]:
    """What turns a stored value into the record's."""
    if isinstance(type_, UtcDateTime):
        return lambda text: datetime.fromisoformat(text).replace(tzinfo=UTC)
    if isinstance(type_, JsonText):
        return json.loads
    if isinstance(type_, EnumText):
        return type_.enum
    if isinstance(type_, sa.Uuid):
        return UUID
    return bool if isinstance(type_, sa.Boolean) else lambda value: value


class Table:
    """Rows of a table as records, read past SQLAlchemy: it is done after every transaction."""

    def __init__(self, table: sa.Table, record: Any) -> None:
        self._record = record
        self._readers = {name: _reader(table.c[name].type) for name in record.model_fields}
        self.query = f"SELECT {', '.join(self._readers)} FROM {table.name}"

    def read(self, row: tuple[Any, ...]) -> Any:
        readers = self._readers.items()
        return self._record.model_construct(
            **{name: None if value is None else read(value) for (name, read), value in zip(readers, row, strict=True)}
        )


FLOWS, STEPS, EVENTS = Table(flows, Flow), Table(flow_steps, FlowStep), Table(flow_events, FlowEvent)


class Histories:
    """Every flow's events and rows since the run began."""

    def __init__(self, query: Query) -> None:
        self._query = query
        self._last = 0
        self._folds: dict[UUID, Fold] = {}
        self._rows: dict[UUID, tuple[tuple[Any, ...], int]] = {}  # id of flow or step → as last compared
        self._records: Counter[tuple[UUID, str]] = Counter()  # flow and run id → events that closed the step
        self._told: dict[UUID, int] = {}  # flow → how many of its events have been seen
        self.flows: dict[UUID, Flow] = {}
        self.steps: dict[UUID, FlowStep] = {}

    def check(self) -> None:
        """Reads what is new.

        Raises:
            Violation: (1), (2) or (3).
        """
        for row in self._query(f"{EVENTS.query} WHERE id > ? ORDER BY id", self._last):
            self._take_in(EVENTS.read(row))
        for row in self._query(FLOWS.query):
            flow_id = UUID(row[0])
            if self._is_new(flow_id, row, flow_id):
                self._check_flow(FLOWS.read(row))
        for row in self._query(STEPS.query):
            if self._is_new(UUID(row[0]), row, UUID(row[1])):
                self._check_step(STEPS.read(row))

    def _is_new(self, id_: UUID, row: tuple[Any, ...], flow_id: UUID) -> bool:
        seen = (row, self._told.get(flow_id, 0))
        known = self._rows.get(id_)
        self._rows[id_] = seen
        return known != seen

    def _take_in(self, event: FlowEvent) -> None:
        self._last = event.id
        self._told[event.flow_id] = self._told.get(event.flow_id, 0) + 1
        self._folds.setdefault(event.flow_id, Fold()).add(event)
        step, run_id = event.payload_json.get("step"), event.payload_json.get("run_id")
        if event.kind not in TELL_OF_STEPS or run_id is None or step is None or step["status"] in OPEN_STEP:
            return
        self._records[event.flow_id, run_id] += 1
        if self._records[event.flow_id, run_id] > 1:
            raise Violation(f"(1) step {run_id} was recorded twice, now by {event.kind}")

    def _check_flow(self, flow: Flow) -> None:
        fold = self._folds.get(flow.id, Fold())
        if fold.disordered or list(fold.revisions) != list(range(1, flow.revision + 1)):
            told = list(fold.revisions)
            raise Violation(f"(2) flow {short(flow.id)} is at revision {flow.revision}, its events tell of {told}")
        if names := differing(flow, fold.flow, FLOW_FIELDS):
            raise Violation(f"(2) flow {short(flow.id)} is not what its events tell: {names}")
        before = self.flows.get(flow.id)
        if before is not None and before.status in TERMINAL and before != flow:
            raise Violation(f"(3) an ended flow changed: {before} -> {flow}")
        if flow.status in TERMINAL and flow.cancel_requested and flow.status != "cancelled":
            raise Violation(f"(9) flow {short(flow.id)} was to be cancelled, and is {flow.status}")
        self.flows[flow.id] = flow

    def _check_step(self, step: FlowStep) -> None:
        before = self.steps.get(step.id)
        if before is not None and before.status not in OPEN_STEP and before != step:
            raise Violation(f"(1) a recorded step changed: {before} -> {step}")
        fold = self._folds.get(step.flow_id, Fold())
        told = fold.steps.get(step.run_id)
        if step.run_id in fold.torn:
            raise Violation(f"(2) step {step.task}: {fold.torn[step.run_id]} does not follow from what was before")
        if told is None or (names := differing(step, told, STEP_FIELDS)):
            raise Violation(f"(2) step {step.task} is not what its events tell: {names if told else 'nothing'}")
        if step.status in OPEN_STEP and self.flows[step.flow_id].status in TERMINAL:
            raise Violation(f"(3) step {step.task} of ended flow {short(step.flow_id)} is {step.status}")
        self.steps[step.id] = step
