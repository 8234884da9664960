"""Application → store → waiting flow: external events."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.orm import Session

from celery_flows.store import FlowError, inbox
from celery_flows.store.models import new_id
from celery_flows.store.script import Call
from celery_flows.store.validation import check_name, encode_json
from celery_flows.store.waits import event_key
from celery_flows.tasks.transaction import Transaction, after_commit, transaction_of

if TYPE_CHECKING:
    from celery_flows.tasks.runtime import Runtime

log = logging.getLogger("celery_flows.emit")


def emit(
    runtime: Runtime,
    topic: str,
    correlation_id: str,
    payload: Any,
    transaction: Transaction | None,
    *,
    event_id: UUID | None = None,
) -> UUID:
    """Stores the event, then hands over what can be. See :meth:`Flows.emit`. An id that is stored already changes
    nothing."""
    check_name("topic", topic)
    check_name("correlation_id", correlation_id)
    encode_json("payload", payload, limit=runtime.settings.max_payload_bytes)
    event_id = event_id or new_id()
    caller = None if transaction is None else transaction_of(transaction)
    # A bare Connection lets nothing be done with the database after its commit: there the sweep looks, at once.
    pause = 0.0 if isinstance(caller, sa.Connection) else runtime.first_pause
    # The id is made before the first try, so an emit whose reply was lost is not stored twice.
    stored = Call(inbox.emit, (topic, correlation_id, payload, event_id, pause))
    if caller is None:
        runtime.store.attempt(stored, settled=Call(inbox.is_stored, (event_id,)))
        look(runtime, topic, correlation_id, event_id)
    else:
        runtime.store.using(caller).attempt(stored)
        if isinstance(caller, Session):
            after_commit(caller, lambda: look(runtime, topic, correlation_id, event_id))
    return event_id


def look(runtime: Runtime, topic: str, correlation_id: str, event_id: UUID) -> None:
    """Hands over what can be, after the event's commit; should this fail, the sweep does it."""
    try:
        hand_over(runtime, event_key(topic, correlation_id))
        runtime.store.run(inbox.drop_look, str(event_id))
    except FlowError as error:
        log.warning("an event is stored but not handed over yet (%s); the sweep does that", type(error).__name__)


def hand_over(runtime: Runtime, key: str, *, own: UUID | None = None) -> int:
    """Hands events of this key to the flows that wait for it until nothing moves any more; says how many.

    Their drivers are told, but for ``own``: the flow whose driver is asking.
    """
    moved = 0
    while (flow_id := runtime.store.run(inbox.hand_over_next, key)) is not None:
        moved += 1
        if flow_id != own:
            runtime.call_worker(str(flow_id))
    return moved
