"""What ``--json`` prints, by command. docs/reference/cli.md shows this file's classes, and tests hold the output to
them. Keys are never taken away or renamed within a major version; new ones may come.
"""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict

Id = str  # a UUID
Time = str  # ISO 8601, in UTC


class Error(TypedDict):
    type: str
    message: str
    undo_failed: NotRequired[list[str]]  # of a flow: steps that were to be undone, and could not be
    retry_at: NotRequired[Time]  # of a step that is tried again: when


class Flow(TypedDict):
    id: Id
    controller_id: str  # the name of its definition
    definition_version: int
    goal: str
    owner_session_key: str
    requester_origin: str | None
    mode: str  # managed, mirrored
    status: str  # created, running, waiting, cancelled, finished, failed
    current_step: str | None  # the latest that was recorded or scheduled; of a flow that waits, what it waits for
    wait_json: dict[str, Any] | None  # what it waits for: kind, and topic and correlation_id, or at
    cancel_requested: bool
    revision: int
    idempotency_key: str | None
    parent_flow_id: Id | None
    forked_from: Id | None
    continued_as: Id | None
    error_json: Error | None
    created_at: Time
    updated_at: Time
    deadline_at: Time | None
    paused_at: Time | None
    finished_at: Time | None
    retain_seconds: int | None  # for how long it is kept after its end; None: as is set
    trace_id: str | None  # of its OpenTelemetry trace, if it was started with flow_tracing
    input_json: NotRequired[Any]  # this and what follows: with --payloads
    state_json: NotRequired[dict[str, Any]]
    result_json: NotRequired[Any]


class Step(TypedDict):
    id: Id
    flow_id: Id
    run_id: str
    task: str  # its name
    runtime: str  # managed, mirrored
    status: str  # pending, running, succeeded, failed, cancelled
    position: int
    attempt: int
    child_session_key: str | None  # of a child flow: its id
    error_json: Error | None
    created_at: Time
    updated_at: Time
    args_json: NotRequired[Any]  # this and what follows: with --payloads
    result_json: NotRequired[Any]


class Event(TypedDict):
    id: int  # grows
    flow_id: Id
    at: Time
    kind: str
    revision: int | None  # of the flow, if the event changed its row
    run_id: str | None  # of the step that it is about
    step: str | None  # that step's name
    about: str  # in words
    payload_json: NotRequired[dict[str, Any]]  # with --payloads


class Work(TypedDict):
    run_id: str
    kind: str  # drive, step, child
    task: str | None
    queue: str  # the default one by its name
    due_at: Time | None  # when somebody must look again
    worker: str | None  # who holds it
    publish_count: int  # above 0: published, waiting for a worker
    crash_count: int


class Started(TypedDict):
    id: Id
    status: NotRequired[str]  # with --wait
    result: NotRequired[Any]  # with --wait


class Listed(TypedDict):
    flows: list[Flow]  # newest first, never with payloads
    next: Id | None  # for --after, if there are more


class Shown(TypedDict):
    flow: Flow
    steps: list[Step]  # the last ones, oldest first
    step_counts: dict[str, int]  # of all, by status
    work: list[Work]  # what of it may need a worker
    children: list[Flow]  # never with payloads
    events: list[Event]  # the last ones, oldest first
    queued_at: Time | None  # since when it queues for a slot of its limit


class Outcome(TypedDict):
    id: Id
    done: str | None  # what was done, in words
    error: str | None  # why not


class Steered(TypedDict):
    flows: list[Outcome]


class Successor(TypedDict):
    id: Id
    started: Id | None  # the new flow
    error: str | None  # why not


class WentBack(TypedDict):
    flows: list[Successor]


class Emitted(TypedDict):
    id: Id  # of the external event
    kept: bool  # no flow waits for it yet


class Approved(TypedDict):
    id: Id
    approval: str
    granted: bool
    kept: bool  # the flow has not asked for it yet


class Swept(TypedDict):
    due: int
    published: int
    lost: int
    handed_over: int
    admitted: int
    settled: int


class Count(TypedDict):
    number: int
    precision: str  # exact, estimate, at least


class Pruned(TypedDict):
    pruned: int  # 0 with --dry-run
    would_prune: NotRequired[Count]  # with --dry-run


class AuditFinding(TypedDict):
    flow_id: Id | None
    kind: str
    about: str


class Verified(TypedDict):
    flows: int
    findings: list[AuditFinding]


class Setting(TypedDict):
    value: Any  # a URL is without its password and options
    source: str  # environment, application, default


class Finding(TypedDict):
    kind: str
    about: str
    problem: bool
    cause: str
    remedy: str


class Examined(TypedDict):
    ready: bool
    findings: list[Finding]
    settings: dict[str, Setting]


class Migrated(TypedDict):
    was: str | None  # None: no tables
    schema: str | None


class Kept(TypedDict):
    count: Count
    since: Time | None  # the oldest of those that were counted


class Recent(TypedDict):
    flows: int  # the latest, at most 10,000
    since: Time | None
    definitions: dict[str, dict[str, int]]  # by name and status


class Dispatch(TypedDict):
    due: Kept
    published: Count
    leases: Count
    workers: list[str]  # the processes that hold them
    queued: Kept
    next_due_at: Time | None


class Statistics(TypedDict):
    at: Time
    flows: dict[str, Count]  # by status
    last_hour: dict[str, Count]  # by status: those that came to it within an hour, and are in it still
    recent: Recent
    work: Dispatch
    inbox: Kept
    chores: dict[str, Time]  # by name: when it was last done
