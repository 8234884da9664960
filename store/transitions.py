"""The lifecycle: one table, and a pure function for each transition.

::

    created ──► running ◄──► waiting
       │        │  │  │         │ │
       │        │  │  └► finished │
       │        │  └──► failed ◄──┘ (waiting may fail too)
       └────────┴─────► cancelled ◄─ (from any open status)

Each function takes the flow as read and gives the :class:`Transition` to write: the event's kind, the columns that
change, and what the event tells besides. Times are set by the database, so they stand in no transition.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any
from uuid import UUID

from celery_flows.store.errors import AlreadyTerminal, CancelPending, IllegalTransition
from celery_flows.store.models import TERMINAL, Flow, FlowStatus

NEXT: Mapping[FlowStatus, frozenset[FlowStatus]] = {
    FlowStatus.CREATED: frozenset({FlowStatus.RUNNING, FlowStatus.CANCELLED}),
    FlowStatus.RUNNING: frozenset({FlowStatus.WAITING, FlowStatus.FINISHED, FlowStatus.FAILED, FlowStatus.CANCELLED}),
    FlowStatus.WAITING: frozenset({FlowStatus.RUNNING, FlowStatus.FAILED, FlowStatus.CANCELLED}),
    FlowStatus.FINISHED: frozenset(),
    FlowStatus.FAILED: frozenset(),
    FlowStatus.CANCELLED: frozenset(),
}


@dataclass(frozen=True, slots=True)
class Transition:
    """A change of a flow's row that is yet to be written, with its event."""

    kind: str
    columns: dict[str, Any] = field(default_factory=dict)
    payload: dict[str, Any] = field(default_factory=dict)  # of the event, beside "set"

    def applied_to(self, flow: Flow) -> Flow:
        """The flow as it will be; revision and times are the database's to set."""
        return flow.but(**self.columns)

    def told(self) -> dict[str, Any]:
        """The event's payload: what it tells, and the columns it sets, as JSON."""
        return {**self.payload, "set": jsonable(self.columns)}


def check(flow: Flow, target: FlowStatus) -> None:
    """Says nothing if the lifecycle lets ``flow`` become ``target``.

    Raises:
        AlreadyTerminal, CancelPending, IllegalTransition: if it does not.
    """
    if flow.status in TERMINAL:
        raise AlreadyTerminal(flow.id, flow.status, target)
    if flow.cancel_requested and target is not FlowStatus.CANCELLED:
        raise CancelPending(flow.id, flow.status, target)
    if target not in NEXT[flow.status]:
        raise IllegalTransition(flow.id, flow.status, target)


def check_open(flow: Flow, what: str) -> None:
    """Says nothing while ``flow`` is open.

    Raises:
        AlreadyTerminal: naming ``what`` was wanted of it.
    """
    if flow.status in TERMINAL:
        raise AlreadyTerminal(flow.id, flow.status, what)


def start_running(flow: Flow) -> Transition:
    check(flow, FlowStatus.RUNNING)
    if flow.status is not FlowStatus.CREATED:
        raise IllegalTransition(flow.id, flow.status, FlowStatus.RUNNING, ": it is resumed, not started")
    return Transition("started", {"status": FlowStatus.RUNNING})


def set_waiting(flow: Flow, wait: Mapping[str, Any]) -> Transition:
    check(flow, FlowStatus.WAITING)
    return Transition("waiting", {"status": FlowStatus.WAITING, "wait_json": dict(wait)})


def resume(flow: Flow, patch: Mapping[str, Any] | None = None) -> Transition:
    check(flow, FlowStatus.RUNNING)
    if flow.status is not FlowStatus.WAITING:
        raise IllegalTransition(flow.id, flow.status, FlowStatus.RUNNING, ": only a waiting flow is resumed")
    return Transition(
        "resumed", {"status": FlowStatus.RUNNING, "wait_json": None, "state_json": merged(flow.state_json, patch)}
    )


def update_state(flow: Flow, patch: Mapping[str, Any], next_step: str | None = None) -> Transition:
    check_open(flow, "updated")
    columns: dict[str, Any] = {"state_json": merged(flow.state_json, patch)}
    if next_step is not None:
        columns["current_step"] = next_step
    return Transition("state_updated", columns)


def finish(flow: Flow, state: Mapping[str, Any] | None = None, result: Any = None) -> Transition:
    check(flow, FlowStatus.FINISHED)
    columns: dict[str, Any] = {"status": FlowStatus.FINISHED, "result_json": result}
    if state:
        columns["state_json"] = merged(flow.state_json, state)
    return Transition("finished", columns)


def fail(flow: Flow, reason: str, error: Mapping[str, Any] | None = None) -> Transition:
    check(flow, FlowStatus.FAILED)
    known = flow.state_json.get("failure")
    failure = {**(known if isinstance(known, Mapping) else {}), "reason": reason}
    state = merged(flow.state_json, {"failure": failure})
    return Transition(
        "failed",
        {
            "status": FlowStatus.FAILED,
            "wait_json": None,
            "state_json": state,
            "error_json": None if error is None else dict(error),
        },
        {"reason": reason},
    )


def request_cancel(flow: Flow) -> Transition:
    check_open(flow, FlowStatus.CANCELLED)
    return Transition("cancel_requested", {"cancel_requested": True})


def cancel(flow: Flow) -> Transition:
    check(flow, FlowStatus.CANCELLED)
    return Transition("cancelled", {"status": FlowStatus.CANCELLED, "cancel_requested": True, "wait_json": None})


def pause(flow: Flow, at: datetime) -> Transition:
    check_open(flow, "paused")
    return Transition("paused", {"paused_at": at})


def unpause(flow: Flow) -> Transition:
    check_open(flow, "unpaused")
    return Transition("unpaused", {"paused_at": None})


def merged(state: Mapping[str, Any], patch: Mapping[str, Any] | None) -> dict[str, Any]:
    """``state`` with the keys of ``patch`` laid over it; shallow."""
    return {**state, **(patch or {})}


def jsonable(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Columns as an event tells them: times and ids as text."""
    return {name: _plain(value) for name, value in columns.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    return str(value) if isinstance(value, UUID | StrEnum) else value
