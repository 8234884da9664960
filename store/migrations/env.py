"""How Alembic runs our migrations: on the connection, and in the transaction, that ``schema.py`` hands over."""

from alembic import context

from celery_flows.store.schema import VERSION_TABLE
from celery_flows.store.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table=VERSION_TABLE,
    render_as_batch=True,  # SQLite changes a table by making it anew
)
context.run_migrations()
