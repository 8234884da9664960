"""Many flows at once: all of them are there, or none."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy import Connection

from celery_flows.store.changes import NewFlow
from celery_flows.store.errors import FlowNotFound, KeyConflict
from celery_flows.store.models import Flow
from celery_flows.store.operations import created_columns, dialect, writes
from celery_flows.store.tables import flows
from celery_flows.store.validation import encode_json

ROWS_AT_ONCE = 1000  # a statement: more make it no faster, and let a key's holder wait longer


@writes
def create_many(conn: Connection, template: Flow, payload: dict[str, Any], new: Sequence[NewFlow]) -> dict[UUID, UUID]:
    """Inserts flows that differ from ``template`` by what each brings, with their ``created`` events and drive rows.

    Gives by the id of each which flow is there for it: itself, or the one that its key had started before. Running it
    again after a lost reply gives the same flows.

    Raises:
        KeyConflict: a key was used with other input. Nothing was written.
    """
    there = _with_their_keys(conn, template, new)
    told = encode_json("payload", {**payload, "driven": True, "set": created_columns(template)})
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
        for each in some:
            if each.key is None or each.key not in known:
                continue
            flow_id, input = known[each.key]
            if input != _plain(each.input):
                raise KeyConflict(template.controller_id, each.key, flow_id)
            there[each.id] = flow_id
    return there


def _with_their_ids(conn: Connection, new: Sequence[NewFlow]) -> dict[UUID, UUID]:
    mine = (sa.select(flows.c.id).where(flows.c.id.in_([each.id for each in some])) for some in _batches(new))
    return {flow_id: flow_id for query in mine for flow_id in conn.scalars(query)}


def _batches(new: Sequence[NewFlow]) -> Iterable[Sequence[NewFlow]]:
    return (new[begin : begin + ROWS_AT_ONCE] for begin in range(0, len(new), ROWS_AT_ONCE))


def _plain(text: str | None) -> Any:
    return None if text is None else json.loads(text)
