"""A flow told: its records as JSON and as rows.

Payloads (input, state, results, arguments, what events carry) are left out unless they are asked for: what is on a
screen is copied into tickets and chats. Names, ids, times and errors are told.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from celery_flows.store import Flow, FlowEvent, FlowStep
from celery_flows.store.models import FlowMode
from celery_flows.store.views import Dispatched
from celery_flows.tasks.replay import given_as, shown
from celery_flows.tasks.spans import trace_id
from celery_flows.worker.cli.words import about, describe_error, describe_wait, describe_work, duration
from celery_flows.worker.output import moment

PAYLOADS = frozenset({"input_json", "state_json", "result_json", "args_json", "payload_json"})
MACHINERY = frozenset({"trace_json"})  # told as the id of the trace

FLOW_COLUMNS = ("id", "flow", "status", "step", "owner", "updated")
STEP_COLUMNS = ("#", "step", "status", "attempt", "began", "took", "error")
EVENT_COLUMNS = ("at", "revision", "event", "about")
WORK_COLUMNS = ("count", "work", "name", "queue", "is", "crashes")
SHOWN_CHARACTERS = 200


# ---- as JSON --------------------------------------------------------------------------------------------------------


def flow_json(flow: Flow, *, payloads: bool = False) -> dict[str, Any]:
    """A flow as programs are told of it."""
    return {**_record(flow, payloads), "trace_id": trace_id(flow.trace_json)}


def step_json(step: FlowStep, *, payloads: bool = False) -> dict[str, Any]:
    """A step as programs are told of it."""
    return _record(step, payloads)


def event_json(event: FlowEvent, step: str | None, *, payloads: bool = False) -> dict[str, Any]:
    """An event as programs are told of it, with the name of the step that it is about."""
    run_id = event.payload_json.get("run_id")
    told = {"run_id": run_id if isinstance(run_id, str) else None, "step": step, "about": about(event, step)}
    return {**_record(event, payloads), **told}


def work_json(work: Dispatched, default_queue: str) -> dict[str, Any]:
    """A row of ``flow_dispatch`` as programs are told of it."""
    fields = {name: getattr(work, name) for name in Dispatched.__slots__}
    return {**fields, "queue": work.queue or default_queue}


def _record(record: Flow | FlowStep | FlowEvent, payloads: bool) -> dict[str, Any]:
    return record.model_dump(mode="json", exclude=set(MACHINERY if payloads else MACHINERY | PAYLOADS))


# ---- as rows --------------------------------------------------------------------------------------------------------


def flow_row(flow: Flow) -> list[object]:
    """What a list of flows shows of one."""
    status = flow.status if flow.paused_at is None else f"{flow.status}, paused"
    at = moment(flow.updated_at)
    return [flow.id, flow.controller_id, status, flow.current_step, flow.owner_session_key, at]


def facts(flow: Flow, queued_at: datetime | None, *, payloads: bool) -> list[tuple[str, object]]:
    """What a flow is."""
    told = {
        "flow": flow.controller_id,
        "version": flow.definition_version if flow.definition_version > 1 else None,
        "status": flow.status,
        "owner": flow.owner_session_key,
        "goal": flow.goal or None,
        "key": flow.idempotency_key,
        "started": moment(flow.created_at),
        "ended": moment(flow.finished_at),
        "took": duration((flow.finished_at - flow.created_at).total_seconds()) if flow.finished_at else None,
        "kept after its end": None if flow.retain_seconds is None else duration(flow.retain_seconds),
        "has to end by": None if flow.finished_at else moment(flow.deadline_at),
        "waits for": flow.wait_json and describe_wait(flow.wait_json),
        "queues for a slot": queued_at and f"since {moment(queued_at)}",
        "cancel requested": "yes" if flow.cancel_requested else None,
        "paused": flow.paused_at and f"since {moment(flow.paused_at)}",
        "child of": flow.parent_flow_id,
        "forked from": flow.forked_from,
        "goes on as": flow.continued_as,
        "trace": trace_id(flow.trace_json),
        "mirrored": "yes" if flow.mode is FlowMode.MIRRORED else None,
        "error": describe_error(flow.error_json),
        "not undone": ", ".join((flow.error_json or {}).get("undo_failed", ())) or None,
        "input": _shortened(flow.input_json) if payloads else None,
        "state": _shortened(flow.state_json or None) if payloads else None,
        "result": _shortened(flow.result_json) if payloads else None,
    }
    return [(name, value) for name, value in told.items() if value is not None]


def _shortened(value: Any) -> str | None:
    """JSON of any size, in a line; all of it is in --json."""
    text = None if value is None else json.dumps(value, ensure_ascii=False)
    return text if text is None or len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"


def step_row(step: FlowStep, now: datetime) -> list[object]:
    """A step; what is open has taken until ``now``."""
    ended = step.status.is_terminal
    took = duration(((step.updated_at if ended else now) - step.created_at).total_seconds())
    if not ended:
        took += " so far"
    began, error = moment(step.created_at), describe_error(step.error_json)
    name = shown(step.task, given_as(step))
    return [step.position or None, name, step.status, step.attempt, began, took, error]


def event_row(event: FlowEvent, step: str | None) -> list[object]:
    """An event, with the name of the step that it is about."""
    return [moment(event.at), event.revision, event.kind, about(event, step)]


def payload(event: FlowEvent) -> str | None:
    """What an event carries, in a line."""
    return _shortened(event.payload_json)


def work_rows(work: Sequence[Dispatched], default_queue: str, now: datetime, *, is_paused: bool) -> list[list[object]]:
    """The things that may need a worker, those of which the same is to be told in one row."""
    rows = Counter(_work_row(each, default_queue, now, is_paused) for each in work)
    return [[count, *row] for row, count in rows.items()]


def _work_row(work: Dispatched, default_queue: str, now: datetime, is_paused: bool) -> tuple[object, ...]:
    queue = work.queue or default_queue if work.kind in ("drive", "step") else None
    is_kept = is_paused and work.kind == "drive" and work.worker is None
    become = "kept until the flow is unpaused" if is_kept else describe_work(work, now)
    return (work.kind, work.task, queue, become, work.crash_count or None)
