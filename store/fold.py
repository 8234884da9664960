"""Folding a flow's events back into its rows: what proves that no history is torn. Pure.

A flow's own events are taken in the order of their revisions, a step's in the order of their ids within its run id;
nothing is read from the order between the two.

Every change of a flow's row has a revision of its own, so a deleted event leaves a gap. A Celery step's events have
none, but follow from each other: each claim's fence is one more than that before, each retry's attempt too, and what
was not begun is neither retried nor completed. What that cannot show is the loss of a claim between two others' events
that took over an attempt and completed it, and of an observation that a later one overtook.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

from celery_flows.store.models import TERMINAL, Flow, FlowEvent, FlowStep

FLOW_FIELDS = tuple(name for name in Flow.model_fields if name not in ("id", "revision"))
STEP_FIELDS = tuple(name for name in FlowStep.model_fields if name != "flow_id")

# Whoever appends an event of another kind may say "step" and mean anything.
TELL_OF_STEPS = frozenset(
    {
        "step_scheduled", "step_started", "step_succeeded", "step_failed", "step_retrying", "step_cancelled",
        "step_observed", "step_taken_over", "waiting", "resumed", "state_updated",
    }
)  # fmt: skip


class Ranges:
    """A set of whole numbers, kept as ranges: a million in a row take no more room than one."""

    def __init__(self, *ranges: tuple[int, int]) -> None:
        self._ranges = list(ranges)  # first and last, ascending

    def add(self, number: int) -> bool:
        """Takes a number in; False: it is not higher than all before."""
        if not self._ranges or number > self._ranges[-1][1]:
            self._append(number)
            return True
        at = bisect_left(self._ranges, (number + 1, number))
        if at == 0 or self._ranges[at - 1][1] < number:
            self._ranges.insert(at, (number, number))
        return False

    def _append(self, number: int) -> None:
        if self._ranges and self._ranges[-1][1] == number - 1:
            self._ranges[-1] = (self._ranges[-1][0], number)
        else:
            self._ranges.append((number, number))

    def __iter__(self) -> Iterator[int]:
        for first, last in self._ranges:
            yield from range(first, last + 1)

    def __len__(self) -> int:
        return sum(last - first + 1 for first, last in self._ranges)

    def missing(self, last: int) -> Ranges:
        """Those from 1 to ``last`` that are not here."""
        gaps, expected = [], 1
        for first, end in [*self._ranges, (last + 1, last + 1)]:
            if expected < (first := min(first, last + 1)):
                gaps.append((expected, first - 1))
            expected = max(expected, end + 1)
        return Ranges(*gaps)

    def above(self, limit: int) -> Ranges:
        """Those that are higher than ``limit``."""
        return Ranges(*((max(first, limit + 1), last) for first, last in self._ranges if last > limit))


@dataclass
class Fold:
    """What the events told so far add up to. Feed it events oldest first."""

    flow: dict[str, Any] = field(default_factory=dict)
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)
    revisions: Ranges = field(default_factory=Ranges)
    disordered: Ranges = field(default_factory=Ranges)  # revisions that came after a higher one
    untold: Ranges = field(default_factory=Ranges)  # revisions whose event does not tell the columns it set
    fences: dict[str, int] = field(default_factory=dict)  # of each Celery step, as of its last claim; 0: none yet
    torn: dict[str, str] = field(default_factory=dict)  # step → its first event that does not follow from those before

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
        if not self.revisions.add(revision):
            self.disordered.add(revision)
        told = event.payload_json.get("set")
        if not isinstance(told, Mapping):
            self.untold.add(revision)
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
        if not self._follows(event, run_id):
            self.torn.setdefault(run_id, event.kind)
        row = self.steps.setdefault(run_id, {"run_id": run_id, "created_at": event.at - ran})
        row |= {"updated_at": event.at, **told}  # a step that was taken over brings its times

    def _follows(self, event: FlowEvent, run_id: str) -> bool:
        """Whether a step's event can come next. One that brings the step's id tells all of it, so it may come first."""
        told, known = event.payload_json["step"], self.steps.get(run_id, {})
        if event.kind == "step_taken_over":
            return not known
        if event.kind == "step_scheduled":
            self.fences[run_id] = 0
        elif event.kind == "step_started":
            before = self.fences.get(run_id, 0)
            self.fences[run_id] = event.payload_json.get("fence", before + 1)
            return self.fences[run_id] == before + 1
        elif event.kind == "step_retrying" and "id" not in told:
            return known.get("status") == "running" and told.get("attempt") == known.get("attempt", 0) + 1
        elif event.kind in ("step_succeeded", "step_failed") and "id" not in told:
            return known.get("status") == "running"
        return True


def differing(stored: Flow | FlowStep, folded: dict[str, Any], fields: Iterable[str]) -> list[str]:
    """The names of the fields that the fold gives otherwise than they are stored."""
    defaults = type(stored).model_fields
    return [
        name
        for name in fields
        if _comparable(getattr(stored, name)) != _comparable(folded.get(name, defaults[name].default))
    ]


def _comparable(value: Any) -> Any:
    """As events tell it: times and ids as text, and numbers as PostgreSQL's jsonb does, to which 1e23 is whole."""
    match value:
        case datetime():
            return value.isoformat()
        case dict():
            return {key: _comparable(each) for key, each in value.items()}
        case list():
            return [_comparable(each) for each in value]
        case float():
            exact = Decimal(repr(value))
            return int(exact) if exact == exact.to_integral_value() else value
        case int() | None:
            return value
        case _:
            return str(value)
