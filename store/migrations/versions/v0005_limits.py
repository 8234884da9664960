"""Limited flows have a slot, or queue for one; a row for each limit that is in use."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("flow_dispatch", sa.Column("limit_key", sa.Text()))
    op.add_column("flow_dispatch", sa.Column("has_slot", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("flow_dispatch", sa.Column("queued_at", sa.DateTime(timezone=True)))
    op.add_column("flow_dispatch", sa.Column("urgency", sa.SmallInteger()))
    _partial_index("ix_flow_dispatch_has_slot", ["limit_key"], "has_slot")
    _partial_index("ix_flow_dispatch_queued_at", ["limit_key", "urgency", "queued_at"], "queued_at IS NOT NULL")
    op.create_table(
        "flow_limits",
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("definition", sa.Text(), nullable=False),
        sa.Column("due_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column(
            "recent_starts", sa.Text().with_variant(postgresql.JSONB(none_as_null=True), "postgresql"), nullable=False
        ),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_flow_limits")),
    )
    op.create_index(op.f("ix_flow_limits_due_at"), "flow_limits", ["due_at"])


def _partial_index(name: str, columns: list[str], where: str) -> None:
    op.create_index(name, "flow_dispatch", columns, postgresql_where=sa.text(where), sqlite_where=sa.text(where))


def downgrade() -> None:
    op.drop_table("flow_limits")
    for name in "queued_at", "has_slot":
        op.drop_index(f"ix_flow_dispatch_{name}", "flow_dispatch")
    for name in "urgency", "queued_at", "has_slot", "limit_key":
        op.drop_column("flow_dispatch", name)
