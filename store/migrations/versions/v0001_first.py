"""The first schema."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

JSON = sa.Text().with_variant(postgresql.JSONB(none_as_null=True), "postgresql")
TIME = sa.DateTime(timezone=True)
BIG_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "flows",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("controller_id", sa.Text(), nullable=False),
        sa.Column("goal", sa.Text(), nullable=False),
        sa.Column("owner_session_key", sa.Text(), nullable=False),
        sa.Column("requester_origin", sa.Text()),
        sa.Column("current_step", sa.Text()),
        sa.Column("state_json", JSON, nullable=False),
        sa.Column("wait_json", JSON),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("cancel_requested", sa.Boolean(), nullable=False),
        sa.Column("revision", sa.BigInteger(), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("updated_at", TIME, nullable=False),
        sa.Column("mode", sa.Text(), nullable=False),
        sa.Column("input_json", JSON),
        sa.Column("result_json", JSON),
        sa.Column("error_json", JSON),
        sa.Column("idempotency_key", sa.Text()),
        sa.Column("definition_version", sa.Integer(), nullable=False),
        sa.Column("parent_flow_id", sa.Uuid()),
        sa.Column("deadline_at", TIME),
        sa.Column("paused_at", TIME),
        sa.Column("finished_at", TIME),
        sa.Column("rest_at", TIME, nullable=False),
        sa.Column("wait_key", sa.Text()),
        sa.CheckConstraint("mode IN ('managed', 'mirrored')", name=op.f("ck_flows_mode")),
        sa.CheckConstraint(
            "status IN ('created', 'running', 'waiting', 'cancelled', 'finished', 'failed')",
            name=op.f("ck_flows_status"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_flows")),
        sa.UniqueConstraint("controller_id", "idempotency_key", name=op.f("uq_flows_controller_id_idempotency_key")),
    )
    _partial_index("ix_flows_finished_at", "flows", ["finished_at"], "finished_at IS NOT NULL")
    op.create_index(
        op.f("ix_flows_owner_session_key_created_at_id"), "flows", ["owner_session_key", "created_at", "id"]
    )
    _partial_index("ix_flows_parent_flow_id", "flows", ["parent_flow_id"], "parent_flow_id IS NOT NULL")
    op.create_index(op.f("ix_flows_status_rest_at_id"), "flows", ["status", "rest_at", "id"])
    _partial_index("ix_flows_wait_key", "flows", ["wait_key", "rest_at", "id"], "wait_key IS NOT NULL")
    op.create_table(
        "flow_dispatch",
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("flow_id", sa.Uuid()),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("task", sa.Text()),
        sa.Column("queue", sa.Text()),
        sa.Column("priority", sa.SmallInteger()),
        sa.Column("options", JSON),
        sa.Column("due_at", TIME),
        sa.Column("fence", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("wakes", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("worker", sa.Text()),
        sa.Column("publish_count", sa.Integer(), server_default="0", nullable=False),
        sa.Column("crash_count", sa.Integer(), server_default="0", nullable=False),
        sa.Column("deadline_at", TIME),
        sa.Column("open_members", sa.Integer(), server_default="0", nullable=False),
        sa.Column("join_group", sa.Integer(), server_default="0", nullable=False),
        sa.Column("join_good", sa.Integer(), server_default="0", nullable=False),
        sa.Column("join_bad", sa.Integer(), server_default="0", nullable=False),
        sa.CheckConstraint("kind IN ('drive', 'step', 'child', 'look')", name=op.f("ck_flow_dispatch_kind")),
        sa.ForeignKeyConstraint(["flow_id"], ["flows.id"], name=op.f("fk_flow_dispatch_flow_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("run_id", name=op.f("pk_flow_dispatch")),
    )
    _partial_index("ix_flow_dispatch_due_at", "flow_dispatch", ["due_at"], "due_at IS NOT NULL")
    op.create_index("ix_flow_dispatch_flow_id", "flow_dispatch", ["flow_id"])
    _partial_index("ix_flow_dispatch_worker", "flow_dispatch", ["worker"], "worker IS NOT NULL")
    op.create_table(
        "flow_events",
        sa.Column("id", BIG_ID, sa.Identity(always=False, cache=1), nullable=False),
        sa.Column("flow_id", sa.Uuid(), nullable=False),
        sa.Column("revision", sa.BigInteger()),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("payload_json", JSON, nullable=False),
        sa.Column("at", TIME, nullable=False),
        sa.Column("write_id", sa.Uuid()),
        sa.ForeignKeyConstraint(["flow_id"], ["flows.id"], name=op.f("fk_flow_events_flow_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_flow_events")),
        sa.UniqueConstraint("flow_id", "revision", name=op.f("uq_flow_events_flow_id_revision")),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_flow_events_flow_id_id"), "flow_events", ["flow_id", "id"])
    op.create_table(
        "flow_inbox",
        sa.Column("position", BIG_ID, sa.Identity(always=False, cache=1), nullable=False),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("topic", sa.Text(), nullable=False),
        sa.Column("correlation_id", sa.Text(), nullable=False),
        sa.Column("event_key", sa.Text(), nullable=False),
        sa.Column("payload_json", JSON),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("consumed_by", sa.Uuid()),
        sa.ForeignKeyConstraint(
            ["consumed_by"], ["flows.id"], name=op.f("fk_flow_inbox_consumed_by"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("position", name=op.f("pk_flow_inbox")),
        sa.UniqueConstraint("id", name=op.f("uq_flow_inbox_id")),
        sqlite_autoincrement=True,
    )
    _partial_index("ix_flow_inbox_consumed_by", "flow_inbox", ["consumed_by"], "consumed_by IS NOT NULL")
    _partial_index("ix_flow_inbox_event_key", "flow_inbox", ["event_key", "position"], "consumed_by IS NULL")
    op.create_table(
        "flow_steps",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("flow_id", sa.Uuid(), nullable=False),
        sa.Column("runtime", sa.Text(), nullable=False),
        sa.Column("child_session_key", sa.Text()),
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("task", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("result_json", JSON),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("updated_at", TIME, nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("args_json", JSON),
        sa.Column("error_json", JSON),
        sa.CheckConstraint("runtime IN ('managed', 'mirrored')", name=op.f("ck_flow_steps_runtime")),
        sa.CheckConstraint(
            "status IN ('pending', 'running', 'succeeded', 'failed', 'cancelled')", name=op.f("ck_flow_steps_status")
        ),
        sa.ForeignKeyConstraint(["flow_id"], ["flows.id"], name=op.f("fk_flow_steps_flow_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_flow_steps")),
        sa.UniqueConstraint("flow_id", "run_id", name=op.f("uq_flow_steps_flow_id_run_id")),
    )


def downgrade() -> None:
    for table in ("flow_inbox", "flow_dispatch", "flow_events", "flow_steps", "flows"):
        op.drop_table(table)


def _partial_index(name: str, table: str, columns: list[str], where: str) -> None:
    op.create_index(name, table, columns, postgresql_where=sa.text(where), sqlite_where=sa.text(where))
