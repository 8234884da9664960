"""Slots of limited flows: asked for by who drives them, and given on by who frees one."""

from __future__ import annotations

import logging
from uuid import UUID

from celery_flows.store import FlowError, limits
from celery_flows.store.limits import Bounds
from celery_flows.tasks.runtime import Runtime

log = logging.getLogger("celery_flows.limits")


def admitted(runtime: Runtime, flow_id: UUID) -> bool:
    """Whether a flow that could not be claimed has been given a slot by now. One that is limited and due queues for it;
    whoever frees one calls a worker to it."""
    waiting = runtime.store.run(limits.find_waiting, flow_id)
    if waiting is None:
        return False
    bounds = _bounds(runtime, waiting.definition)
    if bounds is None:
        log.error("no flow definition %r here; flow %s waits for a worker that has it", waiting.definition, flow_id)
        return False
    urgency = runtime.urgency(waiting.priority)
    admission = runtime.store.run(limits.admit, flow_id, bounds, urgency, runtime.first_pause)
    runtime.publisher.publish(*admission.others)
    return admission.has_slot


def give_on(runtime: Runtime, key: str, definition: str) -> int:
    """Gives the free slots of a limit to those who are next, and calls workers to them; says how many. Never raises:
    while somebody queues, sweeps look too."""
    bounds = _bounds(runtime, definition)
    if bounds is None:
        return 0
    try:
        given = runtime.store.run(limits.settle, key, definition, bounds, runtime.first_pause)
    except FlowError as error:
        log.warning("slots of flow %r are not given on yet (%s)", definition, type(error).__name__)
        return 0
    runtime.publisher.publish(*given)
    return len(given)


def give_due(runtime: Runtime) -> int:
    """Looks at the limits that are due, of the definitions that are known here; says how many flows got a slot."""
    names = [definition.name for definition in runtime.registry]
    due = runtime.store.run(limits.list_due, names, runtime.settings.sweep_limit)
    return sum(give_on(runtime, key, definition) for key, definition in due)


def _bounds(runtime: Runtime, name: str) -> Bounds | None:
    """As the latest version has it, for one key is shared by flows of all; None: the definition is not here."""
    definition = runtime.registry.get(name)
    if definition is None:
        return None
    return Bounds() if definition.limit is None else definition.limit.bounds
