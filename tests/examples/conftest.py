"""What the examples' tests share: the database that their flows are in."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from celery_flows import SqlFlowStore
from celery_flows.store import audit
from celery_flows.store.engines import make_engine


@pytest.fixture
def flow_store_url(database_url: str) -> Iterator[str]:
    """Over each database. Whatever became of them, the events of every flow give its rows back."""
    yield database_url
    store = SqlFlowStore(make_engine(database_url))
    assert [str(finding) for finding in audit.verify(store)] == []
    store.close()
