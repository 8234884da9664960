"""Why a flow does not go on, told to who waits for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from celery_flows.store import Flow, FlowStatus, FlowStepStatus, SqlFlowStore, limits
from celery_flows.store.models import OPEN

SHOWN = 5


class Stuck(AssertionError):
    """Nothing is left to do, and what the test waits for has not come. Says what the open flows wait for."""


class Spins(AssertionError):
    """A flow does not come to rest: there is always more to do."""


class NeverStruck(AssertionError):
    """A crash or a fault of messages that the test asked for did not happen: so the test proves nothing."""


def open_flows(store: SqlFlowStore) -> list[Flow]:
    """The flows that have not ended, oldest first."""
    return sorted((flow for status in OPEN for flow in store.list_by_status(status)), key=lambda flow: flow.id)


def tell_waits(store: SqlFlowStore) -> str:
    """What the open flows wait for, one a line."""
    flows = open_flows(store)
    lines = [f"- {flow.controller_id} {flow.id} {_reason(store, flow)}" for flow in flows[:SHOWN]]
    if len(flows) > SHOWN:
        lines.append(f"- and {len(flows) - SHOWN} more")
    return "\n".join(lines)


def _reason(store: SqlFlowStore, flow: Flow) -> str:
    if flow.paused_at is not None and not flow.cancel_requested:
        return "is paused: flows.manager.unpause(…) lets it go on"
    if flow.status is FlowStatus.WAITING:
        return _wait(flow.wait_json or {})
    if store.run(limits.queued_since, flow.id) is not None:
        return "queues for a slot of its limit"
    waits_for = ", ".join(_members(store, flow))
    return f"waits for its steps: {waits_for}" if waits_for else f"is {flow.status.value}"


def _wait(wait: dict[str, Any]) -> str:
    match wait.get("kind"):
        case "external_event":
            told = f"{wait['topic']!r}, {wait['correlation_id']!r}"
            return f"waits for an event that nobody has sent: flows.emit({told}, …)"
        case "timer":
            return f"sleeps until {wait['at']}"
        case _:
            return "waits to be resumed by hand: flows.handle(…).resume(…)"


def _members(store: SqlFlowStore, flow: Flow) -> Iterator[str]:
    for step in store.list_steps(flow.id):
        if step.status in (FlowStepStatus.PENDING, FlowStepStatus.RUNNING):
            yield step.task
