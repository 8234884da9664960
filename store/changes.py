"""What is written together: plain values that ``postgresql.py`` and ``sqlite.py`` turn into statements."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

from celery_flows.store import waits
from celery_flows.store.models import TERMINAL, Flow, FlowStatus, FlowStepStatus, new_id
from celery_flows.store.transitions import Transition, jsonable


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a dispatch row: worker None is the row that nobody holds."""

    run_id: str
    fence: int
    worker: str | None


@dataclass(frozen=True, slots=True)
class StepWrite:
    """A step's row to insert, or to bring forward if it is there and open. JSON comes encoded."""

    run_id: str
    task: str
    status: FlowStepStatus
    position: int
    attempt: int = 1
    result: str | None = None
    error: Mapping[str, Any] | None = None
    args: str | None = None
    child_session_key: str | None = None
    elapsed_us: int = 0  # how long it ran; created_at is that much before updated_at
    id: UUID = field(default_factory=new_id)

    def told(self) -> str:
        """The event's account of the row, as JSON text."""
        row = {
            "id": str(self.id),
            "runtime": "managed",
            "task": self.task,
            "status": self.status.value,
            "position": self.position,
            "attempt": self.attempt,
            "error_json": self.error,
        }
        if self.child_session_key is not None:
            row["child_session_key"] = self.child_session_key
        text = json.dumps(row, ensure_ascii=False)[:-1]
        encoded = f'"result_json":{self.result or "null"},"args_json":{self.args or "null"}'
        return f'{text},{encoded},"elapsed_us":{self.elapsed_us}}}'


@dataclass(frozen=True, slots=True)
class Member:
    """A Celery step or a child flow to schedule: its row and its dispatch row."""

    run_id: str
    task: str
    position: int
    args: str  # JSON: {"args": [...], "kwargs": {...}}
    queue: str | None = None
    priority: int | None = None
    options: Mapping[str, Any] | None = None  # of the message: time limits
    child: Flow | None = None
    limit_key: str | None = None  # of the child
    id: UUID = field(default_factory=new_id)

    @property
    def kind(self) -> str:
        """Of its dispatch row."""
        return "step" if self.child is None else "child"

    @property
    def child_session_key(self) -> str | None:
        """The child's id, by which the step is known to be it."""
        return None if self.child is None else str(self.child.id)

    @property
    def status(self) -> FlowStepStatus:
        """A child is under way at once."""
        return FlowStepStatus.PENDING if self.child is None else FlowStepStatus.RUNNING


@dataclass(frozen=True, slots=True)
class Join:
    """What a driver waits for: ``good`` more successes, or more than ``bad`` failures, of group ``group``."""

    group: int
    good: int
    bad: int


@dataclass(frozen=True, slots=True)
class Park:
    """Give the drive row back until ``due_at`` (None: until somebody wakes it), unless it was woken since ``wakes``.
    The slot of a limited flow is freed, unless it waits for its own steps, or goes on at once."""

    holder: Holder
    wakes: int
    due_at: datetime | None = None
    join: Join | None = None
    keeps_slot: bool = False


@dataclass(frozen=True, slots=True)
class Wake:
    """Call the flow's driver: its row is due now, or, while somebody holds it, when that one parks."""


@dataclass(frozen=True, slots=True)
class Settle:
    """A flow that no definition drives waits: the sweep looks at it at ``due_at``; at once if it is to be cancelled, or
    if it waits for an event, which may lie in the inbox already."""

    due_at: datetime | None
    at_once: bool = False


@dataclass(frozen=True, slots=True)
class End:
    """The flow is terminal: its open steps are closed, its dispatch rows deleted."""


@dataclass(frozen=True, slots=True)
class Drive:
    """The drive row of a new flow."""

    task: str
    queue: str | None = None
    priority: int | None = None
    first_pause: float = 0.0  # seconds before the sweep publishes it (again)
    parent_run_id: str | None = None  # of a child: which step of its parent it is
    due_at: datetime | None = None  # when the sweep publishes it, in place of a pause
    limit_key: str | None = None  # of a limited flow: what it shares the limit with
    published: bool = True  # its message is sent after the commit; else nobody can claim it before it is due


@dataclass(frozen=True, slots=True)
class Successor:
    """The flow that goes on for one that ends, made in the same transaction."""

    flow: Flow
    drive: Drive


@dataclass(frozen=True, slots=True)
class Change:
    """One revision of one flow, with all that must commit with it."""

    flow_id: UUID
    revision: int  # expected; the stored one is this + 1
    kind: str | None  # of the event; None writes none (update_with_revision)
    columns: Mapping[str, Any] = field(default_factory=dict)
    payload: Mapping[str, Any] = field(default_factory=dict)
    tells_columns: bool = True  # the event carries "set"; without it the payload is the caller's alone
    step: StepWrite | None = None
    members: tuple[Member, ...] = ()
    first_pause: float = 0.0  # seconds before the sweep publishes the members again
    drive: Park | Wake | Settle | End | None = None
    forgive: bool = False  # progress: the drive row's crashes are forgotten
    successor: Successor | None = None
    write_id: UUID = field(default_factory=new_id)

    @property
    def ends(self) -> bool:
        return isinstance(self.drive, End)

    @property
    def moves_rest(self) -> bool:
        """Whether ``rest_at`` follows: not for the record of a step, which must leave every index alone."""
        return bool(self.columns.keys() - {"current_step"})

    def stored_columns(self) -> dict[str, Any]:
        """The columns to write: those given, and those derived from them."""
        columns = dict(self.columns)
        if "wait_json" in columns:
            columns["wait_key"] = waits.wait_key(columns["wait_json"])
        return columns

    def told(self) -> str:
        """The event's payload, as JSON text: the caller's own words, ``set``, and the step's row."""
        told = {**self.payload, "set": jsonable(self.columns)} if self.tells_columns else self.payload
        text = json.dumps(told, ensure_ascii=False)
        if self.step is not None:
            text = f'{text[:-1]},"run_id":{json.dumps(self.step.run_id)},"step":{self.step.told()}}}'
        return text


@dataclass(frozen=True, slots=True)
class Completion:
    """The end of a Celery step: its row, its event, and its part in the join."""

    holder: Holder
    flow_id: UUID
    status: FlowStepStatus
    result: str | None = None  # JSON text
    error: Mapping[str, Any] | None = None
    write_id: UUID = field(default_factory=new_id)

    @property
    def kind(self) -> str:
        return f"step_{self.status.value}"

    @property
    def good(self) -> int:
        return int(self.status is FlowStepStatus.SUCCEEDED)

    def told(self) -> str:
        row = json.dumps({"status": self.status.value, "error_json": self.error}, ensure_ascii=False)[:-1]
        return f'{{"run_id":{json.dumps(self.holder.run_id)},"step":{row},"result_json":{self.result or "null"}}}}}'


@dataclass(frozen=True, slots=True)
class NewFlow:
    """What tells one flow of many that are started together from the others."""

    id: UUID
    key: str | None
    input: str | None  # JSON text
    drive: Drive


def change_of(flow: Flow, transition: Transition, **more: Any) -> Change:
    """The change that writes ``transition`` on top of ``flow`` as read."""
    return Change(flow.id, flow.revision, transition.kind, transition.columns, transition.payload, **more)


ORDER = "cancel "  # begins the run id of the order to cancel a child whose parent has ended

CALL_THE_WAITING = frozenset({"cancel_requested", "unpaused"})  # its time may have come while it was paused
QUIET = frozenset({"state_updated", "paused", "step_observed"})  # kinds that call no driver


def follow_up(status: FlowStatus, wait: Mapping[str, Any] | None, kind: str) -> Wake | Settle | End | None:
    """What a change that came from outside the driver means for the flow's dispatch rows."""
    if status in TERMINAL:
        return End()
    if status is FlowStatus.WAITING and kind not in CALL_THE_WAITING:
        return Settle(waits.due_at(wait), at_once=waits.wait_key(wait) is not None)
    return None if kind in QUIET else Wake()
