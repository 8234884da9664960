"""A flow may say for how long it is kept; what is past its retention is found without passing over what is not."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

ENDED = sa.text("finished_at IS NOT NULL")


def upgrade() -> None:
    op.add_column("flows", sa.Column("retain_seconds", sa.BigInteger()))
    op.create_index(
        "ix_flows_ended", "flows", ["retain_seconds", "status", "finished_at", "id"],
        postgresql_where=ENDED, sqlite_where=ENDED,
    )  # fmt: skip
    op.drop_index("ix_flows_finished_at", "flows")


def downgrade() -> None:
    op.create_index("ix_flows_finished_at", "flows", ["finished_at"], postgresql_where=ENDED, sqlite_where=ENDED)
    op.drop_index("ix_flows_ended", "flows")
    op.drop_column("flows", "retain_seconds")
