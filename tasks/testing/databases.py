"""Databases for tests: a new SQLite file for each test, or one that is given, emptied."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from celery_flows.store import InvalidData, health, schema
from celery_flows.store.engines import make_engine, parse_url
from celery_flows.store.tables import flow_dispatch, flow_heartbeats, flow_inbox, flow_limits, flows

MARK = "tests"  # the heartbeat that says that the database is the test kit's to empty


def migrate(url: str | sa.URL) -> None:
    """Makes our tables there, or brings them up to date."""
    engine = make_engine(url)
    try:
        if schema.at(engine) != schema.head():
            schema.upgrade(engine)
    finally:
        engine.dispose()


def copy_template(template: Path, path: Path) -> str:
    """The URL of a new, migrated SQLite database: a copy of ``template``, which is made if it is not there."""
    if not template.exists():
        migrate(f"sqlite:///{template}")
    shutil.copyfile(template, path)
    return f"sqlite:///{path}"


def wipe(connection: sa.Connection) -> None:
    """Empties our tables."""
    for table in (
        flow_inbox,
        flow_dispatch,
        flow_heartbeats,
        flow_limits,
        flows,
    ):  # steps and events go with their flows
        connection.execute(sa.delete(table))


def open_for_tests(url: str | sa.URL) -> sa.Engine:
    """An engine for a database that is given over to tests: migrated, and emptied of flows.

    Raises:
        InvalidData: it holds flows that are no test's.
        StoreError: it cannot be reached.
    """
    migrate(url)
    engine = make_engine(url)
    if parse_url(url).get_backend_name() == "sqlite":
        sa.event.listen(engine, "connect", _no_sync)
    try:
        with engine.begin() as connection:
            _take_over(connection)
    except BaseException:
        engine.dispose()
        raise
    return engine


def _take_over(connection: sa.Connection) -> None:
    ours = connection.scalar(sa.select(flow_heartbeats.c.name).where(flow_heartbeats.c.name == MARK)) is not None
    if not ours and connection.scalar(sa.select(flows.c.id).limit(1)) is not None:
        raise InvalidData(
            "flow_store_url",
            "names a database with flows in it, and each test empties it: give the tests a database of their own",
        )
    wipe(connection)
    health.record_heartbeat(connection, MARK, 0.0, {})


def _no_sync(connection: Any, _record: Any) -> None:
    connection.execute("PRAGMA synchronous=OFF")  # nobody cuts the power of a test
