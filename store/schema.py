"""The schema's version: applied by Alembic, checked by everybody who opens a store."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from celery_flows.store import script, sqlite
from celery_flows.store.errors import SchemaOutdated
from celery_flows.store.operations import reads

VERSION_TABLE = "flow_schema_version"
ADVISORY_LOCK = 0x666C_6F77  # "flow": two processes that migrate at once take turns

_SCRIPTS = Path(__file__).parent / "migrations"


@cache
def head() -> str:
    """The version this package needs."""
    found = ScriptDirectory(str(_SCRIPTS)).get_current_head()
    assert found is not None
    return found


@reads
def check(conn: Connection) -> None:
    """Says nothing if the tables are there and of this version.

    Raises:
        SchemaOutdated: naming the command that mends it.
    """
    found = current(conn)
    if found != head():
        raise SchemaOutdated(found, head())


@reads
def current(conn: Connection) -> str | None:
    """The version the database is at; None: it has no tables of ours."""
    if not sa.inspect(conn).has_table(VERSION_TABLE):
        return None
    found: str | None = conn.scalar(sa.select(sa.column("version_num")).select_from(sa.table(VERSION_TABLE)))
    return found


def upgrade(engine: sa.Engine, revision: str = "head") -> None:
    """Brings the schema up to ``revision``, in one transaction; whoever comes second waits and finds it done.

    Raises:
        StoreError: the database refused or cannot be reached; it is as it was.
    """
    _migrate(engine, revision, command.upgrade)


def downgrade(engine: sa.Engine, revision: str) -> None:
    """Takes the schema down to ``revision`` ("base": no tables), in one transaction. What the tables held is lost."""
    _migrate(engine, revision, command.downgrade)


def _migrate(engine: sa.Engine, revision: str, step: Callable[[Config, str], None]) -> None:
    config = Config()
    config.set_main_option("script_location", str(_SCRIPTS).replace("%", "%%"))
    try:
        with _writing(engine).begin() as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(ADVISORY_LOCK)))
            config.attributes["connection"] = connection
            step(config, revision)
    except DBAPIError as error:
        raise script.translated(error) from error


def _writing(engine: sa.Engine) -> sa.Engine:
    if engine.dialect.name == "sqlite":
        return sqlite.writing(engine, single=False)
    return engine


def at(engine: sa.Engine) -> str | None:
    """The version the database is at; None: no tables of ours.

    Raises:
        StoreError: the database refused or cannot be reached.
    """
    try:
        with engine.connect() as connection:
            return current(connection)
    except DBAPIError as error:
        raise script.translated(error) from error
