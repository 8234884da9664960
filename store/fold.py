"""Folding a flow's events back into its rows: what proves that no history is torn. Pure.

A flow's own events are taken in the order of their revisions, a step's in the order of their ids within its run id;
nothing is read from the order between the two.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from celery_flows.store.models import TERMINAL, Flow, FlowEvent, FlowStep

FLOW_FIELDS = tuple(name for name in Flow.model_fields if name not in ("id", "revision"))
STEP_FIELDS = tuple(name for name in FlowStep.model_fields if name != "flow_id")

# Whoever appends an event of another kind may say "step" and mean anything.
TELL_OF_STEPS = frozenset(
    {
        "step_scheduled", "step_started", "step_succeeded", "step_failed", "step_retrying", "step_cancelled",
        "step_observed", "waiting", "resumed",
    }
)  # fmt: skip


@dataclass
class Fold:
    """What the events told so far add up to. Feed it events oldest first."""

    flow: dict[str, Any] = field(default_factory=dict)
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)
    revisions: list[int] = field(default_factory=list)
    untold: list[int] = field(default_factory=list)  # revisions whose event does not tell the columns it set

    def add(self, event: FlowEvent) -> None:
        """Takes one event in."""
        if event.revision is not None:
            self._add_flow(event, event.revision)
        told = event.payload_json
        if event.kind in TELL_OF_STEPS and "run_id" in told and isinstance(told.get("step"), Mapping):
            self._add_step(event)

    def add_all(self, events: Iterable[FlowEvent]) -> Fold:
        """Takes events in; gives itself."""
        for event in events:
            self.add(event)
        return self

    def _add_flow(self, event: FlowEvent, revision: int) -> None:
        self.revisions.append(revision)
        told = event.payload_json.get("set")
        if not isinstance(told, Mapping):
            self.untold.append(revision)
            return
        if not self.flow:
            self.flow["created_at"] = event.at
        self.flow |= {**told, "updated_at": event.at}
        if self.flow.get("status") in TERMINAL:
            self.flow["finished_at"] = event.at

    def _add_step(self, event: FlowEvent) -> None:
        told = dict(event.payload_json["step"])
        ran = timedelta(microseconds=told.pop("elapsed_us", 0))
        run_id = event.payload_json["run_id"]
        row = self.steps.setdefault(run_id, {"run_id": run_id, "created_at": event.at - ran})
        row |= {**told, "updated_at": event.at}

    def missing_revisions(self, last: int) -> list[int]:
        """The revisions up to ``last`` that no event tells of."""
        return sorted(set(range(1, last + 1)) - set(self.revisions))


def differing(stored: Flow | FlowStep, folded: dict[str, Any], fields: Iterable[str]) -> list[str]:
    """The names of the fields that the fold gives otherwise than they are stored."""
    defaults = type(stored).model_fields
    return [
        name
        for name in fields
        if _comparable(getattr(stored, name)) != _comparable(folded.get(name, defaults[name].default))
    ]


def _comparable(value: Any) -> Any:
    """Times and ids as events tell them: as text."""
    if isinstance(value, datetime):
        return value.isoformat()
    return value if isinstance(value, dict | list | int | float | None) else str(value)
