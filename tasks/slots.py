"""Schedule → store: starts what the clock says. Beat only says when to look; the database's clock says what is due."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from datetime import datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

from celery_flows.store import Flow, FlowError, schedules
from celery_flows.store import operations as op
from celery_flows.store.changes import Drive
from celery_flows.store.dispatch import drive_hint
from celery_flows.store.schedules import Skipped
from celery_flows.tasks.registry import FlowDefinition
from celery_flows.tasks.schedule import ON_TIME_SECONDS, Schedule

if TYPE_CHECKING:
    from celery_flows.tasks.runtime import Runtime

log = logging.getLogger("celery_flows.slots")


def start_due(runtime: Runtime) -> int:
    """Starts the flows whose slots are due, of all definitions with a schedule; says how many. Never raises for one of
    them: it is tried again at the next look."""
    return sum(try_to_start(runtime, definition) for definition in runtime.registry)


def try_to_start(runtime: Runtime, definition: FlowDefinition[Any, Any]) -> int:
    """Starts the flows of this definition whose slots are due; says how many."""
    if definition.schedule is None:
        return 0
    try:
        return _start(runtime, definition, definition.schedule)
    except FlowError as error:
        log.error("the schedule of flow %r is not seen to yet (%s)", definition.name, type(error).__name__)
        return 0


def _start(runtime: Runtime, definition: FlowDefinition[Any, Any], schedule: Schedule) -> int:
    due = partial(runtime.due_slots, schedule)

    def flow_at(slot: datetime, begins_at: datetime) -> tuple[Flow, Drive]:
        with runtime.watch.spans.starting(definition.name) as started:
            flow = definition.new_flow(
                deadline_at=None if definition.timeout is None else begins_at + definition.timeout,
                owner_session_key="default",
                requester_origin="schedule",
                idempotency_key=f"slot {slot.isoformat()}",
                input_json=definition.encoded_input(slot if definition.takes_input else None),
                trace_json=started.carrier,
            )
            started.tell(flow.id)
        return flow, definition.drive_row(definition.limit_key(flow.input_json))

    seen = runtime.store.run(schedules.start_due, row_of(definition), due, flow_at, schedule.overlap)
    for slot in seen.skipped:
        log.warning("flow %r skips its slot %s: the one before is still open", definition.name, slot.isoformat())
    runtime.publisher.publish(*(drive_hint(each, definition.drive_row(None)) for each in seen.started))
    return len(seen.started) + len(seen.held_back)


def missed(runtime: Runtime) -> Iterator[tuple[str, datetime]]:
    """The definitions of whose schedules a slot has passed that nobody has seen to, and the latest such slot. One that
    waits for the flow of the slot before has been seen."""
    before = runtime.store.run(op.now) - timedelta(seconds=ON_TIME_SECONDS)
    for definition in runtime.registry:
        if definition.schedule is not None:
            last = runtime.store.run(schedules.last_slot, row_of(definition))
            slot = next(definition.schedule.slots_before(before, runtime.app.timezone), None)
            if slot is not None and last is not None and slot > last and not _waits(runtime, definition):
                yield definition.name, slot


def skipped(runtime: Runtime) -> Iterator[tuple[str, Skipped]]:
    """The definitions whose schedules have passed over slots, for the flow of the one before was open, and how many."""
    for definition in runtime.registry:
        if definition.schedule is not None and definition.schedule.overlap == "skip":
            found = runtime.store.run(schedules.skipped, row_of(definition))
            if found is not None:
                yield definition.name, found


def _waits(runtime: Runtime, definition: FlowDefinition[Any, Any]) -> bool:
    schedule = definition.schedule
    if schedule is None or schedule.overlap != "wait":
        return False
    return runtime.store.run(schedules.is_held_up, row_of(definition))


def row_of(definition: FlowDefinition[Any, Any]) -> str:
    """The name under which it is kept what has been seen to."""
    return f"schedule {definition.name}"
