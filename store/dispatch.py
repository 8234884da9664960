"""Who may work on what: claims, leases, completions and the sweep over ``flow_dispatch``.

The rules these functions keep, in short. A claim moves the row's fence, and of a drive row the flow's revision too, so
whoever was overtaken is refused. A wake never ends a lease; a driver parks only if nobody called it meanwhile. What
completes a step writes its event and its part of the join in one transaction, so nobody has to look after a commit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy import Connection, case

from celery_flows.store.changes import Change, Completion, Drive, End, Holder, Park
from celery_flows.store.errors import LeaseLost
from celery_flows.store.models import Flow, FlowStep, FlowStepStatus, new_id
from celery_flows.store.operations import change_flow, dialect, list_steps, lock_flow, now, reads, writes, writes_once
from celery_flows.store.tables import IS_PAUSED, UtcDateTime, flow_dispatch, flow_events, flow_steps, flows
from celery_flows.store.transitions import fail
from celery_flows.store.validation import encode_json

_d = flow_dispatch.c


@dataclass(frozen=True, slots=True)
class DriveClaim:
    """A driver's right to drive a flow, as of the claim."""

    flow: Flow
    holder: Holder
    wakes: int
    crash_count: int
    open_members: int
    join_group: int
    queue: str | None
    priority: int | None
    parent_run_id: str | None  # of a child flow: the step that it is of its parent
    limit_key: str | None  # of a limited flow
    began: bool  # nobody claimed it before, and it took nothing over, so there is no history
    now: datetime  # the database's clock


@dataclass(frozen=True, slots=True)
class StepClaim:
    """A worker's right to run a Celery step."""

    holder: Holder
    flow_id: UUID
    task: str
    args: dict[str, Any]  # {"args": [...], "kwargs": {...}}
    attempt: int
    cancel_requested: bool
    owner: str
    definition: str


@dataclass(frozen=True, slots=True)
class Held:
    """A row that somebody holds."""

    run_id: str
    flow_id: UUID
    kind: str
    worker: str


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a flow and its driver's row stand, read in one statement: revision and fence belong together."""

    revision: int
    status: str
    cancel_requested: bool
    paused: bool  # and not to be cancelled, which comes first
    state: dict[str, Any]
    fence: int | None  # None: the row is gone, the flow has ended
    worker: str | None


@dataclass(frozen=True, slots=True)
class Hint:
    """A message to publish: look at this row."""

    run_id: str
    flow_id: UUID
    kind: str
    task: str
    queue: str | None
    priority: int | None = None
    options: dict[str, Any] | None = None


def drive_hint(flow_id: UUID, drive: Drive) -> Hint:
    """The message that calls a worker to a new flow."""
    return Hint(str(flow_id), flow_id, "drive", drive.task, drive.queue, drive.priority)


@dataclass(frozen=True, slots=True)
class Swept:
    """A row the sweep found due: it is to be published, or given up after too many crashes."""

    hint: Hint
    fence: int
    crash_count: int
    publish_count: int
    was_held: bool  # its lease was lost: to this sweep, or to one that died before it could go on


# ---- claims and leases ----------------------------------------------------------------------------------------------


@writes_once
def claim_drive(
    conn: Connection, flow_id: UUID, worker: str, lease_seconds: float, *, repeat: bool = False
) -> DriveClaim | None:
    """Takes the drive row of an open flow that is due or was published; None: a duplicate message, forget it, or a
    limited flow without a slot (see ``limits.py``). Who is to be cancelled, or past its deadline, needs none.

    ``repeat`` lets a claim whose reply was lost recognise its own token.
    """
    row = dialect(conn).claim_drive(conn, flow_id, worker, lease_seconds, repeat)
    if row is None:
        return None
    return DriveClaim(
        flow=Flow.of_row(row),
        holder=Holder(str(flow_id), row["fence"], worker),
        wakes=row["wakes"],
        crash_count=row["crash_count"],
        open_members=row["open_members"],
        join_group=row["join_group"],
        queue=row["queue"],
        priority=row["priority"],
        parent_run_id=row["parent_run_id"],
        limit_key=row["limit_key"],
        began=row["was"] == "created" and row["fence"] == 1 and row["forked_from"] is None,
        now=row["now"],
    )


def is_claimable(at: datetime) -> sa.ColumnElement[bool]:
    """Whether a row that nobody holds is due, or was published."""
    return sa.or_(_d.due_at <= sa.literal(at, UtcDateTime()), _d.publish_count > 0)


@writes_once
def claim_step(
    conn: Connection, run_id: str, worker: str, lease_seconds: float, *, repeat: bool = False
) -> StepClaim | None:
    """Takes the row of a Celery step that is due or was published; None: a duplicate message, forget it."""
    row = dialect(conn).claim_step(conn, run_id, worker, lease_seconds, repeat)
    return None if row is None else _step_claim(row, Holder(run_id, row["fence"], worker))


def _step_claim(row: Mapping[Any, Any], holder: Holder) -> StepClaim:
    return StepClaim(
        holder=holder,
        flow_id=row["flow_id"],
        task=row["task"],
        args=row["args_json"],
        attempt=row["attempt"],
        cancel_requested=row["cancel_requested"],
        owner=row["owner_session_key"],
        definition=row["controller_id"],
    )


@reads
def find_step_claim(conn: Connection, worker: str) -> StepClaim | None:
    """The claim of the Celery step that is held by a token which begins with ``worker``."""
    step, flow = flow_steps.c, flows.c
    mine = sa.and_(_d.kind == "step", _d.worker.startswith(f"{worker}/", autoescape=True))
    joined = sa.join(flow_dispatch, flow_steps, sa.and_(step.flow_id == _d.flow_id, step.run_id == _d.run_id))
    row = conn.execute(
        sa.select(
            _d.run_id, _d.fence, _d.worker, _d.flow_id, step.task, step.args_json, step.attempt,
            flow.cancel_requested, flow.owner_session_key, flow.controller_id,
        )
        .select_from(joined.join(flows, flow.id == _d.flow_id))
        .where(mine)
    ).mappings().first()  # fmt: skip
    return None if row is None else _step_claim(row, Holder(row["run_id"], row["fence"], row["worker"]))


@reads
def standing(conn: Connection, flow_id: UUID) -> Standing | None:
    """What a refused driver asks before it tries again or stops; None: no such flow."""
    f = flows.c
    joined = sa.outerjoin(flows, flow_dispatch, _d.run_id == sa.bindparam("run_id", str(flow_id), sa.Text()))
    row = conn.execute(
        sa.select(f.revision, f.status, f.cancel_requested, IS_PAUSED, f.state_json, _d.fence, _d.worker)
        .select_from(joined)
        .where(f.id == flow_id)
    ).first()
    return None if row is None else Standing(*row)


def _held(holder: Holder) -> sa.ColumnElement[bool]:
    return sa.and_(_d.run_id == holder.run_id, _d.fence == holder.fence, _d.worker == holder.worker)


@writes_once
def renew_own(conn: Connection, holder: Holder, lease_seconds: float) -> bool:
    """Extends one lease from now; False: it is lost."""
    renewed = sa.update(flow_dispatch).where(_held(holder)).values(due_at=_in(conn, lease_seconds))
    return conn.execute(renewed).rowcount > 0


@writes
def renew(conn: Connection, workers: Sequence[str], lease_seconds: float) -> int:
    """Extends the leases of all rows these worker tokens hold; rows locked by others are left for the next time."""
    return _update_of(conn, workers, due_at=_in(conn, lease_seconds))


@reads
def list_holders(conn: Connection, prefix: str) -> list[str]:
    """The tokens, as claims wrote them, that begin with ``prefix`` and hold rows."""
    return list(conn.scalars(sa.select(_d.worker).where(_d.worker.startswith(prefix, autoescape=True)).distinct()))


@reads
def list_to_stop(conn: Connection, workers: Sequence[str]) -> list[Held]:
    """Of the rows that claims with these tokens hold, those whose flows are to end: cancel was requested, or their
    deadline has passed."""
    flow = flows.c
    is_late = sa.and_(flow.deadline_at <= _in(conn, 0), flow.paused_at.is_(None))
    held = sa.and_(_d.worker.isnot(None), _d.worker.in_(workers))  # IS NOT NULL for the index, which is partial
    joined = sa.join(flow_dispatch, flows, flow.id == _d.flow_id)
    asked = sa.select(_d.run_id, _d.flow_id, _d.kind, _d.worker).select_from(joined)
    return [Held(*row) for row in conn.execute(asked.where(held, sa.or_(flow.cancel_requested, is_late)))]


@writes
def hand_back_all(conn: Connection, workers: Sequence[str]) -> int:
    """Gives back unharmed, to be published now, all rows that claims with these tokens hold: their worker is stopping,
    and has ended their processes."""
    held = sa.update(flow_dispatch).where(_d.worker.in_(workers))
    return conn.execute(held.values(worker=None, publish_count=0, due_at=now(conn))).rowcount


@writes
def release(conn: Connection, workers: Sequence[str]) -> int:
    """Ends the leases of these tokens at once, their processes being dead. Each counts as a crash and is due now, to be
    published or, after too many crashes, given up, as if a sweep had found it."""
    return _update_of(conn, workers, worker=None, crash_count=_d.crash_count + 1, publish_count=1, due_at=now(conn))


def _update_of(conn: Connection, workers: Sequence[str], **values: Any) -> int:
    if not workers:  # or_() of nothing would let every row through
        return 0
    held = sa.or_(*(_d.worker.startswith(f"{worker}/", autoescape=True) for worker in workers))
    mine = sa.select(_d.run_id).where(_d.worker.isnot(None), held).order_by(_d.run_id)
    mine = mine.with_for_update(skip_locked=True)
    run_ids = conn.execute(mine).scalars().all()
    if not run_ids:
        return 0
    return conn.execute(sa.update(flow_dispatch).where(_d.run_id.in_(run_ids)).values(values)).rowcount


@writes_once
def park(conn: Connection, what: Park) -> bool:
    """Gives a drive row back; True: it is due now, because somebody called meanwhile. Matches the holder in full."""
    woken = _d.wakes != what.wakes
    parked = (
        sa.update(flow_dispatch)
        .where(_held(what.holder))
        .values(
            worker=None,
            publish_count=0,
            due_at=case((woken, _in(conn, 0)), else_=sa.literal(what.due_at, UtcDateTime())),
            has_slot=sa.and_(_d.has_slot, sa.or_(sa.literal(what.keeps_slot), woken)),
        )
        .returning(_d.wakes)
    )
    wakes = conn.execute(parked).scalar()
    return wakes is not None and wakes != what.wakes


@writes_once
def hand_back(conn: Connection, holder: Holder, delay_seconds: float = 0.0) -> bool:
    """Gives a row back unharmed, to be published in ``delay_seconds``: a worker that stops, a task it does not know.
    A limited flow that is to go on at once keeps its slot, as after a crash."""
    given = sa.update(flow_dispatch).where(_held(holder))
    freed = {"has_slot": False} if delay_seconds else {}
    given = given.values(worker=None, publish_count=0, due_at=_in(conn, delay_seconds), **freed)
    return conn.execute(given).rowcount > 0


@writes_once
def end_lease(conn: Connection, holder: Holder) -> bool:
    """Ends a lease now, for the sweep to find and count as a crash: what was called ended its process, or tried to."""
    ended = sa.update(flow_dispatch).where(_held(holder)).values(due_at=_in(conn, 0))
    return conn.execute(ended).rowcount > 0


def _in(conn: Connection, seconds: float) -> Any:
    """The database's clock plus ``seconds``: an expression where the database can, so that it stays one statement."""
    if conn.dialect.name == "postgresql":
        return sa.func.statement_timestamp() + sa.func.make_interval(0, 0, 0, 0, 0, 0, seconds)
    return now(conn) + timedelta(seconds=seconds)


# ---- the driver's transitions ---------------------------------------------------------------------------------------


@reads
def read_history(conn: Connection, flow_id: UUID) -> list[FlowStep]:
    """The flow's steps. Always a statement after the claim's: within it, a record in flight would be missed."""
    return list_steps(conn, flow_id)


@writes
def drain(conn: Connection, flow_id: UUID, holder: Holder) -> int:
    """Cancels the members nobody has claimed and counts them off the join; gives how many are still open.

    Cancelling and failing begin with this, so that no cleanup runs beside a running member.

    Raises:
        LeaseLost: nothing was written.
    """
    if lock_flow(conn, flow_id) is None:
        raise LeaseLost(holder.run_id)
    idle = sa.select(_d.run_id).where(_d.flow_id == flow_id, _d.kind == "step", _d.worker.is_(None))
    run_ids = conn.execute(idle.order_by(_d.run_id).with_for_update()).scalars().all()
    for some in batched(run_ids, BOUND_AT_ONCE):
        conn.execute(sa.delete(flow_dispatch).where(_d.run_id.in_(some)))
    for some in batched(run_ids, BOUND_AT_ONCE):
        _close_as_cancelled(conn, flow_id, some)
    counted = sa.update(flow_dispatch).where(_held(holder)).values(open_members=_d.open_members - len(run_ids))
    left: int | None = conn.execute(counted.returning(_d.open_members)).scalar()
    if left is None:
        raise LeaseLost(holder.run_id)
    return left


BOUND_AT_ONCE = 1000  # parameters; PostgreSQL's protocol ends at 65,535, SQLite's default at 32,766


def batched(values: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    """The values in runs of at most ``size``."""
    return (values[begin : begin + size] for begin in range(0, len(values), size))


def _close_as_cancelled(conn: Connection, flow_id: UUID, run_ids: Sequence[str]) -> None:
    at = now(conn)
    step = flow_steps.c
    conn.execute(
        sa.update(flow_steps)
        .where(step.flow_id == flow_id, step.run_id.in_(run_ids))
        .values(status=FlowStepStatus.CANCELLED, updated_at=at)
    )
    told = [{"run_id": run_id, "step": {"status": "cancelled"}} for run_id in run_ids]
    events = [{"flow_id": flow_id, "kind": "step_cancelled", "payload_json": payload, "at": at} for payload in told]
    conn.execute(sa.insert(flow_events), events)


# ---- Celery steps ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Completed:
    """A step was closed; ``woke``: its flow's driver is due now and nobody holds it."""

    woke: bool
    queue: str | None


@writes_once
def complete_step(conn: Connection, what: Completion) -> Completed | None:
    """Closes a step with its event and its part of the join; None: the row is no longer this holder's."""
    row = dialect(conn).complete(conn, what)
    return row and Completed(row["woke"], row["queue"])


@reads
def find_completion(conn: Connection, what: Completion) -> Completed | None:
    """What :func:`complete_step` would have answered, if it committed and only its reply was lost; else None."""
    mine = sa.select(flow_events.c.id).where(
        flow_events.c.flow_id == what.flow_id, flow_events.c.write_id == what.write_id
    )
    if conn.scalar(mine) is None:
        return None
    drive = conn.execute(sa.select(_d.due_at, _d.worker, _d.queue).where(_d.run_id == str(what.flow_id))).first()
    woke = drive is not None and drive.worker is None and drive.due_at is not None and drive.due_at <= now(conn)
    return Completed(woke, drive.queue if drive is not None else None)


@writes
def retry_step(
    conn: Connection, holder: Holder, flow_id: UUID, attempt: int, delay_seconds: float, error: dict[str, Any]
) -> bool:
    """Puts a step back for its next attempt; it cannot be claimed before. False: the row is no longer this holder's."""
    given = sa.update(flow_dispatch).where(_held(holder))
    given = given.values(worker=None, publish_count=0, crash_count=0, due_at=_in(conn, delay_seconds))
    if conn.execute(given).rowcount == 0:
        return False
    encode_json("error", error)
    at, step = now(conn), flow_steps.c
    row = {"status": "pending", "attempt": attempt + 1, "error_json": error}
    mine = sa.and_(step.flow_id == flow_id, step.run_id == holder.run_id)
    conn.execute(sa.update(flow_steps).where(mine).values({**row, "updated_at": at}))
    told = {"run_id": holder.run_id, "step": row, "delay_seconds": delay_seconds}
    conn.execute(sa.insert(flow_events).values(flow_id=flow_id, kind="step_retrying", payload_json=told, at=at))
    return True


# ---- the sweep ------------------------------------------------------------------------------------------------------


@writes_once
def sweep_due(
    conn: Connection,
    limit: int,
    first_pause: float,
    max_pause: float,
    *,
    only: Literal["begun", "step", "flow"] | None = None,
) -> list[Swept]:
    """Frees lost leases and takes due rows to be published, each again after a growing pause; nothing is published
    before this commits.

    Args:
        only: rows that somebody has claimed before, or those of steps, or of flows, that nobody has.
    """
    return [
        Swept(
            Hint(
                row["run_id"], row["flow_id"], row["kind"], row["task"], row["queue"], row["priority"], row["options"]
            ),
            row["fence"],
            row["crash_count"],
            row["publish_count"],
            row["was_held"],
        )
        for row in dialect(conn).sweep(conn, limit, first_pause, max_pause, only)
    ]


@reads
def list_unclaimed_of(conn: Connection, run_ids: Sequence[str]) -> list[str]:
    """Those of these rows that were published and that nobody has claimed since."""
    unclaimed = sa.and_(_d.worker.is_(None), _d.publish_count > 0)
    queries = (sa.select(_d.run_id).where(_d.run_id.in_(some), unclaimed) for some in batched(run_ids, BOUND_AT_ONCE))
    return [run_id for query in queries for run_id in conn.scalars(query)]


@writes
def fail_lost(conn: Connection, flow_id: UUID, fence: int) -> bool:
    """Fails a flow whose driver died too often, unless somebody has claimed it since: reason ``lost``, history kept."""
    flow = lock_flow(conn, flow_id)
    held = conn.execute(sa.select(_d.fence, _d.worker).where(_d.run_id == str(flow_id))).first()
    if flow is None or held is None or held.fence != fence or held.worker is not None:
        return False
    if flow.cancel_requested:
        change = Change(flow_id, flow.revision, "cancelled", {"status": "cancelled", "wait_json": None}, drive=End())
    else:
        lost = fail(flow, "lost", {"type": "DriverLost", "message": "its workers died too often"})
        change = Change(flow_id, flow.revision, lost.kind, lost.columns, lost.payload, drive=End(), write_id=new_id())
    change_flow(conn, change)
    return True


@dataclass(frozen=True, slots=True)
class Unsettled:
    """A due row that needs no worker: an event to hand over, a child flow to see to, or the wait of a flow that no
    definition drives."""

    run_id: str
    kind: str  # look, child or drive
    flow_id: UUID | None  # none of a look row
    is_mirror: bool = False  # a mirrored flow to look after, rather than a wait


@reads
def list_unsettled(conn: Connection, limit: int, at: datetime | None = None) -> list[Unsettled]:
    """Rows that need no worker and are due at ``at``; None: by the database's clock."""
    moment = _in(conn, 0) if at is None else sa.literal(at, UtcDateTime())
    no_worker = sa.or_(_d.kind.in_(("look", "child")), _d.task.is_(None))
    is_mirror = sa.and_(_d.kind == "drive", _d.options.isnot(None))
    due = sa.select(_d.run_id, _d.kind, _d.flow_id, is_mirror).where(_d.due_at <= moment, no_worker)
    return [Unsettled(*row) for row in conn.execute(due.order_by(_d.due_at).limit(limit))]


@reads
def find_hint(conn: Connection, run_id: str) -> Hint | None:
    """The message that calls a worker to this row; None if it is gone, or needs no worker."""
    asked = sa.select(_d.flow_id, _d.kind, _d.task, _d.queue, _d.priority, _d.options).where(_d.run_id == run_id)
    row = conn.execute(asked).first()
    return None if row is None or row.flow_id is None or row.task is None else Hint(run_id, *row)
