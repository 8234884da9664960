"""The tables.

``flows`` holds one row for each durable run: the truth about it. Every change of such a row moves its ``revision``
by one and appends one event that carries the change; both commit together or not at all. Nothing is ever read from
anywhere else: a broker message says "look here", never "this is so".

``flow_steps`` holds the recorded results. ``(flow_id, run_id)`` is the identity of a unit of work; it is the same
after a crash and in every retry, so it serves as an idempotency key outside too. A terminal step never changes.

``flow_events`` is append-only. An event with a revision changed the flow's row; one without belongs to a step alone
(``payload_json`` then names its run id). A flow's history is ordered by revision, a step's by event id within its run
id; nothing may be read from the order between the two. Folding the events gives the rows back. ``write_id`` is made by
the writer before its first try: whoever lost the reply to a commit looks for it instead of guessing.

``flow_dispatch`` is the one hot table: a row for each thing that may need a worker. It is outbox, timer wheel and
lease in one.

- *kind* ``drive``: the flow function of this flow, from start to the terminal transition; ``step``: one Celery step,
  until it is closed; ``child``: a child flow in its parent's name, due when the child has ended (or, under a run id
  that says so, the order to cancel a child whose parent has ended); ``look``: an external event yet to be handed over.
  A flow that no definition drives has a drive row without ``task`` while it waits; the sweep settles that itself.
- ``due_at`` is when somebody must look again: to publish once more, to end a lease, to fire a timer. NULL: at rest.
- ``publish_count > 0`` says "published, waiting for a worker"; that alone makes a row claimable before ``due_at``.
- ``worker`` and ``fence`` say who holds the row. The fence only grows, for as long as the row lives, so whoever was
  overtaken is told apart for ever.
- ``wakes`` counts the calls to a driver. It parks only if the count is still what it was when it claimed.
- ``open_members`` counts the members of all joins that still have a row; ``join_group``, ``join_good`` and ``join_bad``
  are the group that is waited for: successes still needed, failures still borne. A member's row carries its group.

Rows of a flow are inserted only in a transaction that moves that flow's revision, but for the order to cancel a child,
which its parent's end inserts; the transaction that makes it
terminal closes its open steps and deletes all its rows.

``flow_inbox`` keeps external events until a flow has waited for them; ``consumed_by`` is set once.

``flow_heartbeats`` has a row for each chore: when somebody last did it, how often somebody should, and what came of it.

``flow_limits`` has a row for each limit that is in use; its lock lets one at a time give slots. Who has a slot, and who
queues for one, stands in the drive rows alone: ``limit_key`` says which limit a flow is under, for good; ``has_slot``
that it may be claimed; ``queued_at`` and ``urgency`` its place in the queue. Slots are given under that lock, and freed
by whoever may write the drive row. ``due_at`` is when somebody must look again, ``recent_starts`` when flows began
within the limit's last stretch of time, as seconds since 1970, and the ids of those that were let begin and, when
somebody looked last, had not.

Who writes: ``operations.py`` (records), ``dispatch.py`` (claims, transitions, completions), ``inbox.py`` (events),
``children.py`` (child flows), ``limits.py`` (slots), ``health.py`` (heartbeats), ``traces.py`` (spans), each through
``postgresql.py`` or ``sqlite.py`` where the two differ.

No index may name a column that the record of a step changes (``revision``, ``current_step``, ``updated_at``), not even
a partial one: PostgreSQL could then not update the row in place (HOT). Hence ``rest_at``, equal to ``updated_at`` but
for those records, to list by; and ``finished_at`` to prune by.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSON, JSONB

from celery_flows.store.models import FlowMode, FlowStatus, FlowStepStatus, StepRuntime


class UtcDateTime(sa.types.TypeDecorator[datetime]):
    """Aware UTC on both sides; SQLite keeps it as text of 26 characters, which sorts as time."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        if value is None or dialect.name == "postgresql":
            return value
        return value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class JsonText(sa.types.TypeDecorator[Any]):
    """JSON as text. SQLAlchemy's own JSON type makes SQLite a column of numeric affinity, which turns large numbers
    that stand alone into floats."""

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: sa.Dialect) -> str | None:
        return None if value is None else json.dumps(value, ensure_ascii=False, allow_nan=False)

    def process_result_value(self, value: str | None, dialect: sa.Dialect) -> Any:
        return None if value is None else json.loads(value)


class EnumText(sa.types.TypeDecorator[Any]):
    """A string enum, stored as its text."""

    impl = sa.Text
    cache_ok = True

    def __init__(self, enum: type[StrEnum]) -> None:
        super().__init__()
        self.enum = enum

    def process_bind_param(self, value: str | None, dialect: sa.Dialect) -> str | None:
        return None if value is None else self.enum(value).value

    def process_result_value(self, value: str | None, dialect: sa.Dialect) -> StrEnum | None:
        return None if value is None else self.enum(value)


metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

Json = JsonText().with_variant(JSONB(none_as_null=True), "postgresql")
# What programs are handed back, as they wrote it: jsonb sorts the keys of objects and makes 1e16 a whole number, so a
# flow that goes through a result would come to other steps when it is replayed.
Verbatim = JsonText().with_variant(JSON(none_as_null=True), "postgresql")
BigId = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def _one_of(column: str, values: Any, name: str) -> sa.CheckConstraint:
    listed = ", ".join(f"'{value}'" for value in values)
    return sa.CheckConstraint(f"{column} IN ({listed})", name=name)


def _partial(name: str, where: str, *columns: str) -> sa.Index:
    return sa.Index(name, *columns, postgresql_where=sa.text(where), sqlite_where=sa.text(where))


def _flow_id(*, nullable: bool = False, name: str = "flow_id") -> sa.Column[Any]:
    return sa.Column(name, sa.Uuid(), sa.ForeignKey("flows.id", ondelete="CASCADE"), nullable=nullable)


flows = sa.Table(
    "flows",
    metadata,
    sa.Column("id", sa.Uuid(), primary_key=True),
    sa.Column("controller_id", sa.Text(), nullable=False),
    sa.Column("goal", sa.Text(), nullable=False),
    sa.Column("owner_session_key", sa.Text(), nullable=False),
    sa.Column("requester_origin", sa.Text()),
    sa.Column("current_step", sa.Text()),
    sa.Column("state_json", Verbatim, nullable=False),
    sa.Column("wait_json", Json),
    sa.Column("status", EnumText(FlowStatus), nullable=False),
    sa.Column("cancel_requested", sa.Boolean(), nullable=False),
    sa.Column("revision", sa.BigInteger(), nullable=False),
    sa.Column("created_at", UtcDateTime(), nullable=False),
    sa.Column("updated_at", UtcDateTime(), nullable=False),
    sa.Column("mode", EnumText(FlowMode), nullable=False),
    sa.Column("input_json", Verbatim),
    sa.Column("result_json", Verbatim),
    sa.Column("error_json", Json),
    sa.Column("idempotency_key", sa.Text()),
    sa.Column("definition_version", sa.Integer(), nullable=False),
    sa.Column("parent_flow_id", sa.Uuid()),
    sa.Column("deadline_at", UtcDateTime()),
    sa.Column("paused_at", UtcDateTime()),
    sa.Column("finished_at", UtcDateTime()),
    sa.Column("continued_as", sa.Uuid()),
    sa.Column("forked_from", sa.Uuid()),
    sa.Column("retain_seconds", sa.BigInteger()),
    sa.Column("trace_json", Json),
    # Derived, so in no record and in no event:
    sa.Column("rest_at", UtcDateTime(), nullable=False),  # updated_at, but for records of a running flow
    sa.Column("wait_key", sa.Text()),  # what external events are matched by
    _one_of("status", FlowStatus, "status"),
    _one_of("mode", FlowMode, "mode"),
    sa.Index(None, "created_at", "id"),
    sa.Index(None, "owner_session_key", "created_at", "id"),
    sa.Index(None, "controller_id", "created_at", "id"),
    sa.Index(None, "status", "created_at", "id"),
    sa.Index(None, "status", "rest_at", "id"),
    sa.UniqueConstraint("controller_id", "idempotency_key"),
    _partial("ix_flows_idempotency_key", "idempotency_key IS NOT NULL", "idempotency_key"),
    _partial("ix_flows_ended", "finished_at IS NOT NULL", "retain_seconds", "status", "finished_at", "id"),
    _partial("ix_flows_wait_key", "wait_key IS NOT NULL", "wait_key", "rest_at", "id"),
    _partial("ix_flows_parent_flow_id", "parent_flow_id IS NOT NULL", "parent_flow_id"),
)

# Nobody drives such a flow. A cancel comes before a pause: it is driven to clean up.
IS_PAUSED = sa.and_(flows.c.paused_at.isnot(None), flows.c.cancel_requested.is_(False))

flow_steps = sa.Table(
    "flow_steps",
    metadata,
    sa.Column("id", sa.Uuid(), primary_key=True),
    _flow_id(),
    sa.Column("runtime", EnumText(StepRuntime), nullable=False),
    sa.Column("child_session_key", sa.Text()),
    sa.Column("run_id", sa.Text(), nullable=False),
    sa.Column("task", sa.Text(), nullable=False),
    sa.Column("status", EnumText(FlowStepStatus), nullable=False),
    sa.Column("result_json", Verbatim),
    sa.Column("created_at", UtcDateTime(), nullable=False),
    sa.Column("updated_at", UtcDateTime(), nullable=False),
    sa.Column("position", sa.Integer(), nullable=False),
    sa.Column("attempt", sa.Integer(), nullable=False),
    sa.Column("args_json", Verbatim),
    sa.Column("error_json", Json),
    _one_of("status", FlowStepStatus, "status"),
    _one_of("runtime", StepRuntime, "runtime"),
    sa.UniqueConstraint("flow_id", "run_id"),
)

flow_events = sa.Table(
    "flow_events",
    metadata,
    sa.Column("id", BigId, sa.Identity(cache=1), primary_key=True),
    _flow_id(),
    sa.Column("revision", sa.BigInteger()),
    sa.Column("kind", sa.Text(), nullable=False),
    sa.Column("payload_json", Json, nullable=False),
    sa.Column("at", UtcDateTime(), nullable=False),
    sa.Column("write_id", sa.Uuid()),
    sa.UniqueConstraint("flow_id", "revision"),
    sa.Index(None, "flow_id", "id"),
    sqlite_autoincrement=True,
)

DISPATCH_KINDS = ("drive", "step", "child", "look")

flow_dispatch = sa.Table(
    "flow_dispatch",
    metadata,
    sa.Column("run_id", sa.Text(), primary_key=True),  # the Celery task id; of a drive row the flow's id
    _flow_id(nullable=True),
    sa.Column("kind", sa.Text(), nullable=False),
    sa.Column("task", sa.Text()),  # what Flower shows: the definition's or the task's name
    sa.Column("queue", sa.Text()),
    sa.Column("priority", sa.SmallInteger()),
    sa.Column("options", Json),  # of the message, for a Celery step: time limits and the like
    sa.Column("due_at", UtcDateTime()),
    sa.Column("fence", sa.BigInteger(), nullable=False, server_default="0"),
    sa.Column("wakes", sa.BigInteger(), nullable=False, server_default="0"),
    sa.Column("worker", sa.Text()),  # node/boot id/pid/Celery request id
    sa.Column("publish_count", sa.Integer(), nullable=False, server_default="0"),
    sa.Column("crash_count", sa.Integer(), nullable=False, server_default="0"),
    sa.Column("deadline_at", UtcDateTime()),
    sa.Column("open_members", sa.Integer(), nullable=False, server_default="0"),
    sa.Column("join_group", sa.Integer(), nullable=False, server_default="0"),
    sa.Column("join_good", sa.Integer(), nullable=False, server_default="0"),
    sa.Column("join_bad", sa.Integer(), nullable=False, server_default="0"),
    sa.Column("parent_run_id", sa.Text()),  # of a child flow's drive row: the step that it is of its parent
    sa.Column("limit_key", sa.Text()),
    sa.Column("has_slot", sa.Boolean(), nullable=False, server_default=sa.false()),
    sa.Column("queued_at", UtcDateTime()),
    sa.Column("urgency", sa.SmallInteger()),  # low first: the priority, as the broker has it
    sa.Column("run_span", sa.Text()),  # of the last run that was traced; see traces.py
    _one_of("kind", DISPATCH_KINDS, "kind"),
    _partial("ix_flow_dispatch_due_at", "due_at IS NOT NULL", "due_at"),
    sa.Index("ix_flow_dispatch_flow_id", "flow_id"),
    _partial("ix_flow_dispatch_worker", "worker IS NOT NULL", "worker"),
    _partial("ix_flow_dispatch_has_slot", "has_slot", "limit_key"),
    _partial("ix_flow_dispatch_queued_at", "queued_at IS NOT NULL", "limit_key", "urgency", "queued_at"),
)

flow_inbox = sa.Table(
    "flow_inbox",
    metadata,
    sa.Column("position", BigId, sa.Identity(cache=1), primary_key=True),  # first in, first out
    sa.Column("id", sa.Uuid(), nullable=False),  # made by the emitter before its first try
    sa.Column("topic", sa.Text(), nullable=False),
    sa.Column("correlation_id", sa.Text(), nullable=False),
    sa.Column("event_key", sa.Text(), nullable=False),
    sa.Column("payload_json", Verbatim),
    sa.Column("created_at", UtcDateTime(), nullable=False),
    _flow_id(nullable=True, name="consumed_by"),
    sa.UniqueConstraint("id"),
    _partial("ix_flow_inbox_event_key", "consumed_by IS NULL", "event_key", "position"),
    _partial("ix_flow_inbox_consumed_by", "consumed_by IS NOT NULL", "consumed_by"),
    sqlite_autoincrement=True,
)

flow_heartbeats = sa.Table(
    "flow_heartbeats",
    metadata,
    sa.Column("name", sa.Text(), primary_key=True),
    sa.Column("at", UtcDateTime(), nullable=False),
    sa.Column("every_seconds", sa.Double(), nullable=False),
    sa.Column("report", Json, nullable=False),
)

flow_limits = sa.Table(
    "flow_limits",
    metadata,
    sa.Column("key", sa.Text(), primary_key=True),
    sa.Column("definition", sa.Text(), nullable=False),
    sa.Column("due_at", UtcDateTime(), nullable=False),
    sa.Column("recent_starts", Json, nullable=False),
    sa.Index(None, "due_at"),
)

FLOW_COLUMNS = tuple(c for c in flows.c if c.name not in ("rest_at", "wait_key"))  # the columns of a Flow
EVENT_COLUMNS = tuple(c for c in flow_events.c if c.name != "write_id")  # the columns of a FlowEvent
