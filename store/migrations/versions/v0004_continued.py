"""A flow that goes on as another one, with a fresh history, says which."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("flows", sa.Column("continued_as", sa.Uuid()))


def downgrade() -> None:
    op.drop_column("flows", "continued_as")
