"""The flows that wait for what a gather waits for: one for an external event, one for a time."""

from __future__ import annotations

from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any

from celery_flows.tasks.awaited import EVENT, TIMER, emit_again
from celery_flows.tasks.registry import FlowDefinition

if TYPE_CHECKING:
    from celery_flows.tasks.runtime import Runtime


def register_waiting_flows(runtime: Runtime) -> None:
    """Adds their definitions."""

    def event(run: Any, wanted: dict[str, str]) -> Any:
        payload = run.wait_for(wanted["topic"], wanted["correlation_id"])
        # Cancelled with an event in its hands, for another was first: somebody else may wait for this one.
        give = partial(emit_again, runtime, run.flow_id, wanted, payload)
        run.options(name="give_back").on_failure(give)
        return payload

    def timer(run: Any, at: datetime) -> None:
        run.sleep_until(at)

    runtime.registry.add_own(FlowDefinition(runtime, EVENT, event))
    runtime.registry.add_own(FlowDefinition(runtime, TIMER, timer))
