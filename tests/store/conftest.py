"""Fixtures for the tests of the store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from celery_flows.store import Flow, FlowManager, SqlFlowStore
from tests.support.databases import Databases
from tests.support.driving import Driving
from tests.support.shells import SHELLS, Shell


@pytest.fixture
def postgresql_url(databases: Databases) -> Iterator[str]:
    """A migrated, empty PostgreSQL database; there are many tests here, so they use it in turn."""
    with databases.used_before() as url:
        yield url


@pytest.fixture(scope="session", params=["sqlite", "postgresql"])
def shared_url(
    request: pytest.FixtureRequest, databases: Databases, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """A database of each kind that many tests use in turn."""
    path = tmp_path_factory.mktemp("shared") / "flows.sqlite"
    made = databases.sqlite(path) if request.param == "sqlite" else databases.used_before()
    with made as url:
        yield url


@pytest.fixture(scope="session", params=list(SHELLS))
def open_shell(request: pytest.FixtureRequest, shared_url: str) -> Iterator[Shell]:
    with SHELLS[request.param](shared_url) as opened:
        yield opened


@pytest.fixture
def shell(open_shell: Shell) -> Shell:
    """Store and manager, synchronous and awaited, over each database. The suite is long, so its tests share four
    shells; each finds the tables empty."""
    with open_shell.within("connection") as caller:
        caller.wipe()
        caller.commit()
    return open_shell


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_url(request: pytest.FixtureRequest, databases: Databases, tmp_path: Path) -> Iterator[str]:
    """A fresh database of each kind, without our tables."""
    path = tmp_path / "empty.sqlite"
    made = databases.sqlite(path, empty=True) if request.param == "sqlite" else databases.postgresql(empty=True)
    with made as url:
        yield url


@pytest.fixture
def manager(store: SqlFlowStore) -> FlowManager:
    """The manager over ``store``."""
    return FlowManager(store)


@pytest.fixture
def flow(manager: FlowManager) -> Flow:
    """A running flow."""
    created = manager.create_managed(controller_id="orders/fulfil", owner_session_key="tenant:acme")
    return manager.start_running(created.id)


@pytest.fixture
def driving(store: SqlFlowStore) -> Driving:
    """What a driver and its workers do, over ``store``."""
    return Driving(store)
