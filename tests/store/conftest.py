"""Fixtures for the tests of the store."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from celery_flows.store import Flow, FlowManager, SqlFlowStore

from tests.support.shells import SHELLS, Shell


@pytest.fixture(params=list(SHELLS))
def shell(request: pytest.FixtureRequest, database_url: str) -> Iterator[Shell]:
    """Store and manager, synchronous and awaited, over each database."""
    with SHELLS[request.param](database_url) as opened:
        yield opened


@pytest.fixture
def manager(store: SqlFlowStore) -> FlowManager:
    """The manager over ``store``."""
    return FlowManager(store)


@pytest.fixture
def flow(manager: FlowManager) -> Flow:
    """A running flow."""
    created = manager.create_managed(controller_id="orders/fulfil", owner_session_key="tenant:acme")
    return manager.start_running(created.id)
