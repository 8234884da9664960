"""A user's shell, and what is behind it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from celery_flows import SqlFlowStore
from celery_flows.store.engines import make_engine
from celery_flows.worker.embedded import Processes, start_broker
from tests.integration.cli.shop import write_modules
from tests.support.commandline import CELERY, Project
from tests.support.databases import Databases
from tests.support.warm import WarmCelery


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder."""
    return write_modules(tmp_path_factory.mktemp("shop"))


@pytest.fixture(scope="module")
def warm() -> Iterator[WarmCelery]:
    """Runs commands without importing everything each time."""
    with WarmCelery() as running:
        yield running


@pytest.fixture
def project(warm: WarmCelery, folder: Path, sqlite_url: str) -> Project:
    """A user's shell in it, with a fresh database and a broker that nobody listens to."""
    return Project(folder, {"FLOW_STORE_URL": sqlite_url, "CELERY_BROKER_URL": "memory://"}, warm)


@pytest.fixture
def store(sqlite_url: str) -> Iterator[SqlFlowStore]:
    """The same database, from here."""
    opened = SqlFlowStore(make_engine(sqlite_url))
    try:
        yield opened
    finally:
        opened.close()


@pytest.fixture(scope="module")
def served(
    warm: WarmCelery, folder: Path, databases: Databases, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Project]:
    """A shell with a database, a broker and a worker."""
    place = tmp_path_factory.mktemp("served")
    with databases.sqlite(place / "flows.db") as url, Processes(place) as processes:
        project = Project(folder, {"FLOW_STORE_URL": url, "CELERY_BROKER_URL": start_broker(processes)}, warm)
        worker = (*CELERY, "-A", "shop", "worker", "-c", "1", "-l", "info")
        with project.started(*worker, log=place / "worker.log") as running:
            running.wait_for(" ready.")
            yield project
