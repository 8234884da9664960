"""Application → store: a flow and the order to drive it, in one transaction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from celery_flows.store import Flow, FlowNotFound, KeyConflict, StartPending, StoreError
from celery_flows.store import operations as op
from celery_flows.store.changes import Drive
from celery_flows.store.dispatch import Hint
from celery_flows.store.script import LOCK_NOT_AVAILABLE, Call
from celery_flows.tasks.handle import FlowHandle
from celery_flows.tasks.transaction import Transaction, after_commit, transaction_of

if TYPE_CHECKING:
    from celery_flows.tasks.registry import FlowDefinition
    from celery_flows.tasks.runtime import Runtime

Out = TypeVar("Out")


def start(
    runtime: Runtime,
    definition: FlowDefinition[Any, Out],
    input: Any,
    *,
    key: str | None,
    owner: str,
    goal: str,
    transaction: Transaction | None,
) -> FlowHandle[Out]:
    """Stores the flow, and publishes its drive message after the commit. See :meth:`FlowDefinition.start`."""
    caller = None if transaction is None else transaction_of(transaction)
    store = runtime.store if caller is None else runtime.store.using(caller)
    flow = Flow(
        controller_id=definition.name,
        definition_version=definition.version,
        deadline_at=None if definition.timeout is None else store.run(op.now) + definition.timeout,
        goal=goal,
        owner_session_key=owner,
        idempotency_key=key,
        input_json=definition.encoded_input(input),
    )
    drive = Drive(definition.name, definition.queue, first_pause=runtime.first_pause)
    call = Call(op.create_flow, (flow, {}, drive))
    try:
        created = store.attempt(call, settled=Call(op.find_created, (flow,)), waits_for_locks=key is None)
    except StoreError as error:
        if key is not None and _lock_timed_out(error):
            raise StartPending(definition.name, key) from error
        raise
    if not created:
        assert key is not None
        return FlowHandle(runtime, _existing(store, flow, key).id, definition)
    hint = Hint(str(flow.id), flow.id, "drive", definition.name, definition.queue)
    if caller is None:
        runtime.publisher.publish(hint)
    else:
        after_commit(caller, lambda: runtime.publisher.publish(hint))
    return FlowHandle(runtime, flow.id, definition)


def _existing(store: Any, flow: Flow, key: str) -> Flow:
    known: Flow | None = store.run(op.find_by_key, flow.controller_id, key)
    if known is None:  # pruned in the very moment in between
        raise FlowNotFound(key)
    if known.input_json != flow.input_json:
        raise KeyConflict(flow.controller_id, key, known.id)
    return known


def _lock_timed_out(error: StoreError) -> bool:
    return getattr(getattr(error.__cause__, "orig", None), "sqlstate", None) == LOCK_NOT_AVAILABLE
