"""A child flow's drive row knows the step that it is of its parent."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("flow_dispatch", sa.Column("parent_run_id", sa.Text()))


def downgrade() -> None:
    op.drop_column("flow_dispatch", "parent_run_id")
