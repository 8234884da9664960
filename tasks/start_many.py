"""Application → store: many flows in one transaction, and not a message for each.

Their drive rows are due at once, so that the workers' sweeps send the messages, each a batch at a time and as its
worker goes on; the first few are called right away. So the broker is never waited for longer than for one flow, and
what is stored does not depend on it. Whoever claims due rows by themselves finds these like any other.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import UUID

from celery_flows.store import Flow, InvalidData, StartPending, StoreError, starts
from celery_flows.store.changes import Drive, NewFlow
from celery_flows.store.dispatch import drive_hint
from celery_flows.store.models import new_id
from celery_flows.store.script import TRIES, Call, is_lock_timeout
from celery_flows.store.validation import check_name
from celery_flows.tasks.handle import FlowHandle
from celery_flows.tasks.start import Options, deadline_of, drive_row
from celery_flows.tasks.transaction import Transaction, once_committed, transaction_of

if TYPE_CHECKING:
    from celery_flows.tasks.registry import FlowDefinition
    from celery_flows.tasks.runtime import Runtime

Out = TypeVar("Out")

CALLED_AT_ONCE = 32  # flows whose message is sent after the commit, so that few do not wait for a sweep


@dataclass(frozen=True, slots=True)
class Wanted:
    """Inputs and keys, checked and encoded: what can be done before, and away from, any database."""

    template: Flow
    items: Sequence[tuple[UUID, str | None, str | None]]  # id, key, JSON text of the input
    limit_keys: Sequence[str | None]  # of those
    order: Sequence[UUID]  # of those ids, one for each input: a key that is repeated stands for one flow


def wanted(
    definition: FlowDefinition[Any, Any], inputs: Sequence[Any], keys: Sequence[str | None] | None, options: Options
) -> Wanted:
    """Checks and encodes everything.

    Raises:
        InvalidData: naming the input or key by its number.
    """
    template = definition.new_flow(
        goal=options.goal,
        owner_session_key=options.owner,
    )
    texts = [_encoded(definition, number, input) for number, input in enumerate(inputs)]
    checked = [None] * len(texts) if keys is None else _checked(keys, len(texts))
    items: list[tuple[UUID, str | None, str | None]] = []
    limit_keys: list[str | None] = []
    order: list[UUID] = []
    by_key: dict[str, tuple[int, UUID]] = {}
    for number, (key, text) in enumerate(zip(checked, texts, strict=True)):
        if key is not None and key in by_key:
            first, flow_id = by_key[key]
            if json.loads(texts[first] or "null") != json.loads(text or "null"):
                raise InvalidData(f"keys[{number}]", f"is the same as keys[{first}], and its input is not")
        else:
            flow_id = new_id()
            items.append((flow_id, key, text))
            limit_keys.append(_limit_key(definition, number, text))
            if key is not None:
                by_key[key] = number, flow_id
        order.append(flow_id)
    return Wanted(template, items, limit_keys, order)


def _checked(keys: Sequence[Any], count: int) -> list[str | None]:
    if len(keys) != count:
        raise InvalidData("keys", f"are {len(keys)}, for {count} inputs")
    return [None if key is None else check_name(f"keys[{number}]", key) for number, key in enumerate(keys)]


def _encoded(definition: FlowDefinition[Any, Any], number: int, input: Any) -> str | None:
    try:
        return definition.encoded_text(input)
    except InvalidData as error:
        raise InvalidData(f"inputs[{number}]{error.field.removeprefix('input')}", error.rule) from None


def _limit_key(definition: FlowDefinition[Any, Any], number: int, text: str | None) -> str | None:
    if definition.limit is None:
        return None
    try:
        return definition.limit_key(json.loads(text or "null"))
    except InvalidData as error:
        raise InvalidData(f"{error.field} of inputs[{number}]", error.rule) from error


def start_many(
    runtime: Runtime,
    definition: FlowDefinition[Any, Out],
    wanted: Wanted,
    options: Options,
    session: Transaction | None,
) -> list[FlowHandle[Out]]:
    """Stores the flows, and calls workers to the first of them after the commit. See
    :meth:`FlowDefinition.start_many`."""
    if not wanted.items:
        return []
    caller = None if session is None else transaction_of(session)
    store = runtime.store if caller is None else runtime.store.using(caller)
    called, told = drive_row(runtime, store, definition, options)
    new = [NewFlow(*item, drive=drive) for item, drive in zip(wanted.items, _drives(called, wanted), strict=True)]
    deadline = deadline_of(store, definition, called)
    keyed = any(each.key is not None for each in new)
    try:
        with runtime.watch.spans.starting(definition.name) as started:
            template = wanted.template.but(deadline_at=deadline, trace_json=started.carrier)
            there = store.attempt(Call(starts.create_many, (template, told, new)), lock_tries=0 if keyed else TRIES)
    except StoreError as error:
        if keyed and is_lock_timeout(error.__cause__):
            raise StartPending(definition.name, None) from error
        raise
    hints = [drive_hint(each.id, each.drive) for each in new if there[each.id] == each.id and each.drive.published]
    # For as long as one may take; what is left over, the sweep sends.
    seconds = runtime.settings.publish_timeout_seconds
    once_committed(caller, lambda: runtime.publisher.publish(*hints, within_seconds=seconds))
    return [FlowHandle(runtime, there[flow_id], definition) for flow_id in wanted.order]


def _drives(called: Drive, wanted: Wanted) -> list[Drive]:
    due_now = replace(called, first_pause=0.0, published=False)
    number = CALLED_AT_ONCE if called.published else len(wanted.items)
    rows = (called if index < number else due_now for index in range(len(wanted.items)))
    return [replace(row, limit_key=key) for row, key in zip(rows, wanted.limit_keys, strict=True)]
