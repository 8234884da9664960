"""The reply to a commit is lost: success is recognised by reading again, and nothing is written twice.

A proxy stands before PostgreSQL and keeps one answer, or one request, to itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from celery_flows.store import DuplicateFlow, Flow, FlowStepStatus, RevisionMismatch, SqlFlowStore, transitions
from celery_flows.store.engines import make_engine
from tests.support.fold import assert_whole
from tests.support.proxy import COMMIT, Proxy
from tests.support.samples import NAMES, a_flow, a_step
from tests.support.shells import SHELLS, Shell


@pytest.fixture
def proxy(postgresql_url: str) -> Iterator[Proxy]:
    with Proxy(postgresql_url) as opened:
        yield opened


@pytest.fixture(params=["sync", "async"])
def far(request: pytest.FixtureRequest, proxy: Proxy) -> Iterator[Shell]:
    """Store and manager behind the proxy."""
    with SHELLS[request.param](proxy.url) as opened:
        yield opened


@pytest.fixture
def near(postgresql_url: str) -> Iterator[SqlFlowStore]:
    """The same database, directly."""
    store = SqlFlowStore(make_engine(postgresql_url))
    yield store
    store.close()


Write = Callable[[Shell, Flow], Any]


def observe(shell: Shell, flow: Flow) -> object:
    seen: dict[str, Any] = {"flow_id": flow.id, "run_id": "r", "task": "t"}
    return shell.manager.record_step_observation(**seen, status=FlowStepStatus.RUNNING)


def locked(shell: Shell, flow: Flow) -> object:
    """What the manager's last try does: under the row's lock."""
    return shell.store.update_locked(flow.id, lambda read: transitions.update_state(read, {"n": 1}))


# What is written, the statement that commits it, and the kinds that the flow's history has besides.
WRITES: dict[str, tuple[Write, str, list[str]]] = {
    "update_state": (lambda s, f: s.manager.update_state(f.id, {"n": 1}), "UPDATE flows", ["state_updated"]),
    "start_running": (lambda s, f: s.manager.start_running(f.id), "UPDATE flows", ["started"]),
    "cancel": (lambda s, f: s.manager.cancel(f.id), "UPDATE flows", ["cancelled"]),
    "update_and_append": (lambda s, f: s.store.update_and_append(f, "noted", {"set": {}}), "UPDATE flows", ["noted"]),
    "locked": (locked, COMMIT, ["state_updated"]),
    "observe": (observe, "INSERT INTO flow_steps", ["step_observed"]),
    "append_event": (lambda s, f: s.store.append_event(f.id, "noted", {}), COMMIT, ["noted"]),
}
EACH = pytest.mark.parametrize("name", WRITES)


@EACH
def test_a_lost_reply_is_recognised_as_success(name: str, far: Shell, proxy: Proxy, near: SqlFlowStore) -> None:
    write, statement, kinds = WRITES[name]
    flow = far.manager.create_managed(**NAMES)
    proxy.lose_reply(statement)
    write(far, flow)
    assert proxy.struck == 1
    assert [event.kind for event in assert_whole(near, flow.id)] == ["created", *kinds]


@EACH
def test_a_request_that_never_arrived_is_sent_again(name: str, far: Shell, proxy: Proxy, near: SqlFlowStore) -> None:
    write, statement, kinds = WRITES[name]
    flow = far.manager.create_managed(**NAMES)
    proxy.lose_request(statement)
    write(far, flow)
    assert proxy.struck == 1
    assert [event.kind for event in assert_whole(near, flow.id)] == ["created", *kinds]


@pytest.mark.parametrize("lose", ["lose_reply", "lose_request"])
def test_a_flow_is_created_once(lose: str, far: Shell, proxy: Proxy, near: SqlFlowStore) -> None:
    getattr(proxy, lose)("INSERT INTO flows")
    flow = far.manager.create_managed(**NAMES, idempotency_key="k")
    assert proxy.struck == 1
    assert near.list_by_owner(flow.owner_session_key) == [flow]
    assert [event.kind for event in assert_whole(near, flow.id)] == ["created"]


@pytest.mark.parametrize("lose", ["lose_reply", "lose_request"])
def test_bare_inserts_and_updates_are_no_duplicates_of_themselves(
    lose: str, far: Shell, proxy: Proxy, near: SqlFlowStore
) -> None:
    getattr(proxy, lose)(COMMIT)
    far.store.insert(flow := a_flow())
    assert (proxy.struck, near.get(flow.id)) == (1, flow)
    getattr(proxy, lose)(COMMIT)
    far.store.insert_step(step := a_step(flow.id))
    assert (proxy.struck, near.get_step(step.id)) == (2, step)
    getattr(proxy, lose)("UPDATE flows")
    stored = far.store.update_with_revision(flow.but(goal="g"))
    assert (proxy.struck, near.get(flow.id), stored.revision) == (3, stored, 2)


def test_what_was_refused_stays_refused_when_the_reply_is_lost(far: Shell, proxy: Proxy, near: SqlFlowStore) -> None:
    """Somebody else's write must not be taken for one's own."""
    flow = far.manager.create_managed(**NAMES, idempotency_key="k")
    moved = near.update_with_revision(flow)
    proxy.lose_reply("UPDATE flows")
    with pytest.raises(RevisionMismatch):
        far.store.update_and_append(flow, "noted", {})
    proxy.lose_reply("INSERT INTO flows")
    with pytest.raises(DuplicateFlow):
        far.manager.create_managed(**NAMES, idempotency_key="k")
    assert proxy.struck == 2
    assert near.get(flow.id) == moved
    assert [event.kind for event in near.list_events(flow.id)] == ["created"]
