"""Flows that the clock starts: one for each slot, whoever looks, and however many look at once.

Which slot of a schedule was seen to last stands in ``flow_heartbeats``. Whoever sees to one holds that row's lock until
the slot's flow is there too; and a flow's key is made of its slot, so that not even the loss of that row doubles it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy import Connection

from celery_flows.store.changes import Drive
from celery_flows.store.models import Flow
from celery_flows.store.operations import create_flow, find_by_key, insert_into, now, reads, writes
from celery_flows.store.tables import flow_heartbeats

_h = flow_heartbeats.c

Overlap = Literal["allow", "skip", "wait"]  # what becomes of a slot while the flow of the one before is open

Due = Callable[[datetime, datetime | None], Sequence[datetime]]  # of now, and the slot seen to last (None: never)
FlowAt = Callable[[datetime, datetime], tuple[Flow, Drive]]  # of a slot, and when its flow begins


@dataclass(slots=True)
class Seen:
    """What came of a look at a schedule."""

    started: list[UUID] = field(default_factory=list)
    held_back: list[UUID] = field(default_factory=list)  # until their slots, which are yet to come
    skipped: list[datetime] = field(default_factory=list)  # slots at which the flow of the one before was still open


@dataclass(frozen=True, slots=True)
class Skipped:
    """Slots that a schedule has passed over."""

    count: int
    last: datetime


@writes
def start_due(conn: Connection, name: str, due: Due, flow_at: FlowAt, overlap: Overlap) -> Seen:
    """Starts a flow for each slot that is due, all in one transaction.

    Args:
        due: says which slots are.
        flow_at: makes the flow of a slot, which begins at a time, and its drive row.
        overlap: while the flow of the last slot is open, a slot has one all the same, or is passed over, or waits: then
            it and what comes after it is not seen to yet.
    """
    row = _row(conn, name, lock=False)
    if row is not None and not due(now(conn), _slot(row)):
        return Seen()
    row = _locked(conn, name)
    at = now(conn)
    slots, flow_before = due(at, _slot(row)), row.get("flow")
    seen = Seen()
    for number, slot in enumerate(slots):
        if overlap != "allow" and _is_open(conn, flow_before):
            if overlap == "wait":
                slots = slots[:number]
                break
            seen.skipped.append(slot)
            continue
        flow, drive = flow_at(slot, max(slot, at))
        begins = drive if slot <= at else replace(drive, due_at=slot, published=False)
        if create_flow(conn, flow, {"slot": slot.isoformat()}, begins):
            (seen.started if begins.published else seen.held_back).append(flow.id)
        flow_before = [flow.controller_id, flow.idempotency_key]
    if slots or not row:
        told = {"slot": (slots[-1] if slots else at).isoformat(), "flow": flow_before}
        told["skipped"] = _skipped(row.get("skipped"), seen.skipped)
        conn.execute(sa.update(flow_heartbeats).where(_h.name == name).values(at=at, report=told))
    return seen


@reads
def last_slot(conn: Connection, name: str) -> datetime | None:
    """The slot that was seen to last, or when somebody first looked at this schedule; None: nobody has."""
    return _slot(_row(conn, name, lock=False))


@reads
def skipped(conn: Connection, name: str) -> Skipped | None:
    """The slots that were ever passed over, for the flow of the one before was still open; None: there are none."""
    told = (_row(conn, name, lock=False) or {}).get("skipped")
    return None if told is None else Skipped(told["count"], datetime.fromisoformat(told["last"]))


@reads
def is_held_up(conn: Connection, name: str) -> bool:
    """Whether the flow of the slot that was seen to last is still open."""
    return _is_open(conn, (_row(conn, name, lock=False) or {}).get("flow"))


def _skipped(before: Mapping[str, Any] | None, now: Sequence[datetime]) -> Mapping[str, Any] | None:
    if not now:
        return before
    return {"count": len(now) + (before["count"] if before else 0), "last": now[-1].isoformat()}


def _slot(row: Mapping[str, Any] | None) -> datetime | None:
    return datetime.fromisoformat(row["slot"]) if row else None


def _locked(conn: Connection, name: str) -> Mapping[str, Any]:
    first = insert_into(conn, flow_heartbeats).values(name=name, at=now(conn), every_seconds=0.0, report={})
    conn.execute(first.on_conflict_do_nothing())
    return _row(conn, name, lock=True) or {}


def _row(conn: Connection, name: str, *, lock: bool) -> Mapping[str, Any] | None:
    query = sa.select(_h.report).where(_h.name == name)
    report: Mapping[str, Any] | None = conn.scalar(query.with_for_update() if lock else query)
    return report


def _is_open(conn: Connection, flow: Sequence[str] | None) -> bool:
    """Whether the flow of this definition and key is. One that goes on as another hands its key on, so this is the last
    of them, whatever was pruned of the others."""
    found = None if flow is None else find_by_key(conn, *flow)
    return found is not None and not found.status.is_terminal
