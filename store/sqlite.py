"""What SQLite does its own way: several statements in one transaction that begins as the only writer.

``BEGIN IMMEDIATE`` makes a transaction the database's one writer from its first statement, so what it reads stays true
until it commits, and no statement needs PostgreSQL's guards. Times are text with six digits; ``strftime('%f')`` gives
three of them, CURRENT_TIMESTAMP none.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy import Connection, and_, case, event, func, literal, or_, true
from sqlalchemy.dialects.sqlite import insert as insert

from celery_flows.store.backoff import full_jitter
from celery_flows.store.changes import (
    ORDER,
    Change,
    Completion,
    Drive,
    End,
    Member,
    NewFlow,
    Park,
    Settle,
    StepWrite,
    Wake,
)
from celery_flows.store.forks import ForkGate
from celery_flows.store.models import OPEN, OPEN_STEP, Flow, FlowStatus, FlowStep
from celery_flows.store.tables import (
    FLOW_COLUMNS,
    IS_PAUSED,
    UtcDateTime,
    flow_dispatch,
    flow_events,
    flow_steps,
    flows,
)

Row = Mapping[Any, Any]

NOW = "strftime('%Y-%m-%d %H:%M:%f000', 'now')"
_d, _s = flow_dispatch.c, flow_steps.c
_OPEN_STEPS = tuple(status.value for status in OPEN_STEP)


def now(conn: Connection) -> datetime:
    """The database's clock."""
    value = conn.scalar(sa.select(sa.type_coerce(sa.literal_column(NOW, sa.Text()), UtcDateTime())))
    assert isinstance(value, datetime)
    return value


def _text(value: str | None) -> Any:
    """JSON that is encoded already, as a column's value."""
    return sa.null() if value is None else literal(value, sa.Text())


# ---- transitions of a flow ------------------------------------------------------------------------------------------


def change(conn: Connection, what: Change) -> Row | None:
    """Writes the change if the flow is still at its revision; gives the stored row, or None if it is not."""
    at = now(conn)
    values = {**what.stored_columns(), "revision": what.revision + 1, "updated_at": at}
    if what.moves_rest:
        values["rest_at"] = at
    if what.ends:
        values["finished_at"] = at
    row = (
        conn.execute(
            sa.update(flows)
            .where(flows.c.id == what.flow_id, flows.c.revision == what.revision)
            .values(values)
            .returning(*FLOW_COLUMNS)
        )
        .mappings()
        .first()
    )
    if row is None:
        return None
    event_id = None
    if what.members:
        event_id = _schedule(conn, what, at)
    elif what.kind is not None:
        event_id = _append_revision(conn, what, what.kind, what.told(), at)
    if what.step is not None:
        _write_step(conn, what.flow_id, what.step, at)
    is_due = _settle_drive_row(conn, what, at, row["cancel_requested"])
    return {**row, "event_id": event_id, "is_due": is_due}


def _append_revision(conn: Connection, what: Change, kind: str, told: str, at: datetime) -> int:
    return _append(conn, what.flow_id, kind, told, at, revision=what.revision + 1, write_id=what.write_id)


def _append(conn: Connection, flow_id: UUID, kind: str, told: str, at: datetime, **more: Any) -> int:
    row = sa.insert(flow_events).values(flow_id=flow_id, kind=kind, payload_json=_text(told), at=at, **more)
    return int(conn.execute(row.returning(flow_events.c.id)).scalar_one())


def _write_step(conn: Connection, flow_id: UUID, step: StepWrite, at: datetime) -> None:
    outcome = {
        "status": step.status.value,
        "result_json": _text(step.result),
        "error_json": step.error,
        "attempt": step.attempt,
        "updated_at": at,
    }
    brought_forward = conn.execute(
        sa.update(flow_steps)
        .where(_s.flow_id == flow_id, _s.run_id == step.run_id, _s.status.in_(_OPEN_STEPS))
        .values(outcome)
    )
    if brought_forward.rowcount == 0:
        conn.execute(
            sa.insert(flow_steps).values(
                id=step.id, flow_id=flow_id, runtime="managed", run_id=step.run_id, task=step.task,
                args_json=_text(step.args), position=step.position,
                created_at=at - timedelta(microseconds=step.elapsed_us), **outcome,
            )
        )  # fmt: skip


def _schedule(conn: Connection, what: Change, at: datetime) -> int:
    assert isinstance(what.drive, Park)
    assert what.drive.join is not None
    due_at, group = at + timedelta(seconds=what.first_pause), what.drive.join.group
    # One call for all rows of a table: thousands of statements would keep every other writer out for seconds.
    conn.execute(_NEW_STEP, [_member_step(what.flow_id, member, at) for member in what.members])
    rows = [_member_row(what.flow_id, member, due_at, group) for member in what.members]
    conn.execute(sa.insert(flow_dispatch), rows)
    first, *others = what.members  # the first one's event carries the flow's revision
    told = f"{what.told()[:-1]},{_member_told(first)[1:]}"
    event_id = _append_revision(conn, what, "step_scheduled", told, at)
    if others:
        event = {"flow_id": what.flow_id, "kind": "step_scheduled", "at": at}
        conn.execute(_NEW_EVENT, [{**event, "told": _member_told(member)} for member in others])
    return event_id


_NEW_STEP = sa.insert(flow_steps).values(args_json=sa.bindparam("args", type_=sa.Text()))
_NEW_EVENT = sa.insert(flow_events).values(payload_json=sa.bindparam("told", type_=sa.Text()))


def _member_step(flow_id: UUID, member: Member, at: datetime) -> dict[str, Any]:
    return {
        "id": member.id, "flow_id": flow_id, "runtime": "managed", "run_id": member.run_id, "task": member.task,
        "status": member.status, "args": member.args, "position": member.position, "attempt": 1,
        "child_session_key": member.child_session_key, "created_at": at, "updated_at": at,
    }  # fmt: skip


def _member_row(flow_id: UUID, member: Member, due_at: datetime, group: int) -> dict[str, Any]:
    is_step = member.child is None
    return {
        "run_id": member.run_id, "flow_id": flow_id, "kind": member.kind, "task": member.task, "queue": member.queue,
        "priority": member.priority, "options": member.options, "join_group": group,
        "due_at": due_at if is_step else None, "publish_count": int(is_step),
    }  # fmt: skip


def _member_told(member: Member) -> str:
    step = StepWrite(
        member.run_id, member.task, member.status, member.position, args=member.args, id=member.id,
        child_session_key=member.child_session_key,
    )  # fmt: skip
    return f'{{"run_id":"{member.run_id}","step":{step.told()}}}'


def _settle_drive_row(conn: Connection, what: Change, at: datetime, cancels: bool) -> bool:
    """Writes what the change means for the flow's own rows; True: it parked one that is due, for somebody had called
    meanwhile."""
    mine = _d.run_id == str(what.flow_id)
    match what.drive:
        case Wake():
            forgiven = {"crash_count": 0} if what.forgive else {}
            woken = {"wakes": _d.wakes + 1, "due_at": _due_if_free(at, cancels), **forgiven}
            conn.execute(sa.update(flow_dispatch).where(mine).values(woken))
        case Settle(due_at, at_once):
            # Whatever else is written, the sweep must see the cancel.
            due_at = at if at_once or cancels else due_at
            undriven = sa.update(flow_dispatch).where(mine, _d.task.is_(None)).values(due_at=due_at)
            there = conn.scalar(sa.select(func.count()).select_from(flow_dispatch).where(mine))
            if there:
                conn.execute(undriven)
            else:
                conn.execute(
                    sa.insert(flow_dispatch).values(
                        run_id=str(what.flow_id), flow_id=what.flow_id, kind="drive", due_at=due_at
                    )
                )
        case Park() as park:
            return _park(conn, what, park, at)
        case End():
            _end(conn, what.flow_id, at)
        case None if what.forgive:
            conn.execute(sa.update(flow_dispatch).where(mine).values(crash_count=0))
    return False


def _due_if_free(at: datetime, cancels: bool) -> Any:
    # A row that was neither published, queued nor claimed yet is a delayed start: only a cancel brings it forward.
    may_begin = or_(literal(cancels), _d.fence > 0, _d.publish_count > 0, _d.queued_at.isnot(None), _d.task.is_(None))
    return case((and_(_d.worker.is_(None), may_begin), at), else_=_d.due_at)


def _park(conn: Connection, what: Change, park: Park, at: datetime) -> bool:
    values: dict[str, Any] = {
        "worker": None,
        "publish_count": 0,
        "due_at": case((_d.wakes == park.wakes, sa.literal(park.due_at, UtcDateTime())), else_=at),
        "has_slot": and_(_d.has_slot, or_(literal(park.keeps_slot), _d.wakes != park.wakes)),
    }
    if what.forgive:
        values["crash_count"] = 0
    if park.join is not None:
        values |= {
            "open_members": _d.open_members + len(what.members),
            "join_group": park.join.group,
            "join_good": park.join.good,
            "join_bad": park.join.bad,
        }
    mine = and_(_d.run_id == str(what.flow_id), _d.fence == park.holder.fence)
    wakes = conn.scalar(sa.update(flow_dispatch).where(mine).values(values).returning(_d.wakes))
    return wakes is not None and bool(wakes != park.wakes)


def _end(conn: Connection, flow_id: UUID, at: datetime) -> None:
    gone = conn.execute(sa.delete(flow_dispatch).where(_d.flow_id == flow_id).returning(*flow_dispatch.c)).all()
    for row in gone:
        if row.kind == "child":
            _order_to_cancel(conn, flow_id, row.run_id, at)
        if row.parent_run_id is not None:
            mine = and_(_d.run_id == row.parent_run_id, _d.kind == "child")
            conn.execute(sa.update(flow_dispatch).where(mine).values(due_at=at))
    closed = conn.execute(
        sa.update(flow_steps)
        .where(_s.flow_id == flow_id, _s.status.in_(_OPEN_STEPS))
        .values(status="cancelled", updated_at=at)
        .returning(_s.run_id)
    )
    for run_id in closed.scalars().all():
        _append(conn, flow_id, "step_cancelled", f'{{"run_id":"{run_id}","step":{{"status":"cancelled"}}}}', at)


def _order_to_cancel(conn: Connection, parent_id: UUID, run_id: str, at: datetime) -> None:
    key = conn.scalar(sa.select(_s.child_session_key).where(_s.flow_id == parent_id, _s.run_id == run_id))
    if key is None:  # an order itself
        return
    is_open = sa.select(flows.c.id).where(flows.c.id == UUID(key), flows.c.finished_at.is_(None))
    if (child_id := conn.scalar(is_open)) is not None:
        order = {"run_id": f"{ORDER}{run_id}", "flow_id": child_id, "kind": "child", "due_at": at}
        conn.execute(sa.insert(flow_dispatch).values(order))


# ---- start ----------------------------------------------------------------------------------------------------------


def create(conn: Connection, flow: Flow, kind: str, told: str, wait_key: str | None, drive: Drive | None) -> Any:
    """Inserts flow, event and drive row; gives the time of creation, or None if id or key were taken."""
    taken = flows.c.id == flow.id
    if flow.idempotency_key is not None:  # "== None" would be IS NULL, and match every flow without a key
        same_key = and_(flows.c.controller_id == flow.controller_id, flows.c.idempotency_key == flow.idempotency_key)
        taken = or_(taken, same_key)
    if conn.scalar(sa.select(func.count()).select_from(flows).where(taken)):
        return None
    at = now(conn)
    values = {c.name: getattr(flow, c.name) for c in FLOW_COLUMNS}
    values |= {"created_at": at, "updated_at": at, "rest_at": at, "wait_key": wait_key}
    conn.execute(sa.insert(flows).values(values))
    _append(conn, flow.id, kind, told, at, revision=flow.revision, write_id=flow.id)
    if drive is not None:
        conn.execute(sa.insert(flow_dispatch).values(_drive_row(flow.id, drive, at)))
    return at


def create_many(conn: Connection, template: Flow, told: str, new: Sequence[NewFlow]) -> Sequence[UUID]:
    """Inserts flows, events and drive rows, none of which are there: nobody else can write."""
    at, payload = now(conn), json.loads(told)
    shared = {c.name: getattr(template, c.name) for c in FLOW_COLUMNS} | {"wait_key": None}
    shared |= {"created_at": at, "updated_at": at, "rest_at": at}
    rows: list[dict[str, Any]] = []
    events: list[dict[str, Any]] = []
    drives: list[dict[str, Any]] = []
    for each in new:
        own = {"idempotency_key": each.key, "input_json": None if each.input is None else json.loads(each.input)}
        rows.append({**shared, **own, "id": each.id})
        event = {"flow_id": each.id, "revision": template.revision, "kind": "created", "at": at, "write_id": each.id}
        events.append({**event, "payload_json": {**payload, "set": {**payload["set"], **own}}})
        drives.append(_drive_row(each.id, each.drive, at))
    for table, values in (flows, rows), (flow_events, events), (flow_dispatch, drives):
        conn.execute(sa.insert(table), values)
    return [each.id for each in new]


def _drive_row(flow_id: UUID, drive: Drive, at: datetime) -> dict[str, Any]:
    return {
        "run_id": str(flow_id),
        "flow_id": flow_id,
        "kind": "drive",
        "task": drive.task,
        "queue": drive.queue,
        "priority": drive.priority,
        "due_at": drive.due_at or at + timedelta(seconds=drive.first_pause),
        "publish_count": int(drive.published),
        "parent_run_id": drive.parent_run_id,
        "limit_key": drive.limit_key,
    }


def savepoint(conn: Connection) -> AbstractContextManager[Any]:
    """Nothing: the only writer meets nobody half way, and releasing a driver's outermost savepoint would commit."""
    return nullcontext()


# ---- claims ---------------------------------------------------------------------------------------------------------


def _claimable(at: datetime, worker: str, repeat: bool) -> sa.ColumnElement[bool]:
    published = and_(_d.worker.is_(None), _d.publish_count > 0)
    claimable = or_(_d.due_at <= at, published)
    return or_(claimable, _d.worker == worker) if repeat else claimable


def _take(
    conn: Connection, where: sa.ColumnElement[bool], at: datetime, worker: str, lease: float, **more: Any
) -> Row | None:
    crashed = case((or_(_d.worker.is_(None), _d.worker == worker), 0), else_=1)
    return (
        conn.execute(
            sa.update(flow_dispatch)
            .where(where)
            .values(
                fence=_d.fence + 1,
                worker=worker,
                due_at=at + timedelta(seconds=lease),
                publish_count=0,
                crash_count=_d.crash_count + crashed,
                **more,
            )
            .returning(*flow_dispatch.c)
        )
        .mappings()
        .first()
    )


def claim_drive(conn: Connection, flow_id: UUID, worker: str, lease: float, repeat: bool) -> Row | None:
    at = now(conn)
    flow = (
        conn.execute(
            sa.select(
                flows.c.status,
                flows.c.cancel_requested,
                flows.c.wait_json,
                flows.c.wait_key,
                or_(flows.c.cancel_requested, func.coalesce(flows.c.deadline_at <= at, False)).label("ends"),
            ).where(
                flows.c.id == flow_id,
                flows.c.status.in_([status.value for status in OPEN]),
                ~IS_PAUSED,
            )
        )
        .mappings()
        .first()
    )
    if flow is None:
        return None
    may_work = or_(_d.limit_key.is_(None), _d.has_slot, literal(bool(flow["ends"])))
    mine = and_(_d.run_id == str(flow_id), _d.task.isnot(None), _claimable(at, worker, repeat), may_work)
    row = _take(conn, mine, at, worker, lease, queued_at=None, urgency=None)
    if row is None:
        return None
    keeps = flow["cancel_requested"]
    stored = (
        conn.execute(
            sa.update(flows)
            .where(flows.c.id == flow_id)
            .values(
                status=flow["status"] if keeps else FlowStatus.RUNNING,
                wait_json=flow["wait_json"] if keeps else None,
                wait_key=flow["wait_key"] if keeps else None,
                revision=flows.c.revision + 1,
                updated_at=at,
                rest_at=at,
            )
            .returning(*FLOW_COLUMNS)
        )
        .mappings()
        .one()
    )
    kind = "started" if flow["status"] == "created" else "reclaimed" if row["crash_count"] else "resumed"
    conn.execute(
        sa.insert(flow_events).values(
            flow_id=flow_id,
            revision=stored["revision"],
            kind=kind,
            payload_json={
                "set": {"status": stored["status"], "wait_json": stored["wait_json"]},
                "worker": worker,
                "fence": row["fence"],
            },
            at=at,
        )
    )
    return {**row, **stored, "was": flow["status"], "now": at}


def claim_step(conn: Connection, run_id: str, worker: str, lease: float, repeat: bool) -> Row | None:
    at = now(conn)
    row = _take(conn, and_(_d.run_id == run_id, _d.kind == "step", _claimable(at, worker, repeat)), at, worker, lease)
    if row is None:
        return None
    step = (
        conn.execute(
            sa.update(flow_steps)
            .where(_s.flow_id == row["flow_id"], _s.run_id == run_id, _s.status.in_(_OPEN_STEPS))
            .values(status="running", updated_at=at)
            .returning(_s.task, _s.args_json, _s.attempt)
        )
        .mappings()
        .one()
    )
    told = {"run_id": run_id, "step": {"status": "running"}, "worker": worker, "fence": row["fence"]}
    conn.execute(sa.insert(flow_events).values(flow_id=row["flow_id"], kind="step_started", payload_json=told, at=at))
    flow = (
        conn.execute(
            sa.select(flows.c.cancel_requested, flows.c.owner_session_key, flows.c.controller_id).where(
                flows.c.id == row["flow_id"]
            )
        )
        .mappings()
        .one()
    )
    return {**row, **step, **flow}


# ---- completions ----------------------------------------------------------------------------------------------------


def complete(conn: Connection, what: Completion) -> Row | None:
    """Closes a step; None if its row is no longer this holder's."""
    at, holder = now(conn), what.holder
    row = (
        conn.execute(
            sa.delete(flow_dispatch)
            .where(
                _d.run_id == holder.run_id,
                _d.kind.in_(("step", "child")),
                _d.fence == holder.fence,
                _d.worker.is_(holder.worker),
            )
            .returning(_d.flow_id, _d.join_group)
        )
        .mappings()
        .first()
    )
    if row is None:
        return None
    closed = conn.execute(
        sa.update(flow_steps)
        .where(_s.flow_id == row["flow_id"], _s.run_id == holder.run_id, _s.status.in_(_OPEN_STEPS))
        .values(status=what.status.value, result_json=_text(what.result), error_json=what.error, updated_at=at)
    )
    if closed.rowcount:
        _append(conn, row["flow_id"], what.kind, what.told(), at, write_id=what.write_id)
    own = _d.join_group == row["join_group"]
    bad = 1 - what.good
    met = or_(_d.open_members <= 1, and_(own, or_(_d.join_good <= what.good, _d.join_bad < bad)))
    drive = (
        conn.execute(
            sa.update(flow_dispatch)
            .where(_d.run_id == str(row["flow_id"]))
            .values(
                open_members=_d.open_members - 1,
                join_good=_d.join_good - case((own, what.good), else_=0),
                join_bad=_d.join_bad - case((own, bad), else_=0),
                wakes=_d.wakes + case((met, 1), else_=0),
                due_at=case((and_(_d.worker.is_(None), met), at), else_=_d.due_at),
            )
            .returning(_d.due_at, _d.worker, _d.queue)
        )
        .mappings()
        .first()
    )
    woke = drive is not None and drive["worker"] is None and drive["due_at"] is not None and drive["due_at"] <= at
    return {"woke": woke, "queue": drive and drive["queue"], "closed": 1}


# ---- sweep ----------------------------------------------------------------------------------------------------------


def sweep(conn: Connection, limit: int, first: float, cap: float, only: str | None = None) -> list[Row]:
    at = now(conn)
    due_as = case((_d.fence > 0, "begun"), (_d.kind == "step", "step"), else_="flow")
    asked = true() if only is None else due_as == only
    due = conn.execute(
        sa.select(flow_dispatch)
        .where(_d.due_at <= at, _d.kind.in_(["drive", "step"]), _d.task.isnot(None), asked)
        .order_by(_d.due_at)
        .limit(limit)
    ).mappings()
    return [_swept(conn, row, at, first, cap) for row in due.all()]


def _swept(conn: Connection, row: Row, at: datetime, first: float, cap: float) -> Row:
    pause = min(first * (1 << min(max(row["publish_count"] - 1, 0), 20)), cap)
    crashes = row["crash_count"] + (row["worker"] is not None)
    values = {
        "worker": None,
        "publish_count": row["publish_count"] + 1,
        "crash_count": crashes,
        "due_at": at + timedelta(seconds=pause),
    }
    conn.execute(sa.update(flow_dispatch).where(_d.run_id == row["run_id"]).values(values))
    was_held = row["worker"] is not None or (row["publish_count"] > 0 and row["crash_count"] > 0)
    return {**row, **values, "was_held": was_held}


# ---- observations ---------------------------------------------------------------------------------------------------


def _may_observe(conn: Connection, step: FlowStep) -> bool:
    there = sa.select(func.count()).select_from(flows).where(flows.c.id == step.flow_id)
    if not step.status.is_terminal:
        there = there.where(flows.c.finished_at.is_(None))
    return bool(conn.scalar(there))


def observe(conn: Connection, step: FlowStep, write_id: UUID | None) -> Row | None:
    """Inserts or brings forward an observed step with its event; None if it is closed, or the flow is not there."""
    at = now(conn)
    mine = and_(_s.flow_id == step.flow_id, _s.run_id == step.run_id)
    known = conn.execute(sa.select(flow_steps).where(mine)).mappings().first()
    if known is not None and (known["status"] not in _OPEN_STEPS or known["runtime"] != step.runtime):
        return None
    if known is not None:
        kept = {
            name: getattr(step, name) if getattr(step, name) is not None else known[name]
            for name in ("child_session_key", "result_json", "error_json")
        }
        write: Any = sa.update(flow_steps).where(mine).values(status=step.status, updated_at=at, **kept)
    elif _may_observe(conn, step):
        values = {**dict(step), "position": 0, "attempt": 1, "created_at": at, "updated_at": at}
        write = sa.insert(flow_steps).values(values)
    else:
        return None
    row = conn.execute(write.returning(*flow_steps.c)).mappings().one()
    told = {
        name: row[name]
        for name in (
            "runtime",
            "child_session_key",
            "task",
            "status",
            "result_json",
            "error_json",
            "position",
            "attempt",
        )
    }
    payload = {"run_id": row["run_id"], "step": {"id": str(row["id"]), **told}}
    event = {"flow_id": step.flow_id, "kind": "step_observed", "payload_json": payload, "at": at, "write_id": write_id}
    conn.execute(sa.insert(flow_events).values(event))
    return row


def planned_rows(conn: Connection, query: sa.Select[Any]) -> int | None:
    """Nothing: SQLite expects no number of rows."""
    return None


def wait_run_id() -> sa.ColumnElement[str]:
    """The run id of the step by which a flow waits; NULL: it has none."""
    return func.json_extract(flows.c.wait_json, "$.run_id")


# ---- engines --------------------------------------------------------------------------------------------------------

BUSY_TIMEOUT_MS = 10_000


def engine_options() -> dict[str, Any]:
    return {"connect_args": {"timeout": BUSY_TIMEOUT_MS / 1000}}


def prepare(engine: sa.Engine) -> None:
    """Has every connection of this engine made from now on keep foreign keys, wait for the writer, and write ahead."""
    if not event.contains(engine, "connect", _set_pragmas):
        event.listen(engine, "connect", _set_pragmas)


def _set_pragmas(dbapi_connection: Any, _record: Any) -> None:
    cursor = dbapi_connection.cursor()
    for pragma in (f"busy_timeout={BUSY_TIMEOUT_MS}", "synchronous=FULL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    _write_ahead(cursor)
    cursor.close()


def _write_ahead(cursor: Any) -> None:
    # A new file is switched over by whoever comes first; others that try at that moment are told that it is locked,
    # at once: SQLite does not wait out its busy timeout here.
    for attempt in range(1, 51):
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError:
            if attempt == 50:
                raise
            time.sleep(full_jitter(attempt, first=0.005, cap=0.2))
        else:
            return


def writing(engine: sa.Engine, *, single: bool) -> sa.Engine:
    """The engine to write through: its transactions begin as the only writer."""
    return _beginning(engine, "BEGIN IMMEDIATE")


def reading(engine: sa.Engine) -> sa.Engine:
    return engine


_forks = ForkGate()


def close_before_forks(engine: sa.Engine) -> None:
    """Has the engine's idle connections closed whenever this process forks; a database in memory would be gone."""
    name = engine.url.database or ":memory:"
    if ":memory:" not in name and "mode=memory" not in str(engine.url):
        _forks.closed_first.add(engine)


@contextmanager
def transaction(engine: sa.Engine) -> Iterator[Connection]:
    """A transaction, in which no other thread of this process forks: the child would find the database locked."""
    with _forks.transaction(), engine.begin() as connection:
        yield connection


def snapshot(engine: sa.Engine) -> sa.Engine:
    """The engine for several reads as of one moment."""
    return _beginning(engine, "BEGIN DEFERRED")


def _beginning(engine: sa.Engine, statement: str) -> sa.Engine:
    begun = engine.execution_options()
    event.listen(begun, "begin", lambda conn: conn.exec_driver_sql(statement))
    return begun
