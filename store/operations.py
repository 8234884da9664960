"""The records' operations, each a plain function over a Connection: one body for the synchronous and the async store.

A decorator says how an operation is run; ``script.py`` carries it out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from enum import Enum
from types import ModuleType
from typing import Any, NamedTuple, ParamSpec, TypeVar
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError

from celery_flows.store import postgresql, sqlite
from celery_flows.store.changes import Change, Drive, Park, change_of, follow_up
from celery_flows.store.errors import (
    AlreadyTerminal,
    DuplicateFlow,
    DuplicateStep,
    FlowNotFound,
    IllegalTransition,
    InvalidData,
    RevisionMismatch,
    StepNotFound,
)
from celery_flows.store.models import TERMINAL, Flow, FlowEvent, FlowStatus, FlowStep, FlowStepStatus, new_id
from celery_flows.store.tables import (
    EVENT_COLUMNS,
    FLOW_COLUMNS,
    UtcDateTime,
    flow_dispatch,
    flow_events,
    flow_steps,
    flows,
)
from celery_flows.store.transitions import Transition, jsonable
from celery_flows.store.validation import check_name, encode_json
from celery_flows.store.waits import due_at, wait_key

P = ParamSpec("P")
T = TypeVar("T")


class Mode(Enum):
    """How an operation is run in a transaction of its own."""

    READ = "read"
    SNAPSHOT = "snapshot"  # several reads, as of one moment
    WRITE = "write"  # several statements
    SINGLE = "single"  # one statement on PostgreSQL: no BEGIN and COMMIT round trips


def _mode(mode: Mode) -> Callable[[Callable[P, T]], Callable[P, T]]:
    def mark(operation: Callable[P, T]) -> Callable[P, T]:
        operation.mode = mode  # type: ignore[attr-defined]
        return operation

    return mark


reads, reads_snapshot = _mode(Mode.READ), _mode(Mode.SNAPSHOT)
writes, writes_once = _mode(Mode.WRITE), _mode(Mode.SINGLE)


def dialect(conn: Connection) -> ModuleType:
    """The module that holds what this connection's database does its own way."""
    return postgresql if conn.dialect.name == "postgresql" else sqlite


def insert_into(conn: Connection, table: sa.Table) -> Any:
    """An INSERT that may say what a conflict comes to: both databases have it, each in a class of its own."""
    return dialect(conn).insert(table)


# ---- flows ----------------------------------------------------------------------------------------------------------


@writes
def insert_flow(conn: Connection, flow: Flow) -> None:
    values = {c.name: getattr(flow, c.name) for c in FLOW_COLUMNS}
    values |= {"rest_at": flow.updated_at, "wait_key": wait_key(flow.wait_json)}
    if flow.status in TERMINAL and flow.finished_at is None:
        values["finished_at"] = flow.updated_at
    try:
        with conn.begin_nested():
            conn.execute(sa.insert(flows).values(values))
    except IntegrityError:
        raise DuplicateFlow(flow.id) from None
    if flow.status is FlowStatus.WAITING:
        due = now(conn) if wait_key(flow.wait_json) is not None else due_at(flow.wait_json)
        row = {"run_id": str(flow.id), "flow_id": flow.id, "kind": "drive", "due_at": due}
        conn.execute(sa.insert(flow_dispatch).values(row))


@reads
def find_inserted(conn: Connection, flow: Flow) -> bool | None:
    """Whether :func:`insert_flow` committed and only its reply was lost: nobody else makes this id at this time."""
    stored = get_flow(conn, flow.id)
    return True if stored is not None and stored.created_at == flow.created_at else None


@writes_once
def create_flow(conn: Connection, flow: Flow, payload: dict[str, Any], drive: Drive | None = None) -> bool:
    """Inserts the flow, its ``created`` event and, if it is driven, its drive row. False: id or key are taken."""
    driven = {} if drive is None else told_of_drive(drive)
    told = encode_json("payload", {**payload, **driven, "set": created_columns(flow)})
    at = dialect(conn).create(conn, flow, "created", told, wait_key(flow.wait_json), drive)
    return at is not None


def told_of_drive(drive: Drive) -> dict[str, Any]:
    """What a ``created`` event tells of the drive row, which is gone when the flow has ended: that there is one, for an
    audit, and its priority, for those that go back to the flow."""
    return {"driven": True} if drive.priority is None else {"driven": True, "priority": drive.priority}


def created_columns(flow: Flow) -> dict[str, Any]:
    """What a ``created`` event tells of the row; its times are the event's own."""
    timed_by_event = ("id", "revision", "created_at", "updated_at")
    return jsonable({name: value for name, value in dict(flow).items() if name not in timed_by_event})


@writes_once
def insert_created(conn: Connection, flow: Flow, payload: dict[str, Any]) -> bool:
    """:func:`create_flow`, for one whose id or key must not be taken.

    Raises:
        DuplicateFlow: nothing was written.
    """
    if not create_flow(conn, flow, payload):
        raise DuplicateFlow(flow.id)
    return True


@reads
def find_created(conn: Connection, flow: Flow) -> bool | None:
    """Whether :func:`insert_created` committed and only its reply was lost: its event's write id is the flow's id."""
    return True if find_event(conn, flow.id, flow.id) is not None else None


@reads
def get_flow(conn: Connection, flow_id: UUID) -> Flow | None:
    row = conn.execute(sa.select(*FLOW_COLUMNS).where(flows.c.id == flow_id)).mappings().first()
    return None if row is None else Flow.of_row(row)


@reads
def get_last_life(conn: Connection, flow_id: UUID) -> Flow | None:
    """The flow, or the one that has gone on for it last; None: that one was pruned, or there is none."""
    flow = get_flow(conn, flow_id)
    while flow is not None and flow.continued_as is not None:
        flow = get_flow(conn, flow.continued_as)
    return flow


@reads
def find_by_key(conn: Connection, controller_id: str, key: str) -> Flow | None:
    mine = sa.select(*FLOW_COLUMNS).where(flows.c.controller_id == controller_id, flows.c.idempotency_key == key)
    row = conn.execute(mine).mappings().first()
    return None if row is None else Flow.of_row(row)


@writes
def lock_flow(conn: Connection, flow_id: UUID) -> Flow | None:
    """The flow, its row locked until the transaction ends. FOR NO KEY UPDATE lets events be inserted meanwhile."""
    locked = sa.select(*FLOW_COLUMNS).where(flows.c.id == flow_id).with_for_update(key_share=True)
    row = conn.execute(locked).mappings().first()
    return None if row is None else Flow.of_row(row)


@reads
def list_by_owner(
    conn: Connection, owner_session_key: str, limit: int | None = 100, after: Flow | None = None
) -> list[Flow]:
    query = sa.select(*FLOW_COLUMNS).where(flows.c.owner_session_key == owner_session_key)
    if after is not None:
        query = query.where(_keyset(flows.c.created_at, flows.c.id) < _key(after.created_at, after.id))
    return _flows(conn, query.order_by(flows.c.created_at.desc(), flows.c.id.desc()), limit)


@reads
def list_by_status(
    conn: Connection, status: FlowStatus, limit: int | None = 100, after: Flow | None = None
) -> list[Flow]:
    # rest_at is indexed and equal to updated_at, but for running flows, of which there are few.
    moved = flows.c.updated_at if status == FlowStatus.RUNNING else flows.c.rest_at
    query = sa.select(*FLOW_COLUMNS).where(flows.c.status == FlowStatus(status).value)
    if after is not None:
        query = query.where(_keyset(moved, flows.c.id) > _key(after.updated_at, after.id))
    return _flows(conn, query.order_by(moved, flows.c.id), limit)


@reads
def search_flows(
    conn: Connection,
    *,
    owner: str | None = None,
    status: FlowStatus | None = None,
    definition: str | None = None,
    key: str | None = None,
    created_after: datetime | None = None,
    created_before: datetime | None = None,
    limit: int = 100,
    after: Flow | None = None,
) -> list[Flow]:
    """Flows that fit all that is given, newest first: each of it has an index that ends in this order."""
    f = flows.c
    given = (
        (f.owner_session_key, owner),
        (f.status, status and status.value),
        (f.controller_id, definition),
        (f.idempotency_key, key),
    )
    query = sa.select(*FLOW_COLUMNS).where(*(column == value for column, value in given if value is not None))
    if created_after is not None:
        query = query.where(f.created_at >= sa.literal(created_after, UtcDateTime()))
    if created_before is not None:
        query = query.where(f.created_at < sa.literal(created_before, UtcDateTime()))
    if after is not None:
        query = query.where(_keyset(f.created_at, f.id) < _key(after.created_at, after.id))
    return _flows(conn, query.order_by(f.created_at.desc(), f.id.desc()), limit)


def _keyset(column: sa.Column[Any], id_column: sa.Column[Any]) -> Any:
    return sa.tuple_(column, id_column)


def _key(at: datetime, id_: UUID) -> Any:
    return sa.tuple_(sa.literal(at, UtcDateTime()), sa.literal(id_, sa.Uuid()))


def _flows(conn: Connection, query: Any, limit: int | None) -> list[Flow]:
    return [Flow.of_row(row) for row in _limited(conn, query, limit)]


def _limited(conn: Connection, query: Any, limit: int | None) -> Sequence[Any]:
    if limit is not None and limit <= 0:
        return []
    return conn.execute(query.limit(limit)).mappings().all()


# ---- changes of a flow ----------------------------------------------------------------------------------------------


class Written(NamedTuple):
    """What came of a change."""

    flow: Flow  # as stored
    event_id: int | None
    is_due: bool = False  # the change parked the flow, and somebody had called its driver meanwhile


@writes_once
def change_flow(conn: Connection, change: Change) -> Written:
    """Writes one revision.

    Raises:
        RevisionMismatch, FlowNotFound: nothing was written.
    """
    row = dialect(conn).change(conn, change)
    if row is None:
        actual = conn.scalar(sa.select(flows.c.revision).where(flows.c.id == change.flow_id))
        if actual is None:
            raise FlowNotFound(change.flow_id)
        raise RevisionMismatch(change.flow_id, change.revision, actual)
    return Written(Flow.of_row(row), row["event_id"], bool(row["is_due"]))


@writes
def change_with_children(conn: Connection, change: Change) -> Written:
    """:func:`change_flow`, with the child flows that its members are, in one transaction.

    Raises:
        RevisionMismatch, FlowNotFound: nothing was written.
    """
    for member in change.members:
        if member.child is not None:
            drive = Drive(
                member.task, member.queue, member.priority, change.first_pause, member.run_id,
                limit_key=member.limit_key,
            )  # fmt: skip
            create_flow(conn, member.child, {}, drive)
    return change_flow(conn, change)


@writes
def change_and_continue(conn: Connection, change: Change) -> Written:
    """:func:`change_flow` for a flow that ends, with the one that goes on for it: in that order, for the key moves on.

    Raises:
        RevisionMismatch, FlowNotFound: nothing was written.
    """
    assert change.successor is not None
    changed = change_flow(conn, change)
    create_flow(conn, change.successor.flow, {"continues": str(change.flow_id)}, change.successor.drive)
    return changed


@writes
def change_made(conn: Connection, make: Callable[[Connection], Change]) -> str | None:
    """Writes the change that ``make`` gives, in the transaction in which it did whatever else it does; gives the result
    of the change's step, as JSON text.

    Raises:
        RevisionMismatch, FlowNotFound; whatever ``make`` raises. Nothing was written.
    """
    change = make(conn)
    change_flow(conn, change)
    return None if change.step is None else change.step.result


@reads
def find_step_result(conn: Connection, flow_id: UUID, write_id: UUID) -> str | None:
    """What :func:`change_made` would have answered, if it committed and only its reply was lost; else None."""
    event = find_event(conn, flow_id, write_id)
    # From the step's row: the event has the keys of an object in another order.
    step = None if event is None else find_step_by_run_id(conn, flow_id, event.payload_json["run_id"])
    return None if step is None else encode_json("result", step.result_json)


def change_operation(change: Change) -> Callable[..., Written]:
    """What writes this change: one statement, unless flows are made with it."""
    if change.successor is not None:
        return change_and_continue
    has_children = any(member.child is not None for member in change.members)
    return change_with_children if has_children else change_flow


@reads
def find_change(conn: Connection, change: Change) -> Written | None:
    """What :func:`change_flow` would have answered, if it committed and only its reply was lost; else None."""
    flow = get_flow(conn, change.flow_id)
    if flow is None:
        return None
    if change.kind is None:  # no event to go by, but the row itself says the same
        mine = all(getattr(flow, name) == value for name, value in change.columns.items())
        return Written(flow, None) if mine and flow.revision == change.revision + 1 else None
    event = find_event(conn, change.flow_id, change.write_id)
    return None if event is None else Written(flow, event.id, _is_due(conn, change))


def _is_due(conn: Connection, change: Change) -> bool:
    """Whether the row that the change parked is due now: more than a moment may have passed since."""
    if not isinstance(change.drive, Park):
        return False
    d = flow_dispatch.c
    due = sa.and_(d.worker.is_(None), d.due_at <= sa.literal(now(conn), UtcDateTime()))
    return conn.scalar(sa.select(d.run_id).where(d.run_id == str(change.flow_id), due)) is not None


def change_to(flow: Flow, kind: str | None, payload: dict[str, Any]) -> Change:
    """The change that stores ``flow`` as given, told by the caller's own words.

    Raises:
        InvalidData: the payload is not JSON, or the kind is no name.
    """
    if kind is not None:
        check_name("kind", kind)
        encode_json("payload", payload)
    kept = ("id", "revision", "created_at", "updated_at", "finished_at")
    columns = {name: value for name, value in dict(flow).items() if name not in kept}
    if flow.status not in TERMINAL:
        columns["finished_at"] = None  # an ended flow may be opened again by hand
    drive = follow_up(flow.status, flow.wait_json, kind or "updated")
    return Change(flow.id, flow.revision, kind, columns, payload, tells_columns=False, drive=drive)


def event_of(change: Change, stored: Flow, event_id: int | None) -> FlowEvent:
    """The event that :func:`change_flow` has just written with ``stored``."""
    assert change.kind is not None
    return FlowEvent(
        id=event_id,
        flow_id=change.flow_id,
        kind=change.kind,
        payload_json=dict(change.payload),
        at=stored.updated_at,
        revision=change.revision + 1,
    )


@reads
def check_waits_by_hand(conn: Connection, flow: Flow) -> None:
    """Says nothing if the flow may be made to wait by hand.

    Raises:
        IllegalTransition: a definition drives it; its function says when it waits.
    """
    driven = sa.select(flow_dispatch.c.task).where(flow_dispatch.c.run_id == str(flow.id))
    if conn.scalar(driven) is not None:
        raise IllegalTransition(flow.id, flow.status, FlowStatus.WAITING, ": its flow function says when it waits")


@writes
def update_locked(
    conn: Connection, flow_id: UUID, decide: Callable[[Flow], Transition | None], write_id: UUID | None = None
) -> Flow:
    """Reads the flow under its row's lock, has ``decide`` say what changes, and writes that.

    Raises:
        FlowNotFound; whatever ``decide`` raises. Nothing was written.
    """
    flow = lock_flow(conn, flow_id)
    if flow is None:
        raise FlowNotFound(flow_id)
    transition = decide(flow)
    if transition is None:
        return flow
    after = transition.applied_to(flow)
    if transition.kind == "waiting":
        check_waits_by_hand(conn, flow)
    drive = follow_up(after.status, after.wait_json, transition.kind)
    return change_flow(conn, change_of(flow, transition, drive=drive, write_id=write_id or new_id())).flow


@reads
def find_locked(conn: Connection, flow_id: UUID, write_id: UUID) -> Flow | None:
    """The flow, if :func:`update_locked` committed under this write id and only its reply was lost."""
    return None if find_event(conn, flow_id, write_id) is None else get_flow(conn, flow_id)


# ---- events ---------------------------------------------------------------------------------------------------------


@writes
def append_event(
    conn: Connection, flow_id: UUID, kind: str, payload: dict[str, Any], write_id: UUID | None = None
) -> FlowEvent:
    check_name("kind", kind)
    encode_json("payload", payload)
    if get_flow(conn, flow_id) is None:
        raise FlowNotFound(flow_id)
    values = {"flow_id": flow_id, "kind": kind, "payload_json": payload, "at": now(conn), "write_id": write_id}
    row = sa.insert(flow_events).values(values)
    return FlowEvent.of_row(conn.execute(row.returning(*EVENT_COLUMNS)).mappings().one())


@reads
def find_event(conn: Connection, flow_id: UUID, write_id: UUID) -> FlowEvent | None:
    """What a writer that lost the reply to its commit looks for; it made the write id before its first try."""
    mine = sa.select(*EVENT_COLUMNS).where(flow_events.c.flow_id == flow_id, flow_events.c.write_id == write_id)
    row = conn.execute(mine).mappings().first()
    return None if row is None else FlowEvent.of_row(row)


@reads
def list_events(conn: Connection, flow_id: UUID, limit: int | None, after: FlowEvent | None = None) -> list[FlowEvent]:
    query = sa.select(*EVENT_COLUMNS).where(flow_events.c.flow_id == flow_id)
    if after is not None:
        query = query.where(flow_events.c.id < after.id)
    rows = _limited(conn, query.order_by(flow_events.c.id.desc()), limit)
    return [FlowEvent.of_row(row) for row in rows]


EVENT_PAGE = 1000


def each_event(conn: Connection, flow_id: UUID) -> Iterator[FlowEvent]:
    """All events of a flow, oldest first, in pages; for a transaction that sees one moment."""
    last = 0
    while True:
        page = conn.execute(
            sa.select(*EVENT_COLUMNS)
            .where(flow_events.c.flow_id == flow_id, flow_events.c.id > last)
            .order_by(flow_events.c.id)
            .limit(EVENT_PAGE)
        ).mappings()
        events = [FlowEvent.of_row(row) for row in page]
        yield from events
        if len(events) < EVENT_PAGE:
            return
        last = events[-1].id


# ---- steps ----------------------------------------------------------------------------------------------------------


@writes
def insert_step(conn: Connection, step: FlowStep) -> None:
    if get_flow(conn, step.flow_id) is None:
        raise FlowNotFound(step.flow_id)
    try:
        with conn.begin_nested():
            conn.execute(sa.insert(flow_steps).values(dict(step)))
    except IntegrityError:
        raise DuplicateStep(step.flow_id, step.run_id) from None


@reads
def find_inserted_step(conn: Connection, step: FlowStep) -> bool | None:
    """Whether :func:`insert_step` committed and only its reply was lost."""
    stored = get_step(conn, step.id)
    return True if stored is not None and stored.created_at == step.created_at else None


@writes
def update_step(conn: Connection, step: FlowStep) -> FlowStep:
    values = {name: value for name, value in dict(step).items() if name not in ("id", "flow_id", "created_at")}
    write = sa.update(flow_steps).where(flow_steps.c.id == step.id).values({**values, "updated_at": now(conn)})
    try:
        with conn.begin_nested():
            row = conn.execute(write.returning(*flow_steps.c)).mappings().first()
    except IntegrityError:
        raise DuplicateStep(step.flow_id, step.run_id) from None
    if row is None:
        raise StepNotFound(step.id)
    return FlowStep.of_row(row)


@reads
def get_step(conn: Connection, step_id: UUID) -> FlowStep | None:
    return _step(conn, flow_steps.c.id == step_id)


@reads
def find_step_by_run_id(conn: Connection, flow_id: UUID, run_id: str) -> FlowStep | None:
    return _step(conn, sa.and_(flow_steps.c.flow_id == flow_id, flow_steps.c.run_id == run_id))


def _step(conn: Connection, where: sa.ColumnElement[bool]) -> FlowStep | None:
    row = conn.execute(sa.select(flow_steps).where(where)).mappings().first()
    return None if row is None else FlowStep.of_row(row)


@reads
def list_steps(
    conn: Connection, flow_id: UUID, limit: int | None = None, after: FlowStep | None = None
) -> list[FlowStep]:
    query = sa.select(flow_steps).where(flow_steps.c.flow_id == flow_id)
    if after is not None:
        query = query.where(_keyset(flow_steps.c.created_at, flow_steps.c.id) > _key(after.created_at, after.id))
    rows = _limited(conn, query.order_by(flow_steps.c.created_at, flow_steps.c.id), limit)
    return [FlowStep.of_row(row) for row in rows]


@reads
def count_steps(conn: Connection, flow_id: UUID) -> dict[FlowStepStatus, int]:
    """How many steps of the flow are in each status."""
    counted = sa.select(flow_steps.c.status, sa.func.count()).where(flow_steps.c.flow_id == flow_id)
    rows = conn.execute(counted.group_by(flow_steps.c.status)).all()
    return {FlowStepStatus(status): count for status, count in rows}


@writes_once
def observe_step(conn: Connection, step: FlowStep, write_id: UUID | None = None) -> FlowStep:
    """Upserts by (flow_id, run_id), with its event. A closed step stays as it is; a missing session key keeps the old.

    Raises:
        FlowNotFound: no such flow.
        AlreadyTerminal: the flow has ended, so no step of it can be open.
        InvalidData: the step is one that a worker runs; only it may say what came of it.
    """
    if conn.scalar(sa.select(flow_dispatch.c.kind).where(flow_dispatch.c.run_id == step.run_id)) is not None:
        raise InvalidData("run_id", "belongs to a step that workers run; it cannot be observed by hand")
    row = dialect(conn).observe(conn, step, write_id)
    if row is not None:
        return FlowStep.of_row(row)
    known = find_step_by_run_id(conn, step.flow_id, step.run_id)
    if known is not None:
        return known
    status = conn.scalar(sa.select(flows.c.status).where(flows.c.id == step.flow_id))
    if status is None:
        raise FlowNotFound(step.flow_id)
    raise AlreadyTerminal(step.flow_id, status, f"observed with step {step.run_id} {step.status}")


@reads
def find_observed(conn: Connection, step: FlowStep, write_id: UUID) -> FlowStep | None:
    """The step, if :func:`observe_step` committed under this write id and only its reply was lost."""
    mine = find_event(conn, step.flow_id, write_id)
    return None if mine is None else find_step_by_run_id(conn, step.flow_id, step.run_id)


# ---- the clock ------------------------------------------------------------------------------------------------------


@reads
def now(conn: Connection) -> datetime:
    """The database's clock, in UTC."""
    value = dialect(conn).now(conn)
    assert isinstance(value, datetime)
    return value
