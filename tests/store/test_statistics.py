"""How much there is: exact up to a bound, and never by a walk through a table."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from celery_flows import FlowManager, FlowStatus, SqlFlowStore
from celery_flows.store import Flow, statistics
from celery_flows.store import operations as op
from celery_flows.store.changes import Drive
from celery_flows.store.engines import make_engine
from celery_flows.store.statistics import Count
from tests.support.databases import Databases


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, databases: Databases, tmp_path: Path) -> Iterator[SqlFlowStore]:
    made = databases.sqlite(tmp_path / "flows.db") if request.param == "sqlite" else databases.postgresql()
    with made as url:
        opened = SqlFlowStore(make_engine(url))
        yield opened
        opened.close()


def test_everything_is_counted(store: SqlFlowStore) -> None:
    manager = FlowManager(store)
    flows = [manager.create_managed(controller_id="a", owner_session_key="ada") for _ in range(3)]
    manager.start_running(flows[0].id)
    manager.finish(flows[0].id)
    manager.cancel(flows[1].id)
    driven = Flow(controller_id="b", owner_session_key="ada")
    assert store.run(op.create_flow, driven, {}, Drive("b"))

    taken = store.run(statistics.take, 300.0)

    assert {status: count.number for status, count in taken.flows.items() if count.number} == {
        FlowStatus.CREATED: 2, FlowStatus.FINISHED: 1, FlowStatus.CANCELLED: 1
    }  # fmt: skip
    assert taken.last_hour == taken.flows
    assert taken.recent.flows == 4
    assert taken.recent.definitions["b"] == {FlowStatus.CREATED: 1}
    assert taken.work.published == Count(1)
    assert taken.work.leases == Count(0)


def test_nothing_is_counted_in_an_empty_database(store: SqlFlowStore) -> None:
    taken = store.run(statistics.take, 300.0)

    assert {count.number for count in taken.flows.values()} == {0}
    assert (taken.recent.flows, taken.recent.since, taken.work.due.since, taken.inbox.since) == (0, None, None, None)


def test_beyond_the_bound_a_number_says_that_it_is_not_exact(
    store: SqlFlowStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "BOUND", 3)
    manager = FlowManager(store)
    for _ in range(5):
        manager.create_managed(controller_id="a", owner_session_key="ada")

    unknown = store.run(statistics.count_flows)
    with store.engine.begin() as connection:
        connection.execute(sa.text("ANALYZE"))
    known = store.run(statistics.count_flows)

    is_postgresql = store.engine.dialect.name == "postgresql"
    assert unknown.precision in (("estimate", "at least") if is_postgresql else ("at least",))
    assert known == (Count(5, "estimate") if is_postgresql else Count(3, "at least"))
    assert store.run(statistics.take, 300.0).recent.flows == 3
