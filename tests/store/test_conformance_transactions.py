"""Inside a caller's transaction, over each database, synchronous and awaited: it is that transaction that commits."""

from __future__ import annotations

import pytest

from celery_flows.store import DuplicateFlow, DuplicateStep, FlowStatus, FlowStepStatus, RevisionMismatch
from tests.support.fold import assert_whole
from tests.support.samples import NAMES, a_flow, a_step
from tests.support.shells import Bound, Shell

EACH = pytest.mark.parametrize("kind", ["connection", "session"])


def write_everything(caller: Bound, flow_id: object) -> None:
    """One of each: a new flow, two transitions, an observation, a bare event."""
    flow = caller.manager.create_managed(**NAMES, id=flow_id)
    caller.manager.start_running(flow.id)
    caller.manager.update_state(flow.id, {"n": 1})
    caller.manager.record_step_observation(flow_id=flow.id, run_id="r", task="t", status=FlowStepStatus.RUNNING)
    caller.store.append_event(flow.id, "noted", {})


@EACH
def test_a_rollback_leaves_nothing(shell: Shell, kind: str) -> None:
    flow = a_flow()
    with shell.within(kind) as caller:
        assert caller.store.in_transaction
        write_everything(caller, flow.id)
        assert caller.manager.get(flow.id).state_json == {"n": 1}
        caller.rollback()
    assert shell.store.get(flow.id) is None
    assert shell.store.list_events(flow.id) == []
    assert shell.store.list_steps(flow.id) == []


@EACH
def test_a_commit_leaves_rows_and_events(shell: Shell, kind: str) -> None:
    flow = a_flow()
    with shell.within(kind) as caller:
        write_everything(caller, flow.id)
        caller.commit()
    kinds = [event.kind for event in assert_whole(shell.store, flow.id)]
    assert kinds == ["created", "started", "state_updated", "step_observed", "noted"]
    assert not shell.store.in_transaction


@EACH
def test_nobody_else_sees_it_before_the_commit(shell: Shell, kind: str) -> None:
    flow = shell.manager.create_managed(**NAMES)
    with shell.within(kind) as caller:
        caller.manager.start_running(flow.id)
        assert shell.manager.get(flow.id) == flow
        caller.commit()
    assert shell.manager.get(flow.id).status is FlowStatus.RUNNING


@EACH
def test_a_transition_that_is_rolled_back_leaves_row_and_history(shell: Shell, kind: str) -> None:
    flow = shell.manager.create_managed(**NAMES)
    with shell.within(kind) as caller:
        caller.manager.cancel(flow.id)
        caller.rollback()
    assert shell.manager.get(flow.id) == flow
    assert [event.kind for event in assert_whole(shell.store, flow.id)] == ["created"]


@EACH
def test_a_refusal_leaves_the_callers_transaction_usable(shell: Shell, kind: str) -> None:
    shell.store.insert(flow := a_flow(idempotency_key="k"))
    shell.store.insert_step(step := a_step(flow.id))
    stored = shell.store.update_with_revision(flow)
    with shell.within(kind) as caller:
        with pytest.raises(DuplicateFlow):
            caller.store.insert(flow)
        with pytest.raises(DuplicateFlow):
            caller.manager.create_managed(**NAMES, idempotency_key="k")
        with pytest.raises(DuplicateStep):
            caller.store.insert_step(step)
        with pytest.raises(RevisionMismatch):
            caller.store.update_and_append(flow, "noted", {})
        caller.store.append_event(flow.id, "noted", {})
        caller.commit()
    assert shell.store.get(flow.id) == stored
    assert [event.kind for event in shell.store.list_events(flow.id)] == ["noted"]
