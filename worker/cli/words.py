"""What happened, what a flow waits for and who is at it, in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any
from uuid import UUID

from celery_flows.store import FlowEvent
from celery_flows.store.views import Dispatched
from celery_flows.tasks.inline import RETRY_AT
from celery_flows.worker.output import moment


def about(event: FlowEvent, step: str | None) -> str:
    """What an event tells, without payloads. Of an event that somebody appended by hand, only the step."""
    try:
        said = [str(each) for each in _told(event.kind, event.payload_json) if each]
    except (AttributeError, KeyError, TypeError, ValueError):  # it has the kind of one of ours, and is none
        said = []
    return ", ".join([step, *said] if step else said)


def _told(kind: str, told: Mapping[str, Any]) -> Iterator[str | None]:
    changed, row = told.get("set", {}), told.get("step", {})
    match kind:
        case "created":
            yield f"begins in {duration(told['countdown'])}" if "countdown" in told else None
            yield f"begins at {_at(told['eta'])}" if "eta" in told else None
            yield f"goes on for {UUID(told['continues'])}" if "continues" in told else None
        case "waiting":
            yield describe_wait(changed["wait_json"])
        case "started" | "resumed" | "reclaimed" | "step_started":
            yield _event(told["topic"], told["correlation_id"]) if "topic" in told else None
            yield f"by {process(told['worker'])}" if "worker" in told else None
        case "step_retrying":
            yield f"attempt {row['attempt']:d}"
            yield describe_error(row["error_json"])
            yield f"again in {duration(told['delay_seconds'])}" if "delay_seconds" in told else None
            yield f"again at {_at(row['error_json'][RETRY_AT])}" if RETRY_AT in row["error_json"] else None
        case "step_failed" | "failed" | "cancelled" | "history_refused":
            yield describe_error(row.get("error_json") or changed.get("error_json")) or told.get("reason")


def describe_error(error: Mapping[str, Any] | None) -> str | None:
    """An error's type and message."""
    if not error or "type" not in error:
        return None
    return f"{error['type']}: {error['message']}" if error.get("message") else str(error["type"])


def describe_wait(wait: Mapping[str, Any]) -> str:
    """A wait condition in words."""
    match wait["kind"]:
        case "timer":
            return f"a timer, due {_at(wait['at'])}"
        case "external_event":
            until = f", until {_at(wait['timeout_at'])}" if wait.get("timeout_at") else ""
            return f"{_event(wait['topic'], wait['correlation_id'])}{until}"
        case _:
            return "somebody to resume it"


def _event(topic: str, correlation_id: str) -> str:
    return f"event {topic!r} for {correlation_id!r}"


def _at(text: str) -> str | None:
    return moment(datetime.fromisoformat(text))


def describe_work(work: Dispatched, now: datetime) -> str:
    """What has become of a thing that may need a worker."""
    if work.worker is not None:
        return f"held by {process(work.worker)}, lease until {moment(work.due_at)}"
    if work.publish_count > 0:
        times = "once" if work.publish_count == 1 else f"{work.publish_count} times"
        return f"published {times}, waits for a worker"
    if work.due_at is None:
        return "at rest"
    return f"due since {moment(work.due_at)}" if work.due_at <= now else f"due at {moment(work.due_at)}"


def process(worker: str) -> str:
    """Whose token it is, in words: it begins with host, boot, application process and process."""
    host, *parts = worker.split("/")
    return f"process {parts[2]} on {host}" if len(parts) > 2 else worker


def duration(seconds: float) -> str:
    """A length of time, as people say it."""
    if seconds < 60:
        return f"{seconds:.3f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"
