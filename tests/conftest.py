"""Fixtures that every layer of tests shares: databases, and a store over them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from celery_flows.store import SqlFlowStore
from celery_flows.store.engines import make_engine
from tests.support.databases import Databases, NoServer, choose_server


def _chosen() -> str:
    try:
        return f"PostgreSQL: {choose_server()}"
    except NoServer as none:
        return f"PostgreSQL: none. {none}"


def pytest_report_header() -> str:
    """Names the PostgreSQL server the tests run against, password masked."""
    return _chosen()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Names it at the end instead where ``-q`` leaves the header out."""
    if terminalreporter.verbosity < 0:
        terminalreporter.line(_chosen())


@pytest.fixture(scope="session")
def databases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Databases]:
    """Makes databases; what a test left behind is dropped at the end of the run."""
    made = Databases(tmp_path_factory.mktemp("databases"))
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def postgresql_url(databases: Databases) -> Iterator[str]:
    """A fresh, migrated PostgreSQL database. No server to be found is a failure, never a skip."""
    with databases.postgresql() as url:
        yield url


@pytest.fixture
def sqlite_url(databases: Databases, tmp_path: Path) -> Iterator[str]:
    """A fresh, migrated SQLite database in a file."""
    with databases.sqlite(tmp_path / "flows.sqlite") as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str:
    """A fresh, migrated database of each kind: the test runs once over each."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.fixture
def store(database_url: str) -> Iterator[SqlFlowStore]:
    """A store over ``database_url``."""
    opened = SqlFlowStore(make_engine(database_url))
    try:
        yield opened
    finally:
        opened.close()
