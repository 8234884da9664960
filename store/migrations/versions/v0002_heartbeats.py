"""When each chore was last done, for those who ask whether all is well."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "flow_heartbeats",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("every_seconds", sa.Double(), nullable=False),
        sa.Column("report", sa.Text().with_variant(postgresql.JSONB(none_as_null=True), "postgresql"), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_flow_heartbeats")),
    )


def downgrade() -> None:
    op.drop_table("flow_heartbeats")
