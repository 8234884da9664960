"""Fixtures for the tests of the engine, in this process and over each database."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any

import pytest

from celery_flows.store.engines import make_engine
from celery_flows.tasks.testing.databases import wipe
from tests.support.bench import Bench
from tests.support.databases import Databases

MakeBench = Callable[..., Bench]


@pytest.fixture(scope="session", params=["sqlite", "postgresql"])
def engine_database(
    request: pytest.FixtureRequest, databases: Databases, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """A database of each kind that the tests of the engine use in turn."""
    path = tmp_path_factory.mktemp("engine") / "flows.sqlite"
    made = databases.sqlite(path) if request.param == "sqlite" else databases.postgresql()
    with made as url:
        yield url


@pytest.fixture
def make_bench(engine_database: str) -> Iterator[MakeBench]:
    """Opens benches over one empty database, as many as it takes processes. Afterwards every history must be whole."""
    with ExitStack() as opened:
        engine = make_engine(engine_database)
        with engine.begin() as connection:
            wipe(connection)
        engine.dispose()

        def open_bench(**options: Any) -> Bench:
            return opened.enter_context(closing(Bench(engine_database, **options)))

        yield open_bench
        open_bench().audit()


@pytest.fixture
def bench(make_bench: MakeBench) -> Bench:
    """Flows over each database."""
    return make_bench()
