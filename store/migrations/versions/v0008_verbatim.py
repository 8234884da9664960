"""What programs are handed back is kept as they wrote it: json instead of jsonb. PostgreSQL writes these tables anew
for that, and nobody can use them meanwhile. SQLite keeps text as it is."""

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

COLUMNS = {
    "flows": ("state_json", "input_json", "result_json"),
    "flow_steps": ("result_json", "args_json"),
    "flow_inbox": ("payload_json",),
}


def upgrade() -> None:
    _make("json")


def downgrade() -> None:
    _make("jsonb")


def _make(name: str) -> None:
    if op.get_bind().dialect.name != "postgresql":
        return
    for table, columns in COLUMNS.items():
        op.execute(
            f"ALTER TABLE {table} "
            + ", ".join(f"ALTER COLUMN {column} TYPE {name} USING {column}::{name}" for column in columns)
        )
