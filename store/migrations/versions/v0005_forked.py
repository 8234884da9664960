"""A flow that begins with what another has recorded says which."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("flows", sa.Column("forked_from", sa.Uuid()))


def downgrade() -> None:
    op.drop_column("flows", "forked_from")
