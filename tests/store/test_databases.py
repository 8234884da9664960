"""The databases of the tests themselves: fresh, apart from each other, gone afterwards; none is a failure."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.pool import NullPool

from celery_flows.store import FlowManager, SqlFlowStore
from celery_flows.store.engines import make_engine
from tests.support.databases import VARIABLE, Databases, NoServer, choose_server
from tests.support.samples import NAMES


def names() -> set[str]:
    """The databases of the server."""
    engine = sa.create_engine(choose_server().url, poolclass=NullPool)
    with engine.connect() as connection:
        return set(connection.execute(sa.text("SELECT datname FROM pg_database")).scalars())


def test_a_database_is_fresh_and_gone_after_its_test_even_if_that_failed(tmp_path: Path) -> None:
    databases = Databases(tmp_path)
    with (  # noqa: PT012 (the whole block is what fails)
        pytest.raises(ZeroDivisionError),
        databases.postgresql() as first,
        databases.postgresql() as second,
    ):
        store = SqlFlowStore(make_engine(first))
        flow = FlowManager(store).create_managed(**NAMES)
        other = SqlFlowStore(make_engine(second))
        assert other.get(flow.id) is None
        other.close()
        mine = {sa.make_url(url).database for url in (first, second)}
        assert mine <= names()
        raise ZeroDivisionError  # the store's connections are still open
    store.close()
    assert not mine & names()
    databases.close()


def test_a_database_used_before_is_empty_again(databases: Databases) -> None:
    with databases.used_before() as url:
        store = SqlFlowStore(make_engine(url))
        flow = FlowManager(store).create_managed(**NAMES)
        open_transaction = store.engine.connect()
        FlowManager(store.using(open_transaction)).cancel(flow.id)
    open_transaction.invalidate()
    store.close()
    with databases.used_before() as again:
        store = SqlFlowStore(make_engine(again))
        assert again == url
        assert store.get(flow.id) is None
        store.close()


def test_closing_drops_everything_of_this_run_and_nothing_else(tmp_path: Path) -> None:
    databases = Databases(tmp_path)
    with databases.used_before():
        pass
    mine = {name for name in names() if name.startswith(databases.run)}
    assert len(mine) == 2, "the template and one database"
    databases.close()
    assert not mine & names()


def test_a_server_that_is_named_but_does_not_answer_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "postgresql://somebody:secret@127.0.0.1:1/none")
    with pytest.raises(NoServer) as caught:
        choose_server.__wrapped__()
    assert "127.0.0.1:1" in str(caught.value)
    assert "secret" not in str(caught.value)
