"""Searching flows: by whatever is given, newest first, a page at a time, and never by reading all there are."""

from __future__ import annotations

import asyncio
import itertools
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from celery import Celery

from celery_flows import Flows, InvalidData
from celery_flows.store import Flow, FlowStatus, SqlFlowStore
from celery_flows.store import operations as op

NOON = datetime(2026, 5, 1, 12, tzinfo=UTC)
OWNERS, NAMES = ("tenant:a", "tenant:b"), ("orders/fulfil", "orders/import")
STATUSES = (FlowStatus.CREATED, FlowStatus.FINISHED, FlowStatus.FAILED)


@pytest.fixture
def flows(store: SqlFlowStore) -> Flows:
    """An application's flows over each database."""
    return Flows(Celery("search", broker="memory://", set_as_current=False), store=store)


@pytest.fixture
def made(store: SqlFlowStore) -> list[Flow]:
    """Flows of every kind, some of them created at the same time; newest first."""
    inserted = [
        Flow(
            controller_id=name, owner_session_key=owner, status=status, created_at=at, updated_at=at,
            idempotency_key=f"key {number}" if number % 2 else None,
        )
        for number, (name, owner, status) in enumerate(itertools.product(NAMES, OWNERS, STATUSES))
        for at in [NOON + timedelta(minutes=number // 2)]
    ]  # fmt: skip
    for flow in inserted:
        store.insert(flow)
    return sorted(inserted, key=lambda flow: (flow.created_at, flow.id), reverse=True)


def test_what_is_given_is_what_the_flows_fit(flows: Flows, made: list[Flow]) -> None:
    owners, statuses, names = (None, *OWNERS, "nobody"), (None, *STATUSES), (None, *NAMES)
    times = (None, NOON + timedelta(minutes=2))
    for owner, status, name, since, until in itertools.product(owners, statuses, names, times, times):
        wanted = [
            flow.id
            for flow in made
            if owner in (None, flow.owner_session_key)
            and status in (None, flow.status)
            and name in (None, flow.controller_id)
            and (since is None or flow.created_at >= since)
            and (until is None or flow.created_at < until)
        ]
        found = flows.search(owner=owner, status=status, definition=name, created_after=since, created_before=until)
        assert [flow.id for flow in found] == wanted


def test_a_key_is_found_with_and_without_its_definition(flows: Flows, store: SqlFlowStore, made: list[Flow]) -> None:
    other = Flow(controller_id="other", owner_session_key="me", idempotency_key="key 1", created_at=NOON)
    store.insert(other)
    (wanted,) = (flow for flow in made if flow.idempotency_key == "key 1")
    assert {flow.id for flow in flows.search(key="key 1")} == {wanted.id, other.id}
    assert flows.search(key="key 1", definition="other") == [other]
    assert flows.search(key="key 0") == []


@pytest.mark.parametrize("size", [1, 3, 100])
def test_pages_follow_each_other_without_gap_or_repetition(flows: Flows, made: list[Flow], size: int) -> None:
    for given in ({}, {"owner": "tenant:a"}, {"status": "finished"}, {"definition": "orders/import"}):
        seen: list[Flow] = []
        while page := flows.search(limit=size, after=seen[-1] if seen else None, **given):  # type: ignore[arg-type]
            assert len(page) <= size
            seen += page
        assert seen == flows.search(**given)  # type: ignore[arg-type]


def test_the_same_from_asyncio(flows: Flows, made: list[Flow]) -> None:
    given: dict[str, Any] = {"owner": "tenant:a", "status": "failed", "limit": 1}
    assert asyncio.run(flows.asearch(**given)) == flows.search(**given)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"status": "done"}, "status: must be one of created, running, "),
        ({"created_after": datetime(2026, 5, 1)}, "created_after: "),  # noqa: DTZ001
        ({"created_before": datetime(2026, 5, 1)}, "created_before: "),  # noqa: DTZ001
        ({"limit": 0}, "limit: must be a whole number from 1"),
        ({"limit": True}, "limit: must be a whole number from 1"),
    ],
)
def test_what_cannot_be_meant_is_refused(flows: Flows, given: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidData, match=told):
        flows.search(**given)


SEARCHES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "owner": {"owner": "tenant:a"},
    "status": {"status": FlowStatus.WAITING},
    "definition": {"definition": "orders/fulfil"},
    "time": {"created_after": NOON, "created_before": NOON + timedelta(days=1)},
}


@pytest.mark.parametrize("further", [False, True])
@pytest.mark.parametrize("given", list(SEARCHES))
def test_an_index_gives_the_order_so_that_a_page_costs_a_page(
    store: SqlFlowStore, made: list[Flow], given: str, further: bool
) -> None:
    """Whatever the planner would prefer over a dozen rows: that there is such an index."""
    plan = _plan(store, **SEARCHES[given], after=made[0] if further else None)
    assert "Sort" not in plan
    assert "TEMP B-TREE" not in plan
    assert "created_at_id" in plan


def test_an_index_finds_a_key(store: SqlFlowStore, made: list[Flow]) -> None:
    assert "ix_flows_idempotency_key" in _plan(store, key="key 1")


def _plan(store: SqlFlowStore, **given: Any) -> str:
    """How the database would go about this search if nothing kept it from using an index."""
    with store.engine.begin() as connection:
        on_postgresql = connection.dialect.name == "postgresql"
        if on_postgresql:
            for name in ("seqscan", "bitmapscan", *(() if "key" in given else ("sort",))):
                connection.exec_driver_sql(f"SET LOCAL enable_{name} = off")
        explain = "EXPLAIN" if on_postgresql else "EXPLAIN QUERY PLAN"
        plans: list[str] = []

        def explained(statement: Any, parameters: Any) -> None:
            rows = connection.exec_driver_sql(f"{explain} {statement}", parameters)
            plans.append("\n".join(str(row[-1]) for row in rows))

        def listen(_conn: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
            if statement.startswith("SELECT"):
                explained(statement, parameters)

        sa.event.listen(connection, "before_cursor_execute", listen)
        op.search_flows(connection, **given)
    (plan,) = plans
    return plan
