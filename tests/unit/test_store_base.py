"""What the base class provides to a store of somebody's own, and what it says about it."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import pytest

from celery_flows.store import (
    AsyncFlowStore,
    FlowManager,
    FlowNotFound,
    FlowStatus,
    FlowStepStatus,
    FlowStore,
    RevisionMismatch,
    SqlFlowStore,
)
from tests.support.memory import MemoryFlowStore
from tests.support.samples import NAMES, a_flow

REQUIRED = {
    "insert", "get", "list_by_owner", "list_by_status", "update_with_revision", "append_event", "list_events",
    "insert_step", "update_step", "get_step", "list_steps", "find_step_by_run_id",
}  # fmt: skip


def test_twelve_methods_are_required_and_two_provided() -> None:
    assert FlowStore.__abstractmethods__ == REQUIRED
    assert {"update_and_append", "prune_terminal_flows"} <= vars(FlowStore).keys()


@pytest.mark.parametrize("name", [*sorted(REQUIRED), "update_and_append", "prune_terminal_flows"])
def test_the_async_store_has_the_same_methods_awaited(name: str) -> None:
    method = getattr(AsyncFlowStore, name)
    assert inspect.iscoroutinefunction(method)
    mine, theirs = inspect.signature(getattr(SqlFlowStore, name)), inspect.signature(method)
    assert list(mine.parameters.values()) == list(theirs.parameters.values())
    assert list(inspect.signature(getattr(FlowStore, name)).parameters) == list(mine.parameters)


def test_update_and_append_works_and_warns_that_it_is_not_atomic(caplog: pytest.LogCaptureFixture) -> None:
    store, flow = MemoryFlowStore(), a_flow()
    store.insert(flow)
    with caplog.at_level(logging.WARNING, "celery_flows.store"):
        stored, event = store.update_and_append(flow.but(goal="g"), "renamed", {"to": "g"})
    assert (stored.goal, stored.revision, event.kind) == ("g", 2, "renamed")
    assert "MemoryFlowStore.update_and_append is not atomic" in caplog.text


def test_a_refused_update_appends_nothing() -> None:
    store, flow = MemoryFlowStore(), a_flow()
    with pytest.raises(FlowNotFound):
        store.update_and_append(flow, "renamed", {})
    store.insert(flow.but(revision=2))
    with pytest.raises(RevisionMismatch):
        store.update_and_append(flow, "renamed", {})
    assert store.events == []


def test_prune_says_that_it_must_be_overridden() -> None:
    with pytest.raises(NotImplementedError, match="MemoryFlowStore does not prune"):
        MemoryFlowStore().prune_terminal_flows(30)


def test_the_manager_works_over_a_store_of_ones_own() -> None:
    store = MemoryFlowStore()
    for tries in (8, 1):
        manager = FlowManager(store, tries=tries)
        flow = manager.create_managed(**NAMES)
        manager.start_running(flow.id)
        seen: dict[str, Any] = {"flow_id": flow.id, "run_id": "r", "task": "t"}
        manager.record_step_observation(**seen, status=FlowStepStatus.RUNNING, child_session_key="c")
        done = manager.record_step_observation(**seen, status=FlowStepStatus.SUCCEEDED, result_json=1)
        assert manager.record_step_observation(**seen, status=FlowStepStatus.FAILED) == done
        assert (done.child_session_key, done.result_json) == ("c", 1)
        assert manager.request_cancel(flow.id) == manager.request_cancel(flow.id)
        assert manager.cancel(flow.id).status is FlowStatus.CANCELLED
        kinds = [event.kind for event in manager.list_events(flow.id)][::-1]
        assert kinds == ["created", "started", "cancel_requested", "cancelled"]
