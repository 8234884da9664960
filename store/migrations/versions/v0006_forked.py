"""A flow that begins with what another has recorded says which. And flows are searched, newest first."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

KEYED = sa.text("idempotency_key IS NOT NULL")


def upgrade() -> None:
    op.add_column("flows", sa.Column("forked_from", sa.Uuid()))
    op.create_index("ix_flows_created_at_id", "flows", ["created_at", "id"])
    op.create_index("ix_flows_controller_id_created_at_id", "flows", ["controller_id", "created_at", "id"])
    op.create_index("ix_flows_status_created_at_id", "flows", ["status", "created_at", "id"])
    op.create_index(
        "ix_flows_idempotency_key", "flows", ["idempotency_key"], postgresql_where=KEYED, sqlite_where=KEYED
    )


def downgrade() -> None:
    op.drop_index("ix_flows_idempotency_key", "flows")
    op.drop_index("ix_flows_status_created_at_id", "flows")
    op.drop_index("ix_flows_controller_id_created_at_id", "flows")
    op.drop_index("ix_flows_created_at_id", "flows")
    op.drop_column("flows", "forked_from")
