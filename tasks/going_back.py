"""Going back: a new flow that begins with what another has recorded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from uuid import UUID

from celery_flows.store import (
    FlowNotFound,
    FlowStatus,
    FlowStep,
    InvalidData,
    SqlFlowStore,
    taking_over,
)
from celery_flows.store import operations as op
from celery_flows.store.dispatch import drive_hint
from celery_flows.store.errors import IllegalTransition
from celery_flows.store.models import FlowMode
from celery_flows.store.script import Call
from celery_flows.store.taking_over import Origin
from celery_flows.store.validation import check_mapping
from celery_flows.tasks.prefix import before, find_step, state_after, taken_over, until_failure
from celery_flows.tasks.replay import is_undoing
from celery_flows.tasks.spans import Starting
from celery_flows.tasks.transaction import Transaction, once_committed, transaction_of

if TYPE_CHECKING:
    from celery_flows.tasks.runtime import Runtime


def fork(
    runtime: Runtime, flow_id: UUID, from_step: str, state: dict[str, Any] | None, session: Transaction | None
) -> UUID:
    """The id of the new flow. See :meth:`FlowHandle.fork`."""
    if not isinstance(from_step, str):
        raise InvalidData("from_step", "is the name of a step, name#2 for the second of a name, or a run id")
    if state is not None:
        check_mapping("state", state)
    origin, store, caller = _origin(runtime, flow_id, session)
    steps = before(origin, find_step(origin, from_step))
    with runtime.watch.spans.starting(origin.flow.controller_id, origin=origin.flow.trace_json) as started:
        return _begin(runtime, store, caller, origin, steps, state, started)


def retry(runtime: Runtime, flow_id: UUID, session: Transaction | None) -> UUID:
    """The id of the new flow. See :meth:`FlowHandle.retry`."""
    origin, store, caller = _origin(runtime, flow_id, session)
    flow = origin.flow
    if flow.status not in (FlowStatus.FAILED, FlowStatus.CANCELLED):
        raise IllegalTransition(flow.id, flow.status, "retried", ": it has neither failed nor was it cancelled")
    if flow.parent_flow_id is not None:
        told = f": retry its parent {flow.parent_flow_id}, which would not be told of this one; or fork it by itself"
        raise IllegalTransition(flow.id, flow.status, "retried", told)
    taken = until_failure(origin)
    left_out = {step.run_id for step in origin.steps} - {step.run_id for step in taken}
    if any(step.run_id in left_out for step in filter(is_undoing, origin.steps)):
        told = ": it has cleaned up, so what it recorded may be undone; start anew, or fork it from a step"
        raise IllegalTransition(flow.id, flow.status, "retried", told)
    with runtime.watch.spans.starting(flow.controller_id, origin=flow.trace_json) as started:
        return _begin(runtime, store, caller, origin, taken, None, started)


def _origin(
    runtime: Runtime, flow_id: UUID, session: Transaction | None
) -> tuple[Origin, SqlFlowStore, Transaction | None]:
    caller = None if session is None else transaction_of(session)
    store = runtime.store if caller is None else runtime.store.using(caller)
    origin = store.run(taking_over.read_origin, flow_id)
    if origin is None:
        raise FlowNotFound(flow_id)
    if origin.flow.mode is FlowMode.MIRRORED:
        raise InvalidData("flow", f"{flow_id} is mirrored: whoever sends its tasks has to send them again")
    return origin, store, caller


def _begin(
    runtime: Runtime,
    store: SqlFlowStore,
    caller: Transaction | None,
    origin: Origin,
    steps: Sequence[FlowStep],
    state: dict[str, Any] | None,
    started: Starting,
) -> UUID:
    """Stores the flow with what it takes over, and publishes its drive message after the commit."""
    old = origin.flow
    definition = runtime.registry.require(old.controller_id, old.definition_version)
    flow = definition.new_flow(
        goal=old.goal,
        owner_session_key=old.owner_session_key,
        requester_origin=old.requester_origin,
        input_json=old.input_json,
        state_json=state_after(origin, steps) if state is None else state,
        deadline_at=None if definition.timeout is None else store.run(op.now) + definition.timeout,
        forked_from=old.id,
        trace_json=started.carrier,
    )
    started.tell(flow.id)
    drive = definition.drive_row(definition.limit_key(flow.input_json), origin.priority)
    call = Call(taking_over.create_taking_over, (flow, drive, taken_over(origin, steps, flow.id, state)))
    store.attempt(call, settled=Call(op.find_created, (flow,)))
    once_committed(caller, lambda: runtime.publisher.publish(drive_hint(flow.id, drive)))
    return flow.id
