"""What PostgreSQL does its own way: each transition is one statement, a chain of data-modifying CTEs.

Three rules hold throughout (each stands here because its absence was seen to lose or double work):

- Time is ``statement_timestamp()``: the database's clock, one value within a statement, and unlike
  ``clock_timestamp()`` usable as an index condition; unlike ``now()`` it does not stand still in a caller's
  transaction.
- What follows a guarded UPDATE or DELETE takes its rows from that one's RETURNING, never from the input: if the guard
  refuses, nothing at all is written.
- Rows are locked in one order: flow, member rows, steps and events, drive row last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from enum import StrEnum
from functools import lru_cache
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy import Connection
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects.postgresql import insert as insert

from celery_flows.store.changes import ORDER, Change, Completion, Drive, End, NewFlow, Park, Settle, Wake
from celery_flows.store.models import Flow, FlowStep
from celery_flows.store.tables import FLOW_COLUMNS, UtcDateTime, flow_steps, flows
from celery_flows.store.validation import encode_json

Row = Mapping[Any, Any]

_DIALECT = postgresql.dialect()  # type: ignore[no-untyped-call]
_TYPES = {c.name: c.type.compile(dialect=_DIALECT) for table in (flows, flow_steps) for c in table.c}
_JSON = frozenset(name for name, type_ in _TYPES.items() if type_ in ("JSON", "JSONB"))
_FLOW = ", ".join(c.name for c in FLOW_COLUMNS)

NOW = "statement_timestamp()"
AFTER = f"{NOW} + make_interval(secs => CAST(:{{}} AS double precision))"


def param(name: str, type_: str) -> str:
    return f"CAST(:{name} AS {type_})"


def encoded(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Column values as parameters: JSON columns as text, enums as their values."""
    return {prefix + name: _parameter(name, value) for name, value in values.items()}


def _parameter(name: str, value: Any) -> Any:
    if name in _JSON and value is not None:
        return encode_json(name, value)
    return value.value if isinstance(value, StrEnum) else value


def now(conn: Connection) -> Any:
    """The database's clock."""
    return conn.scalar(sa.select(sa.type_coerce(sa.func.statement_timestamp(), UtcDateTime())))


# ---- transitions of a flow ------------------------------------------------------------------------------------------


def change(conn: Connection, what: Change) -> Row | None:
    """Writes the change if the flow is still at its revision; gives the stored row, or None if it is not."""
    columns = what.stored_columns()
    drive: Any = type(what.drive)
    statement = _change_statement(
        tuple(columns), what.kind is not None, what.moves_rest, what.step is not None, min(len(what.members), 2),
        drive, what.forgive, isinstance(what.drive, Park) and what.drive.join is not None,
    )  # fmt: skip
    return conn.execute(statement, _change_parameters(what, columns)).mappings().first()


@lru_cache(maxsize=256)
def _change_statement(
    columns: tuple[str, ...],
    tells: bool,
    rests: bool,
    step: bool,
    members: int,
    drive: type[Any],
    forgive: bool,
    joins: bool,
) -> sa.TextualSelect:
    ends = drive is End
    sets = [f"{name} = {param('c_' + name, _TYPES[name])}" for name in columns]
    sets += ["revision = revision + 1", f"updated_at = {NOW}"]
    sets += [f"rest_at = {NOW}"] * rests + [f"finished_at = {NOW}"] * ends
    parts = [
        f"u AS (UPDATE flows SET {', '.join(sets)} WHERE id = :flow_id AND revision = :revision RETURNING {_FLOW})"
    ]
    if members:
        parts += _members_sql(members)
    elif tells:
        parts.append(
            "e AS (INSERT INTO flow_events (flow_id, revision, kind, payload_json, at, write_id) "
            "SELECT u.id, u.revision, :kind, CAST(:told AS jsonb), u.updated_at, :write_id FROM u RETURNING id)"
        )
    if step:
        parts.append(_STEP_SQL)
    if forgive and drive is type(None):
        parts.append("f AS (UPDATE flow_dispatch d SET crash_count = 0 FROM u WHERE d.run_id = CAST(u.id AS text))")
    parts += _drive_sql(drive, forgive, joins)
    event_id = "(SELECT min(e.id) FROM e)" if tells else "NULL"
    is_due = "(SELECT w.is_due FROM w)" if drive is Park else "false"
    told = f"{event_id} AS event_id, {is_due} AS is_due"
    return sa.text(f"WITH {', '.join(parts)} SELECT {_FLOW}, {told} FROM u").columns(*FLOW_COLUMNS)


_STEP_SQL = f"""s AS (INSERT INTO flow_steps (id, flow_id, runtime, run_id, task, status, result_json, error_json,
    args_json, position, attempt, created_at, updated_at)
  SELECT :s_id, u.id, 'managed', :s_run_id, :s_task, :s_status, {param("s_result", "json")},
    {param("s_error", "jsonb")}, {param("s_args", "json")}, {param("s_position", "integer")},
    {param("s_attempt", "integer")},
    u.updated_at - CAST(:s_elapsed AS bigint) * interval '1 microsecond', u.updated_at FROM u
  ON CONFLICT (flow_id, run_id) DO UPDATE SET status = excluded.status, result_json = excluded.result_json,
    error_json = excluded.error_json, attempt = excluded.attempt, updated_at = excluded.updated_at
  WHERE flow_steps.status IN ('pending', 'running'))"""

_MEMBER_TYPES = {
    "id": "uuid", "run_id": "text", "task": "text", "position": "integer", "args": "json", "queue": "text",
    "priority": "smallint", "options": "jsonb", "kind": "text", "status": "text", "child_session_key": "text",
}  # fmt: skip


def _members_sql(count: int) -> list[str]:
    # unnest of a single row costs three times the CPU of plain parameters, so one member has its own form.
    if count == 1:
        fields = ", ".join(f"{param('m_' + name, type_)} AS {name}" for name, type_ in _MEMBER_TYPES.items())
        source = f"i AS NOT MATERIALIZED (SELECT {fields}, 1 AS n)"
    else:
        arrays = ", ".join(param("m_" + name, type_ + "[]") for name, type_ in _MEMBER_TYPES.items())
        source = (
            f"i AS MATERIALIZED (SELECT * FROM unnest({arrays}) WITH ORDINALITY AS t({', '.join(_MEMBER_TYPES)}, n))"
        )
    return [
        source,
        """s AS (INSERT INTO flow_steps (id, flow_id, runtime, child_session_key, run_id, task, status, args_json,
             position, attempt, created_at, updated_at)
           SELECT i.id, u.id, 'managed', i.child_session_key, i.run_id, i.task, i.status, i.args, i.position, 1,
             u.updated_at, u.updated_at FROM u, i)""",
        f"""m AS (INSERT INTO flow_dispatch (run_id, flow_id, kind, task, queue, priority, options, due_at,
             publish_count, join_group)
           SELECT i.run_id, u.id, i.kind, i.task, i.queue, i.priority, i.options,
             CASE WHEN i.kind = 'step' THEN {AFTER.format("first_pause")} END,
             CASE WHEN i.kind = 'step' THEN 1 ELSE 0 END, {param("group", "integer")} FROM u, i RETURNING 1)""",
        """e AS (INSERT INTO flow_events (flow_id, revision, kind, payload_json, at, write_id)
           SELECT u.id, CASE WHEN i.n = 1 THEN u.revision END, 'step_scheduled',
             CASE WHEN i.n = 1 THEN CAST(:told AS jsonb) ELSE CAST('{}' AS jsonb) END
               || jsonb_build_object('run_id', i.run_id, 'step', jsonb_build_object('id', i.id, 'runtime', 'managed',
                 'task', i.task, 'status', i.status, 'position', i.position, 'attempt', 1, 'args_json', i.args,
                 'child_session_key', i.child_session_key)),
             u.updated_at, CASE WHEN i.n = 1 THEN CAST(:write_id AS uuid) END FROM u, i ORDER BY i.n RETURNING id)""",
    ]


# A row that was neither published, queued nor claimed yet is a delayed start: only a cancel brings it forward.
_MAY_BEGIN = "d.fence > 0 OR d.publish_count > 0 OR d.queued_at IS NOT NULL OR d.task IS NULL"


def _drive_sql(drive: type[Any], forgive: bool, joins: bool) -> list[str]:
    if drive is Wake:
        return [
            f"""w AS (UPDATE flow_dispatch d SET wakes = d.wakes + 1, {"crash_count = 0," if forgive else ""}
                  due_at = CASE WHEN d.worker IS NULL AND (u.cancel_requested OR {_MAY_BEGIN}) THEN {NOW}
                    ELSE d.due_at END
                FROM u WHERE d.run_id = CAST(u.id AS text))"""
        ]
    if drive is Settle:
        return [
            f"""w AS (INSERT INTO flow_dispatch (run_id, flow_id, kind, due_at)
                SELECT CAST(u.id AS text), u.id, 'drive',
                  CASE WHEN u.cancel_requested OR CAST(:at_once AS boolean) THEN {NOW}
                    ELSE {param("due_at", "timestamptz")} END FROM u
                ON CONFLICT (run_id) DO UPDATE SET due_at = excluded.due_at WHERE flow_dispatch.task IS NULL)"""
        ]
    if drive is Park:
        # The revision moved with the claim, so u is not empty only if the fence is still ours; worker may have been
        # taken off by a sweep meanwhile, which changes nothing.
        join = (
            f"""open_members = d.open_members + {param("inserted", "integer")},
                join_group = {param("group", "integer")},
                join_good = {param("good", "integer")}, join_bad = {param("bad", "integer")},"""
            if joins
            else ""
        )
        crash = "crash_count = 0," if forgive else ""
        after_members = ", (SELECT count(*) AS c FROM m) ms" if joins else ""
        return [
            f"""w AS (UPDATE flow_dispatch d SET worker = NULL, publish_count = 0, {join} {crash}
                  has_slot = d.has_slot AND (CAST(:keeps_slot AS boolean) OR d.wakes <> :wakes),
                  due_at = CASE WHEN d.wakes = :wakes THEN {param("due_at", "timestamptz")} ELSE {NOW} END
                FROM u{after_members} WHERE d.run_id = CAST(u.id AS text) AND d.fence = :fence
                RETURNING d.wakes <> :wakes AS is_due)"""
        ]
    if drive is End:
        return [
            """k AS (SELECT d.run_id, d.kind, d.parent_run_id FROM flow_dispatch d, u WHERE d.flow_id = u.id
                ORDER BY d.kind = 'drive', d.run_id FOR UPDATE OF d)""",
            "x AS (DELETE FROM flow_dispatch d USING k WHERE d.run_id = k.run_id)",
            """c AS (UPDATE flow_steps t SET status = 'cancelled', updated_at = u.updated_at
                FROM u, (SELECT count(*) AS c FROM k) locked
                WHERE t.flow_id = u.id AND t.status IN ('pending', 'running') RETURNING t.run_id)""",
            """ce AS (INSERT INTO flow_events (flow_id, kind, payload_json, at)
                SELECT u.id, 'step_cancelled', jsonb_build_object('run_id', c.run_id, 'step',
                  jsonb_build_object('status', 'cancelled')), u.updated_at FROM u, c)""",
            f"""o AS (INSERT INTO flow_dispatch (run_id, flow_id, kind, due_at)
                SELECT '{ORDER}' || k.run_id, f.id, 'child', u.updated_at
                FROM u, k JOIN flow_steps t ON t.run_id = k.run_id
                  JOIN flows f ON f.id = CAST(t.child_session_key AS uuid) AND f.finished_at IS NULL
                WHERE k.kind = 'child' AND t.flow_id = u.id ON CONFLICT DO NOTHING)""",
            """p AS (UPDATE flow_dispatch d SET due_at = u.updated_at FROM u, k
                WHERE d.run_id = k.parent_run_id AND d.kind = 'child')""",
        ]
    return []


def _change_parameters(what: Change, columns: Mapping[str, Any]) -> dict[str, Any]:
    values = encoded(columns, "c_")
    values |= {
        "flow_id": what.flow_id,
        "revision": what.revision,
        "kind": what.kind,
        "told": what.told(),
        "write_id": what.write_id,
    }
    if (step := what.step) is not None:
        values |= {
            "s_id": step.id, "s_run_id": step.run_id, "s_task": step.task, "s_status": step.status.value,
            "s_result": step.result, "s_error": None if step.error is None else encode_json("error", step.error),
            "s_args": step.args, "s_position": step.position, "s_attempt": step.attempt, "s_elapsed": step.elapsed_us,
        }  # fmt: skip
    if what.members:
        values |= _member_parameters(what)
    if isinstance(what.drive, Settle):
        values |= {"due_at": what.drive.due_at, "at_once": what.drive.at_once}
    if isinstance(what.drive, Park):
        values |= {"wakes": what.drive.wakes, "due_at": what.drive.due_at, "fence": what.drive.holder.fence}
        values["keeps_slot"] = what.drive.keeps_slot
        if (join := what.drive.join) is not None:
            values |= {"inserted": len(what.members), "group": join.group, "good": join.good, "bad": join.bad}
    return values


def _member_parameters(what: Change) -> dict[str, Any]:
    columns: dict[str, list[Any]] = {
        name: [getattr(member, name) for member in what.members] for name in _MEMBER_TYPES if name != "options"
    }
    columns["status"] = [status.value for status in columns["status"]]
    columns["options"] = [m.options and encode_json("options", m.options) for m in what.members]
    single = len(what.members) == 1
    values: dict[str, Any] = {"m_" + name: column[0] if single else column for name, column in columns.items()}
    return {**values, "first_pause": what.first_pause}


# ---- start ----------------------------------------------------------------------------------------------------------

_NEW = ", ".join(f"{param(c.name, _TYPES[c.name])}" for c in FLOW_COLUMNS)


@lru_cache(maxsize=2)
def _create_statement(driven: bool) -> sa.TextClause:
    drive = f""", d AS (INSERT INTO flow_dispatch
          (run_id, flow_id, kind, task, queue, priority, due_at, publish_count, parent_run_id, limit_key)
        SELECT CAST(u.id AS text), u.id, 'drive', :d_task, :d_queue, CAST(:d_priority AS smallint),
          coalesce(CAST(:d_due AS timestamptz), {AFTER.format("d_pause")}), CAST(:d_published AS integer),
          CAST(:d_parent AS text), CAST(:d_limit AS text) FROM u)"""
    return sa.text(
        f"""WITH u AS (INSERT INTO flows ({_FLOW}, rest_at, wait_key)
              SELECT {_NEW}, {NOW}, :wait_key ON CONFLICT DO NOTHING RETURNING id, revision, created_at),
            e AS (INSERT INTO flow_events (flow_id, revision, kind, payload_json, at, write_id)
              SELECT u.id, u.revision, :kind, CAST(:told AS jsonb), u.created_at, u.id FROM u)
            {drive if driven else ""}
            SELECT created_at FROM u""".replace("CAST(:created_at AS TIMESTAMP WITH TIME ZONE)", NOW).replace(
            "CAST(:updated_at AS TIMESTAMP WITH TIME ZONE)", NOW
        )
    )


def create(conn: Connection, flow: Flow, kind: str, told: str, wait_key: str | None, drive: Drive | None) -> Any:
    """Inserts flow, event and drive row; gives the time of creation, or None if id or key were taken."""
    values = encoded({c.name: getattr(flow, c.name) for c in FLOW_COLUMNS})
    values |= {"kind": kind, "told": told, "wait_key": wait_key}
    if drive is not None:
        values |= {
            "d_task": drive.task,
            "d_queue": drive.queue,
            "d_priority": drive.priority,
            "d_pause": drive.first_pause,
            "d_due": drive.due_at,
            "d_published": int(drive.published),
            "d_parent": drive.parent_run_id,
            "d_limit": drive.limit_key,
        }
    return conn.scalar(_create_statement(drive is not None), values)


_EACH = {
    "id": "uuid", "key": "text", "input": "json", "due": "timestamptz", "pause": "float8", "published": "int4",
    "limit_key": "text",
}  # fmt: skip
_OF_EACH = {"id": "i.id", "idempotency_key": "i.key", "input_json": "i.input", "created_at": NOW, "updated_at": NOW}


@lru_cache(maxsize=1)
def _create_many_statement() -> sa.TextClause:
    arrays = ", ".join(param("i_" + name, type_ + "[]") for name, type_ in _EACH.items())
    values = ", ".join(_OF_EACH.get(c.name) or param(c.name, _TYPES[c.name]) for c in FLOW_COLUMNS)
    return sa.text(
        f"""WITH i AS MATERIALIZED (SELECT * FROM unnest({arrays}) WITH ORDINALITY AS t({", ".join(_EACH)}, n)),
            told AS (SELECT CAST(:told AS jsonb) AS payload),
            u AS (INSERT INTO flows ({_FLOW}, rest_at) SELECT {values}, {NOW} FROM i ORDER BY i.n
              ON CONFLICT DO NOTHING RETURNING id, revision, created_at),
            e AS (INSERT INTO flow_events (flow_id, revision, kind, payload_json, at, write_id)
              SELECT u.id, u.revision, 'created', told.payload || jsonb_build_object('set', told.payload -> 'set'
                || jsonb_build_object('input_json', i.input, 'idempotency_key', i.key)), u.created_at, u.id
              FROM u JOIN i ON i.id = u.id, told ORDER BY i.n),
            d AS (INSERT INTO flow_dispatch
                (run_id, flow_id, kind, task, queue, priority, due_at, publish_count, limit_key)
              SELECT CAST(u.id AS text), u.id, 'drive', :d_task, :d_queue, CAST(:d_priority AS smallint),
                coalesce(i.due, {NOW} + make_interval(secs => i.pause)), i.published, i.limit_key
              FROM u JOIN i ON i.id = u.id ORDER BY i.n)
            SELECT id FROM u"""
    )


def create_many(conn: Connection, template: Flow, told: str, new: Sequence[NewFlow]) -> Sequence[UUID]:
    """Inserts flows, events and drive rows; gives the ids of those whose id and key were not taken."""
    one = new[0].drive
    values = encoded({c.name: getattr(template, c.name) for c in FLOW_COLUMNS if c.name not in _OF_EACH})
    values |= {"told": told, "d_task": one.task, "d_queue": one.queue, "d_priority": one.priority}
    values |= {"i_" + name: [getattr(each, name) for each in new] for name in ("id", "key", "input")}
    values |= {
        "i_due": [each.drive.due_at for each in new],
        "i_pause": [each.drive.first_pause for each in new],
        "i_published": [int(each.drive.published) for each in new],
        "i_limit_key": [each.drive.limit_key for each in new],
    }
    return conn.execute(_create_many_statement(), values).scalars().all()


def savepoint(conn: Connection) -> AbstractContextManager[Any]:
    """What is written in it is undone together; only what came before stays."""
    return conn.begin_nested()


# ---- claims ---------------------------------------------------------------------------------------------------------

# publish_count > 0 with no worker is "published, waiting for a worker". A claim sent again after its reply was lost
# knows itself by its own token (:repeat).
_CLAIMABLE = f"""(d.due_at <= {NOW} OR (d.worker IS NULL AND d.publish_count > 0)
    OR (CAST(:repeat AS boolean) AND d.worker = :worker))"""
_TAKE = f"""fence = d.fence + 1, worker = :worker, due_at = {AFTER.format("lease")}, publish_count = 0,
    crash_count = d.crash_count + CASE WHEN d.worker IS NULL OR d.worker = :worker THEN 0 ELSE 1 END"""

_CLAIM_DRIVE = sa.text(
    f"""WITH f AS (SELECT id, status AS was, cancel_requested OR coalesce(deadline_at <= {NOW}, false) AS ends
          FROM flows
          WHERE id = :flow_id AND status IN ('created', 'running', 'waiting')
            AND (paused_at IS NULL OR cancel_requested) FOR NO KEY UPDATE),
        d AS (UPDATE flow_dispatch d SET {_TAKE}, queued_at = NULL, urgency = NULL FROM f
          WHERE d.run_id = CAST(f.id AS text) AND d.task IS NOT NULL AND {_CLAIMABLE}
            AND (d.limit_key IS NULL OR d.has_slot OR f.ends)
          RETURNING d.flow_id, d.fence, d.wakes, d.crash_count, d.open_members, d.join_group, d.queue, d.priority,
            d.parent_run_id, d.limit_key),
        u AS (UPDATE flows SET status = CASE WHEN cancel_requested THEN status ELSE 'running' END,
            wait_json = CASE WHEN cancel_requested THEN wait_json END,
            wait_key = CASE WHEN cancel_requested THEN wait_key END,
            revision = revision + 1, updated_at = {NOW}, rest_at = {NOW}
          FROM d WHERE flows.id = d.flow_id RETURNING {_FLOW}),
        e AS (INSERT INTO flow_events (flow_id, revision, kind, payload_json, at)
          SELECT u.id, u.revision,
            CASE WHEN f.was = 'created' THEN 'started' WHEN d.crash_count > 0 THEN 'reclaimed' ELSE 'resumed' END,
            jsonb_build_object('set', jsonb_build_object('status', u.status, 'wait_json', u.wait_json),
              'worker', CAST(:worker AS text), 'fence', d.fence), u.updated_at
          FROM u, d, f)
        SELECT u.*, f.was, d.fence, d.wakes, d.crash_count, d.open_members, d.join_group, d.queue, d.priority,
          d.parent_run_id, d.limit_key, {NOW} AS now
        FROM u, d, f"""
).columns(*FLOW_COLUMNS)


def claim_drive(conn: Connection, flow_id: UUID, worker: str, lease: float, repeat: bool) -> Row | None:
    values = {"flow_id": flow_id, "worker": worker, "lease": lease, "repeat": repeat}
    return conn.execute(_CLAIM_DRIVE, values).mappings().first()


_CLAIM_STEP = sa.text(
    f"""WITH d AS (UPDATE flow_dispatch d SET {_TAKE} WHERE d.run_id = :run_id AND d.kind = 'step' AND {_CLAIMABLE}
          RETURNING d.run_id, d.flow_id, d.fence, d.crash_count),
        s AS (UPDATE flow_steps s SET status = 'running', updated_at = {NOW} FROM d
          WHERE s.flow_id = d.flow_id AND s.run_id = d.run_id AND s.status IN ('pending', 'running')
          RETURNING s.flow_id, s.run_id, s.task, s.args_json, s.attempt),
        e AS (INSERT INTO flow_events (flow_id, kind, payload_json, at)
          SELECT s.flow_id, 'step_started', jsonb_build_object('run_id', s.run_id, 'step', jsonb_build_object(
            'status', 'running'), 'worker', CAST(:worker AS text), 'fence', d.fence), {NOW} FROM s, d)
        SELECT d.flow_id, d.run_id, d.fence, d.crash_count, s.task, s.args_json, s.attempt, f.cancel_requested,
          f.owner_session_key, f.controller_id
        FROM d JOIN s ON s.run_id = d.run_id JOIN flows f ON f.id = d.flow_id"""
)


def claim_step(conn: Connection, run_id: str, worker: str, lease: float, repeat: bool) -> Row | None:
    values = {"run_id": run_id, "worker": worker, "lease": lease, "repeat": repeat}
    return conn.execute(_CLAIM_STEP, values).mappings().first()


# ---- completions ----------------------------------------------------------------------------------------------------

# "met" is the wake of the join: every member of every group is closed, or the group waited for is decided.
MET = """(d.open_members <= x.n OR (d.join_group = x.grp AND (d.join_good <= x.ok OR d.join_bad < x.n - x.ok)))"""
_COMPLETE = sa.text(
    f"""WITH r AS (DELETE FROM flow_dispatch
          WHERE run_id = :run_id AND kind IN ('step', 'child') AND fence = :fence
            AND worker IS NOT DISTINCT FROM CAST(:worker AS text)
          RETURNING flow_id, run_id, join_group),
        s AS (UPDATE flow_steps t SET status = :status, result_json = CAST(:result AS json),
            error_json = CAST(:error AS jsonb), updated_at = {NOW}
          FROM r WHERE t.flow_id = r.flow_id AND t.run_id = r.run_id AND t.status IN ('pending', 'running')
          RETURNING r.flow_id),
        e AS (INSERT INTO flow_events (flow_id, kind, payload_json, at, write_id)
          SELECT s.flow_id, :kind, CAST(:told AS jsonb), {NOW}, :write_id FROM s RETURNING flow_id),
        x AS (SELECT r.flow_id, r.join_group AS grp, 1 AS n, CAST(:good AS integer) AS ok
          FROM r, (SELECT count(*) AS c FROM e) written WHERE written.c >= 0),
        w AS (UPDATE flow_dispatch d SET open_members = d.open_members - x.n,
            join_good = d.join_good - CASE WHEN d.join_group = x.grp THEN x.ok ELSE 0 END,
            join_bad = d.join_bad - CASE WHEN d.join_group = x.grp THEN x.n - x.ok ELSE 0 END,
            wakes = d.wakes + CASE WHEN {MET} THEN 1 ELSE 0 END,
            due_at = CASE WHEN d.worker IS NULL AND {MET} THEN {NOW} ELSE d.due_at END
          FROM x WHERE d.run_id = CAST(x.flow_id AS text) RETURNING d.due_at, d.queue, d.worker)
        SELECT coalesce((SELECT w.worker IS NULL AND w.due_at <= {NOW} FROM w), false) AS woke,
          (SELECT w.queue FROM w) AS queue, (SELECT count(*) FROM r) AS closed"""
)


def complete(conn: Connection, what: Completion) -> Row | None:
    """Closes a step; None if its row is no longer this holder's."""
    values = {
        "run_id": what.holder.run_id, "fence": what.holder.fence, "worker": what.holder.worker,
        "status": what.status.value, "result": what.result,
        "error": None if what.error is None else encode_json("error", what.error),
        "kind": what.kind, "told": what.told(), "write_id": what.write_id, "good": what.good,
    }  # fmt: skip
    row = conn.execute(_COMPLETE, values).mappings().one()
    return row if row["closed"] else None


# ---- sweep ----------------------------------------------------------------------------------------------------------

_SWEEP = sa.text(
    f"""WITH c AS (SELECT run_id, worker IS NOT NULL OR publish_count > 0 AND crash_count > 0 AS was_held
          FROM flow_dispatch WHERE due_at <= {NOW} AND kind IN ('drive', 'step') AND task IS NOT NULL
            AND (CAST(:only AS text) IS NULL
              OR CAST(:only AS text) = CASE WHEN fence > 0 THEN 'begun' WHEN kind = 'step' THEN 'step' ELSE 'flow' END)
          ORDER BY due_at LIMIT :limit FOR UPDATE SKIP LOCKED)
        UPDATE flow_dispatch d SET worker = NULL, publish_count = d.publish_count + 1,
          crash_count = d.crash_count + CASE WHEN d.worker IS NULL THEN 0 ELSE 1 END,
          due_at = {NOW} + make_interval(secs => least(CAST(:cap AS double precision),
            CAST(:first AS double precision) * (1 << least(greatest(d.publish_count - 1, 0), 20))))
        FROM c WHERE d.run_id = c.run_id
        RETURNING d.run_id, d.flow_id, d.kind, d.task, d.queue, d.priority, d.options, d.fence, d.crash_count,
          d.publish_count, c.was_held"""
)


def sweep(conn: Connection, limit: int, first: float, cap: float, only: str | None = None) -> list[Row]:
    return list(conn.execute(_SWEEP, {"limit": limit, "first": first, "cap": cap, "only": only}).mappings())


# ---- observations ---------------------------------------------------------------------------------------------------

_OBSERVE = sa.text(
    f"""WITH s AS (INSERT INTO flow_steps (id, flow_id, runtime, child_session_key, run_id, task, status, result_json,
            error_json, position, attempt, created_at, updated_at)
          SELECT :id, f.id, :runtime, :child_session_key, :run_id, :task, :status, CAST(:result_json AS json),
            CAST(:error_json AS jsonb), 0, 1, {NOW}, {NOW} FROM flows f WHERE f.id = :flow_id
            AND (f.finished_at IS NULL OR :status NOT IN ('pending', 'running'))
          ON CONFLICT (flow_id, run_id) DO UPDATE SET status = excluded.status,
            child_session_key = coalesce(excluded.child_session_key, flow_steps.child_session_key),
            result_json = coalesce(excluded.result_json, flow_steps.result_json),
            error_json = coalesce(excluded.error_json, flow_steps.error_json), updated_at = {NOW}
          WHERE flow_steps.status IN ('pending', 'running') AND flow_steps.runtime = excluded.runtime
          RETURNING *),
        e AS (INSERT INTO flow_events (flow_id, write_id, kind, payload_json, at)
          SELECT s.flow_id, :write_id, 'step_observed', jsonb_build_object('run_id', s.run_id, 'step',
            jsonb_build_object('id', s.id, 'runtime', s.runtime, 'child_session_key', s.child_session_key,
            'task', s.task, 'status', s.status, 'result_json', s.result_json, 'error_json', s.error_json,
            'position', s.position, 'attempt', s.attempt)),
            s.updated_at FROM s)
        SELECT s.* FROM s"""
).columns(*flow_steps.c)


def observe(conn: Connection, step: FlowStep, write_id: UUID | None) -> Row | None:
    """Inserts or brings forward an observed step with its event; None if it is closed, or the flow is not there."""
    names = ("id", "runtime", "child_session_key", "run_id", "task", "status", "result_json", "error_json", "flow_id")
    values = encoded({n: getattr(step, n) for n in names}) | {"write_id": write_id}
    return conn.execute(_OBSERVE, values).mappings().first()


def planned_rows(conn: Connection, query: sa.Select[Any]) -> int | None:
    """How many rows the planner expects a query to give, by the statistics of the last ANALYZE."""
    text = query.compile(dialect=conn.dialect, compile_kwargs={"literal_binds": True})
    (plan,) = conn.exec_driver_sql(f"EXPLAIN (FORMAT JSON) {text}").scalar_one()
    return int(plan["Plan"]["Plan Rows"])


def wait_run_id() -> sa.ColumnElement[str]:
    """The run id of the step by which a flow waits; NULL: it has none."""
    return sa.func.jsonb_extract_path_text(flows.c.wait_json, "run_id")


# ---- engines --------------------------------------------------------------------------------------------------------

# Bounds on everything that could otherwise hang: a dead server, a held lock, a stopped process inside a transaction.
CONNECT_ARGS = {
    "connect_timeout": 3,
    "keepalives": 1,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "options": "-c timezone=UTC -c lock_timeout=2000 -c statement_timeout=30000"
    " -c idle_in_transaction_session_timeout=10000",
}


def engine_options() -> dict[str, Any]:
    return {"pool_pre_ping": True, "pool_recycle": 1800, "connect_args": CONNECT_ARGS}


def writing(engine: sa.Engine, *, single: bool) -> sa.Engine:
    """The engine to write through; one-statement transitions need no BEGIN and COMMIT round trips."""
    return engine.execution_options(isolation_level="AUTOCOMMIT") if single else engine


def transaction(engine: sa.Engine) -> AbstractContextManager[Connection]:
    """A transaction."""
    return engine.begin()


def reading(engine: sa.Engine) -> sa.Engine:
    return engine.execution_options(isolation_level="AUTOCOMMIT")


def snapshot(engine: sa.Engine) -> sa.Engine:
    """The engine for several reads as of one moment."""
    return engine.execution_options(isolation_level="REPEATABLE READ")
