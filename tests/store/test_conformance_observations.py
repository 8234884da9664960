"""Observed steps, over each database, synchronous and awaited: one row a run id, and a late word changes nothing."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import pytest

from celery_flows.store import AlreadyTerminal, Flow, FlowNotFound, FlowStepStatus, InvalidData, StepRuntime
from tests.support.fold import assert_whole
from tests.support.samples import NAMES, UNSTORABLE
from tests.support.shells import Shell

OPEN = [FlowStepStatus.PENDING, FlowStepStatus.RUNNING]
CLOSED = [FlowStepStatus.SUCCEEDED, FlowStepStatus.FAILED, FlowStepStatus.CANCELLED]


def mirrored(shell: Shell) -> tuple[Flow, dict[str, Any]]:
    """A mirrored flow, and what an observation of its one step says besides the status."""
    flow = shell.manager.create_mirrored(**NAMES)
    return flow, {"flow_id": flow.id, "run_id": "r", "task": "charge"}


def test_observations_bring_one_step_forward(shell: Shell) -> None:
    flow, seen = mirrored(shell)
    first = shell.manager.record_step_observation(**seen, status=FlowStepStatus.PENDING, child_session_key="c")
    second = shell.manager.record_step_observation(**seen, status=FlowStepStatus.RUNNING)
    third = shell.manager.record_step_observation(**seen, status=FlowStepStatus.SUCCEEDED, result_json={"n": 1})
    assert [step.status for step in (first, second, third)] == [*OPEN, FlowStepStatus.SUCCEEDED]
    assert first.id == second.id == third.id
    assert third.created_at == first.created_at
    assert third.runtime is StepRuntime.MIRRORED
    assert third.result_json == {"n": 1}
    assert shell.manager.list_steps(flow.id) == [third]
    events = assert_whole(shell.store, flow.id)
    assert [event.kind for event in events] == ["created", *["step_observed"] * 3]
    assert shell.manager.get(flow.id) == flow


def test_a_missing_session_key_keeps_the_old_one(shell: Shell) -> None:
    _, seen = mirrored(shell)
    shell.manager.record_step_observation(**seen, status=FlowStepStatus.PENDING, child_session_key="c")
    assert shell.manager.record_step_observation(**seen, status=FlowStepStatus.RUNNING).child_session_key == "c"
    renamed = shell.manager.record_step_observation(**seen, status=FlowStepStatus.RUNNING, child_session_key="d")
    assert renamed.child_session_key == "d"


@pytest.mark.parametrize("late", [*OPEN, *CLOSED])
@pytest.mark.parametrize("closed", CLOSED)
def test_a_closed_step_is_never_overwritten(shell: Shell, closed: FlowStepStatus, late: FlowStepStatus) -> None:
    flow, seen = mirrored(shell)
    known = shell.manager.record_step_observation(**seen, status=closed, result_json=1)
    before = shell.store.list_events(flow.id)
    answer = shell.manager.record_step_observation(**seen, status=late, result_json=2, child_session_key="late")
    assert answer == known
    assert shell.manager.list_steps(flow.id) == [known]
    assert shell.store.list_events(flow.id) == before


def test_a_managed_step_is_not_touched_by_an_observation(shell: Shell) -> None:
    flow, seen = mirrored(shell)
    managed = shell.manager.record_step_observation(**seen, status=FlowStepStatus.RUNNING, runtime=StepRuntime.MANAGED)
    assert shell.manager.record_step_observation(**seen, status=FlowStepStatus.SUCCEEDED) == managed
    assert shell.manager.list_steps(flow.id) == [managed]


def test_the_same_run_id_in_two_flows_is_two_steps(shell: Shell) -> None:
    first, seen = mirrored(shell)
    second, other = mirrored(shell)
    shell.manager.record_step_observation(**seen, status=FlowStepStatus.RUNNING)
    shell.manager.record_step_observation(**other, status=FlowStepStatus.FAILED)
    assert [step.status for step in shell.manager.list_steps(first.id)] == [FlowStepStatus.RUNNING]
    assert [step.status for step in shell.manager.list_steps(second.id)] == [FlowStepStatus.FAILED]


def test_an_observation_never_makes_a_flow(shell: Shell) -> None:
    unknown: dict[str, Any] = {"flow_id": uuid4(), "run_id": "r", "task": "charge"}
    with pytest.raises(FlowNotFound):
        shell.manager.record_step_observation(**unknown, status=FlowStepStatus.RUNNING)
    assert shell.store.get(unknown["flow_id"]) is None


def test_a_flow_that_has_ended_gets_no_open_step(shell: Shell) -> None:
    flow, seen = mirrored(shell)
    shell.manager.record_step_observation(**seen, status=FlowStepStatus.RUNNING)
    shell.manager.finish(flow.id)
    (closed,) = shell.manager.list_steps(flow.id)
    assert closed.status is FlowStepStatus.CANCELLED
    late = {**seen, "run_id": "late"}
    for status in OPEN:
        with pytest.raises(AlreadyTerminal):
            shell.manager.record_step_observation(**late, status=status)
        assert shell.manager.record_step_observation(**seen, status=status) == closed
    assert shell.manager.list_steps(flow.id) == [closed]
    shell.manager.record_step_observation(**late, status=FlowStepStatus.SUCCEEDED)
    assert_whole(shell.store, flow.id)


def test_another_owners_flow_is_not_observed(shell: Shell) -> None:
    flow, seen = mirrored(shell)
    gate: dict[str, Any] = {"status": FlowStepStatus.RUNNING, "owner_session_key": "tenant:other"}
    with pytest.raises(FlowNotFound):
        shell.manager.record_step_observation(**seen, **gate)
    assert shell.manager.list_steps(flow.id) == []
    shell.manager.record_step_observation(**seen, **{**gate, "owner_session_key": flow.owner_session_key})


@pytest.mark.parametrize("payload", UNSTORABLE.values(), ids=UNSTORABLE)
def test_an_unstorable_result_is_refused_and_nothing_written(shell: Shell, payload: dict[str, Any]) -> None:
    flow, seen = mirrored(shell)
    with pytest.raises(InvalidData):
        shell.manager.record_step_observation(**seen, status=FlowStepStatus.SUCCEEDED, result_json=payload)
    with pytest.raises(InvalidData):
        shell.manager.record_step_observation(**{**seen, "run_id": ""}, status=FlowStepStatus.RUNNING)
    assert shell.manager.list_steps(flow.id) == []
    assert len(shell.store.list_events(flow.id)) == 1
