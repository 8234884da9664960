"""Starting flows by their keys, and many at once: all of them are there, or none."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy import Connection

from celery_flows.store.changes import Drive, NewFlow
from celery_flows.store.errors import FlowNotFound, KeyConflict
from celery_flows.store.models import Flow
from celery_flows.store.operations import (
    create_flow,
    created_columns,
    dialect,
    find_by_key,
    reads,
    told_of_drive,
    writes,
)
from celery_flows.store.tables import flow_events, flows
from celery_flows.store.validation import encode_json

ROWS_AT_ONCE = 1000  # a statement: more make it no faster, and let a key's holder wait longer


@writes
def create_flow_apart(conn: Connection, flow: Flow, payload: dict[str, Any], drive: Drive) -> bool:
    """:func:`create_flow` in a caller's transaction, which can go on if the database refuses this."""
    with dialect(conn).savepoint(conn):
        return create_flow(conn, flow, payload, drive)


@reads
def find_started(conn: Connection, flow: Flow) -> UUID:
    """Which flow is there for the key of this one, which could not be created.

    Raises:
        KeyConflict: the key was used with other input, for a flow that goes on for none.
        FlowNotFound: it was pruned in the very moment in between.
    """
    assert flow.idempotency_key is not None
    known = find_by_key(conn, flow.controller_id, flow.idempotency_key)
    if known is None:
        raise FlowNotFound(flow.idempotency_key)
    if known.input_json != flow.input_json:
        _check_go_on(conn, flow.controller_id, {known.id: flow.idempotency_key})
    return known.id


def _check_go_on(conn: Connection, controller_id: str, keys: Mapping[UUID, str]) -> None:
    """Looks at flows whose input is another than the one now given with their keys.

    One that goes on for another has an input that nobody ever gave with the key, so it is the key's flow whatever comes
    with the key. What the first of them began with is not kept: that one may have been pruned.

    Raises:
        KeyConflict: one of them goes on for none.
    """
    event = flow_events.c
    created = sa.select(event.flow_id, event.payload_json).where(event.flow_id.in_(keys), event.revision == 1)
    going_on = {flow_id for flow_id, payload in conn.execute(created) if "continues" in payload}
    for flow_id, key in keys.items():
        if flow_id not in going_on:
            raise KeyConflict(controller_id, key, flow_id)


@writes
def create_many(conn: Connection, template: Flow, payload: dict[str, Any], new: Sequence[NewFlow]) -> dict[UUID, UUID]:
    """Inserts flows that differ from ``template`` by what each brings, with their ``created`` events and drive rows.

    Gives by the id of each which flow is there for it: itself, or the one that its key had started before. Running it
    again after a lost reply gives the same flows.

    Raises:
        KeyConflict: a key was used with other input, for a flow that goes on for none. Nothing was written.
    """
    there = _with_their_keys(conn, template, new)
    told = encode_json("payload", {**payload, **told_of_drive(new[0].drive), "set": created_columns(template)})
    database = dialect(conn)
    # In the order of their keys: two calls that share some would else each hold what the other waits for.
    missing = sorted((each for each in new if each.id not in there), key=lambda each: each.key or "")
    with database.savepoint(conn):  # what else a caller's transaction holds is not ours to undo
        for some in _batches(missing):
            there.update((made, made) for made in database.create_many(conn, template, told, some))
        taken = [each for each in missing if each.id not in there]  # by an earlier try, or by whoever was quicker
        there |= _with_their_ids(conn, taken) | _with_their_keys(conn, template, taken)
        for each in taken:
            if each.id not in there:  # pruned in the very moment in between
                raise FlowNotFound(each.key)
    return there


def _with_their_keys(conn: Connection, template: Flow, new: Sequence[NewFlow]) -> dict[UUID, UUID]:
    there: dict[UUID, UUID] = {}
    for some in _batches([each for each in new if each.key is not None]):
        mine = sa.and_(
            flows.c.controller_id == template.controller_id, flows.c.idempotency_key.in_([each.key for each in some])
        )
        rows = conn.execute(sa.select(flows.c.idempotency_key, flows.c.id, flows.c.input_json).where(mine))
        known = {key: (flow_id, input) for key, flow_id, input in rows}
        differ: dict[UUID, str] = {}
        for each in some:
            if each.key is None or each.key not in known:
                continue
            flow_id, input = known[each.key]
            if input != _plain(each.input):
                differ[flow_id] = each.key
            there[each.id] = flow_id
        if differ:
            _check_go_on(conn, template.controller_id, differ)
    return there


def _with_their_ids(conn: Connection, new: Sequence[NewFlow]) -> dict[UUID, UUID]:
    mine = (sa.select(flows.c.id).where(flows.c.id.in_([each.id for each in some])) for some in _batches(new))
    return {flow_id: flow_id for query in mine for flow_id in conn.scalars(query)}


def _batches(new: Sequence[NewFlow]) -> Iterable[Sequence[NewFlow]]:
    return (new[begin : begin + ROWS_AT_ONCE] for begin in range(0, len(new), ROWS_AT_ONCE))


def _plain(text: str | None) -> Any:
    return None if text is None else json.loads(text)
