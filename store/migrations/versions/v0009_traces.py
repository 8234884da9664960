"""A flow keeps the trace that it belongs to, and a dispatch row the span of its last run, which may have crashed."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("flows", sa.Column("trace_json", sa.Text().with_variant(JSONB(none_as_null=True), "postgresql")))
    op.add_column("flow_dispatch", sa.Column("run_span", sa.Text()))


def downgrade() -> None:
    op.drop_column("flow_dispatch", "run_span")
    op.drop_column("flows", "trace_json")
