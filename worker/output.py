"""What the command line shows: tables on a terminal, plain columns in a pipe, JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from enum import StrEnum
from typing import Any
from uuid import UUID

import click
from rich.cells import cell_len, set_cell_size

from celery_flows.store import Flow, FlowEvent, FlowMode, FlowStep
from celery_flows.store.engines import parse_url
from celery_flows.tasks.replay import given_as, shown


def show_json(value: Any) -> None:
    """One JSON document on standard output; times are ISO 8601 in UTC."""
    click.echo(json.dumps(value, default=_plain, ensure_ascii=False, indent=2 if sys.stdout.isatty() else None))


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, UUID | StrEnum):
        return str(value)
    raise TypeError(type(value).__name__)


def show_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table; in a pipe, a line a row, its cells parted by tabs, so that nothing is cut."""
    texts = [["" if cell is None else printable(str(cell)) for cell in row] for row in rows]
    if sys.stdout.isatty():
        head, *lines = _aligned([columns, *texts])
        lines.insert(0, click.style(head, underline=True))
        title = title and click.style(title, bold=True)
    else:
        lines = ["\t".join(row) for row in [columns, *texts]]
    click.echo("\n".join([title, *lines] if title else lines))


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """No frame, nothing folded: on a narrow terminal a long row runs on, and what is copied from it is whole."""
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(set_cell_size(cell, width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def printable(text: str) -> str:
    """One line that does nothing to a terminal, whatever somebody wrote into a flow."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def masked(url: str) -> str:
    """A database's URL without password and options, which may be secret."""
    return parse_url(url).set(query={}).render_as_string(hide_password=True)


def flow_row(flow: Flow) -> list[object]:
    """What a list of flows shows of one."""
    return [
        flow.id,
        flow.controller_id,
        flow.status,
        flow.current_step,
        flow.owner_session_key,
        moment(flow.updated_at),
    ]


FLOW_COLUMNS = ("id", "flow", "status", "step", "owner", "updated")


def show_flow(
    flow: Flow, steps: Sequence[FlowStep], events: Sequence[FlowEvent], queued_at: datetime | None = None
) -> None:
    """One flow as a story: what it is, its steps, what happened (oldest first)."""
    facts = {
        "flow": flow.controller_id,
        "status": flow.status,
        "owner": flow.owner_session_key,
        "goal": flow.goal or None,
        "key": flow.idempotency_key,
        "started": moment(flow.created_at),
        "ended": moment(flow.finished_at),
        "waits for": flow.wait_json and describe_wait(flow.wait_json),
        "queues for a slot": queued_at and f"since {moment(queued_at)}",
        "cancel requested": "yes" if flow.cancel_requested else None,
        "paused": moment(flow.paused_at),
        "forked from": flow.forked_from,
        "goes on as": flow.continued_as,
        "mirrored": "yes" if flow.mode is FlowMode.MIRRORED else None,
        "input": _shortened(flow.input_json),
        "result": _shortened(flow.result_json),
        "error": flow.error_json and f"{flow.error_json['type']}: {flow.error_json['message']}",
        "not undone": ", ".join((flow.error_json or {}).get("undo_failed", ())) or None,
    }
    show_table(str(flow.id), ("what", "is"), [(name, value) for name, value in facts.items() if value is not None])
    click.echo()
    show_table("Steps", STEP_COLUMNS, [step_row(step) for step in steps])
    click.echo()
    names = {step.run_id: step.task for step in steps}
    show_table("History", EVENT_COLUMNS, [event_row(event, names) for event in events])


def _shortened(value: Any) -> str | None:
    """JSON of any size, in a line; all of it is in --json."""
    text = None if value is None else json.dumps(value, ensure_ascii=False)
    return text if text is None or len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"


SHOWN_CHARACTERS = 200


STEP_COLUMNS = ("#", "step", "status", "attempt", "began", "took", "error")
EVENT_COLUMNS = ("at", "revision", "event", "about")


def step_row(step: FlowStep) -> list[object]:
    took = f"{(step.updated_at - step.created_at).total_seconds():.3f} s" if step.status.is_terminal else None
    error = step.error_json and step.error_json["type"]
    name = shown(step.task, given_as(step))
    return [step.position or None, name, step.status, step.attempt, moment(step.created_at), took, error]


def event_row(event: FlowEvent, step_names: Mapping[str, str]) -> list[object]:
    told = event.payload_json
    run_id = told.get("run_id")
    step = told.get("step", {}).get("task") or step_names.get(str(run_id), run_id)
    about = step or told.get("set", {}).get("current_step")
    return [moment(event.at), event.revision, event.kind, about]


def describe_wait(wait: dict[str, Any]) -> str:
    """A wait condition in words."""
    match wait["kind"]:
        case "timer":
            return f"a timer, due {wait['at']}"
        case "external_event":
            until = f", until {wait['timeout_at']}" if wait.get("timeout_at") else ""
            return f"event {wait['topic']!r} for {wait['correlation_id']!r}{until}"
        case _:
            return "somebody to resume it"


def moment(at: datetime | None) -> str | None:
    """A time in UTC, to the millisecond."""
    return None if at is None else at.strftime("%Y-%m-%d %H:%M:%S.%f")[:-3] + "Z"
