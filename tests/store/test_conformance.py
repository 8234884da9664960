"""The contract of ``FlowStore``, line by line, over each database, synchronous and awaited."""

from __future__ import annotations

from datetime import timedelta
from uuid import uuid4

import pytest

from celery_flows.store import (
    DuplicateFlow,
    DuplicateStep,
    FlowNotFound,
    FlowStatus,
    FlowStepStatus,
    InvalidData,
    RevisionMismatch,
    StepNotFound,
)
from tests.support.samples import DAY, UNSTORABLE, a_flow, a_step, now
from tests.support.shells import Shell

# ---- flows ----------------------------------------------------------------------------------------------------------


def test_a_flow_comes_back_as_it_was_inserted(shell: Shell) -> None:
    flow = a_flow(
        goal="ship it",
        requester_origin="api",
        current_step="reserve",
        state_json={"ü": [1, 2.5, None, {"deep": True}]},
        wait_json={"kind": "manual"},
        status=FlowStatus.WAITING,
        input_json=[1, "two"],
        result_json="r",
        error_json={"type": "E", "message": "m"},
        idempotency_key="order-1",
        definition_version=3,
        parent_flow_id=uuid4(),
        deadline_at=now() + DAY,
        paused_at=now(),
    )
    shell.store.insert(flow)
    assert shell.store.get(flow.id) == flow


def test_insert_writes_no_event(shell: Shell) -> None:
    shell.store.insert(flow := a_flow())
    assert shell.store.list_events(flow.id) == []


def test_an_unknown_flow_is_none(shell: Shell) -> None:
    assert shell.store.get(uuid4()) is None


def test_ids_are_version_7_and_times_aware_utc(shell: Shell) -> None:
    shell.store.insert(flow := a_flow(deadline_at=now().astimezone(None) + DAY))
    shell.store.insert_step(a_step(flow.id))
    stored, step = shell.store.get(flow.id), shell.store.list_steps(flow.id)[0]
    assert stored is not None
    event = shell.store.append_event(flow.id, "noted", {})
    assert (flow.id.version, step.id.version) == (7, 7)
    times = (stored.created_at, stored.updated_at, stored.deadline_at, step.created_at, step.updated_at, event.at)
    assert [time.utcoffset() for time in times if time is not None] == [timedelta(0)] * 6


def test_the_same_id_twice_is_a_duplicate_flow(shell: Shell) -> None:
    shell.store.insert(flow := a_flow(goal="first"))
    with pytest.raises(DuplicateFlow) as caught:
        shell.store.insert(flow.but(goal="second"))
    assert caught.value.flow_id == flow.id
    assert shell.store.get(flow.id) == flow


def test_an_idempotency_key_is_taken_within_its_definition_only(shell: Shell) -> None:
    shell.store.insert(a_flow(idempotency_key="k"))
    shell.store.insert(a_flow(idempotency_key="k", controller_id="another"))
    with pytest.raises(DuplicateFlow):
        shell.store.insert(a_flow(idempotency_key="k"))


def test_a_terminal_flow_inserted_without_its_end_gets_one(shell: Shell) -> None:
    shell.store.insert(flow := a_flow(status=FlowStatus.FAILED))
    stored = shell.store.get(flow.id)
    assert stored is not None
    assert stored.finished_at == flow.updated_at


# ---- lists of flows -------------------------------------------------------------------------------------------------


def test_an_owners_flows_come_newest_created_first(shell: Shell) -> None:
    flows = [a_flow(created_at=now() - n * DAY) for n in (2, 0, 3, 1)]
    for flow in [*flows, a_flow(owner_session_key="tenant:other")]:
        shell.store.insert(flow)
    newest_first = [flows[1].id, flows[3].id, flows[0].id, flows[2].id]
    assert [flow.id for flow in shell.store.list_by_owner("tenant:acme")] == newest_first


def test_flows_in_a_status_come_longest_not_updated_first(shell: Shell) -> None:
    flows = [a_flow(status=FlowStatus.RUNNING, updated_at=now() - n * DAY) for n in (2, 0, 3, 1)]
    for flow in [*flows, a_flow()]:
        shell.store.insert(flow)
    longest_first = [flows[2].id, flows[0].id, flows[3].id, flows[1].id]
    assert [flow.id for flow in shell.store.list_by_status(FlowStatus.RUNNING)] == longest_first
    shell.store.update_with_revision(flows[2])
    assert [flow.id for flow in shell.store.list_by_status(FlowStatus.RUNNING)] == [*longest_first[1:], flows[2].id]


@pytest.mark.parametrize("limit", [0, -1, -1000])
def test_a_limit_below_one_gives_nothing_never_everything(shell: Shell, limit: int) -> None:
    shell.store.insert(flow := a_flow())
    shell.store.insert_step(a_step(flow.id))
    shell.store.append_event(flow.id, "noted", {})
    assert shell.store.list_by_owner(flow.owner_session_key, limit) == []
    assert shell.store.list_by_status(FlowStatus.CREATED, limit) == []
    assert shell.store.list_events(flow.id, limit) == []
    assert shell.store.list_steps(flow.id, limit) == []


def test_pages_cover_many_rows_once_each_even_where_times_are_equal(shell: Shell) -> None:
    at = now()
    flows = [a_flow(created_at=at - (n // 7) * DAY, updated_at=at - (n // 5) * DAY) for n in range(60)]
    with shell.within("connection") as caller:
        for flow in flows:
            caller.store.insert(flow)
        caller.commit()
    owner = flows[0].owner_session_key
    seen, page = [], shell.store.list_by_owner(owner, 11)
    while page:
        seen += page
        page = shell.store.list_by_owner(owner, 11, after=page[-1])
    assert seen == shell.store.list_by_owner(owner, None)
    assert seen == sorted(flows, key=lambda flow: (flow.created_at, flow.id), reverse=True)
    seen, page = [], shell.store.list_by_status(FlowStatus.CREATED, 11)
    while page:
        seen += page
        page = shell.store.list_by_status(FlowStatus.CREATED, 11, after=page[-1])
    assert seen == sorted(flows, key=lambda flow: (flow.updated_at, flow.id))


@pytest.mark.parametrize("status", list(FlowStatus))
def test_a_change_moves_a_flow_to_the_end_of_its_status(shell: Shell, status: FlowStatus) -> None:
    flows = [a_flow(status=status, updated_at=now() - n * DAY) for n in (3, 2, 1)]
    for flow in flows:
        shell.store.insert(flow)
    shell.store.update_and_append(flows[0].but(goal="g"), "renamed", {})
    listed = [flow.id for flow in shell.store.list_by_status(status)]
    assert listed == [flows[1].id, flows[2].id, flows[0].id]


# ---- changes of a flow ----------------------------------------------------------------------------------------------


def test_update_moves_revision_and_time_and_gives_back_what_is_stored(shell: Shell) -> None:
    shell.store.insert(flow := a_flow(updated_at=now() - DAY))
    stored = shell.store.update_with_revision(flow.but(status=FlowStatus.RUNNING, state_json={"n": 1}))
    assert (stored.revision, stored.status, stored.state_json) == (2, FlowStatus.RUNNING, {"n": 1})
    assert stored.updated_at > flow.updated_at
    assert stored.created_at == flow.created_at
    assert shell.store.get(flow.id) == stored
    assert shell.store.list_events(flow.id) == []


def test_an_update_of_an_old_revision_is_refused(shell: Shell) -> None:
    shell.store.insert(flow := a_flow())
    stored = shell.store.update_with_revision(flow)
    with pytest.raises(RevisionMismatch) as caught:
        shell.store.update_with_revision(flow.but(goal="late"))
    assert (caught.value.flow_id, caught.value.expected, caught.value.actual) == (flow.id, 1, 2)
    assert shell.store.get(flow.id) == stored


def test_an_update_of_an_unknown_flow_is_not_found(shell: Shell) -> None:
    with pytest.raises(FlowNotFound):
        shell.store.update_with_revision(a_flow())
    with pytest.raises(FlowNotFound):
        shell.store.update_and_append(a_flow(), "noted", {})


def test_update_and_append_writes_row_and_event_together(shell: Shell) -> None:
    shell.store.insert(flow := a_flow())
    stored, event = shell.store.update_and_append(flow.but(goal="g"), "renamed", {"to": "g"})
    assert (event.kind, event.payload_json, event.revision, event.at) == (
        "renamed",
        {"to": "g"},
        2,
        stored.updated_at,
    )
    assert shell.store.get(flow.id) == stored
    assert shell.store.list_events(flow.id) == [event]


def test_a_refused_update_and_append_leaves_neither_row_nor_event(shell: Shell) -> None:
    shell.store.insert(flow := a_flow())
    stored = shell.store.update_with_revision(flow)
    with pytest.raises(RevisionMismatch):
        shell.store.update_and_append(flow.but(goal="late"), "renamed", {})
    assert shell.store.get(flow.id) == stored
    assert shell.store.list_events(flow.id) == []


def test_every_terminal_row_has_its_end(shell: Shell) -> None:
    for status in (FlowStatus.FINISHED, FlowStatus.FAILED, FlowStatus.CANCELLED):
        shell.store.insert(flow := a_flow(status=FlowStatus.RUNNING))
        stored = shell.store.update_with_revision(flow.but(status=status))
        assert stored.finished_at == stored.updated_at


def test_a_terminal_row_that_is_opened_by_hand_has_no_end_any_more(shell: Shell) -> None:
    shell.store.insert(flow := a_flow(status=FlowStatus.FAILED))
    assert shell.store.update_with_revision(flow.but(status=FlowStatus.RUNNING)).finished_at is None


# ---- events ---------------------------------------------------------------------------------------------------------


def test_events_come_newest_first_and_page(shell: Shell) -> None:
    shell.store.insert(flow := a_flow())
    appended = [shell.store.append_event(flow.id, "noted", {"n": n}) for n in range(7)]
    newest_first = appended[::-1]
    assert [event.id for event in appended] == sorted(event.id for event in appended)
    assert shell.store.list_events(flow.id) == newest_first
    assert shell.store.list_events(flow.id, 3) == newest_first[:3]
    assert shell.store.list_events(flow.id, 3, after=newest_first[2]) == newest_first[3:6]
    assert shell.store.list_events(uuid4()) == []


def test_an_event_leaves_its_flows_row_alone(shell: Shell) -> None:
    shell.store.insert(flow := a_flow())
    assert shell.store.append_event(flow.id, "noted", {}).revision is None
    assert shell.store.get(flow.id) == flow


def test_an_event_of_an_unknown_flow_is_not_found(shell: Shell) -> None:
    with pytest.raises(FlowNotFound):
        shell.store.append_event(uuid4(), "noted", {})


@pytest.mark.parametrize("payload", UNSTORABLE.values(), ids=UNSTORABLE)
def test_an_unstorable_payload_is_refused_and_nothing_written(shell: Shell, payload: dict[str, object]) -> None:
    shell.store.insert(flow := a_flow())
    with pytest.raises(InvalidData):
        shell.store.append_event(flow.id, "noted", payload)
    with pytest.raises(InvalidData):
        shell.store.update_and_append(flow, "noted", payload)
    assert shell.store.get(flow.id) == flow
    assert shell.store.list_events(flow.id) == []


@pytest.mark.parametrize("kind", ["", "  ", "k" * 201, "a\0b"])
def test_a_kind_that_is_no_name_is_refused(shell: Shell, kind: str) -> None:
    shell.store.insert(flow := a_flow())
    with pytest.raises(InvalidData):
        shell.store.append_event(flow.id, kind, {})
    with pytest.raises(InvalidData):
        shell.store.update_and_append(flow, kind, {})
    assert shell.store.list_events(flow.id) == []


# ---- steps ----------------------------------------------------------------------------------------------------------


def test_a_step_comes_back_as_it_was_inserted(shell: Shell) -> None:
    shell.store.insert(flow := a_flow())
    step = a_step(flow.id, child_session_key="c", result_json={"n": [1]}, args_json=[], error_json={"type": "E"})
    shell.store.insert_step(step)
    assert shell.store.get_step(step.id) == step
    assert shell.store.get_step(uuid4()) is None


def test_steps_come_oldest_first_and_page(shell: Shell) -> None:
    shell.store.insert(flow := a_flow())
    at = now()
    steps = [a_step(flow.id, f"r{n}", created_at=at - age * DAY) for n, age in enumerate((1, 3, 1, 2, 0))]
    for step in steps:
        shell.store.insert_step(step)
    oldest_first = sorted(steps, key=lambda step: (step.created_at, step.id))
    assert shell.store.list_steps(flow.id) == oldest_first
    assert shell.store.list_steps(flow.id, 2, after=oldest_first[1]) == oldest_first[2:4]


def test_a_step_of_an_unknown_flow_is_not_found(shell: Shell) -> None:
    with pytest.raises(FlowNotFound):
        shell.store.insert_step(a_step(uuid4()))


def test_a_run_id_is_taken_within_its_flow_only(shell: Shell) -> None:
    shell.store.insert(flow := a_flow())
    shell.store.insert(other := a_flow())
    shell.store.insert_step(a_step(flow.id, "r"))
    shell.store.insert_step(a_step(other.id, "r"))
    with pytest.raises(DuplicateStep) as caught:
        shell.store.insert_step(a_step(flow.id, "r"))
    assert (caught.value.flow_id, caught.value.run_id) == (flow.id, "r")
    with pytest.raises(DuplicateStep):
        shell.store.insert_step(shell.store.list_steps(flow.id)[0].but(run_id="another"))
    assert len(shell.store.list_steps(flow.id)) == 1


def test_a_run_id_is_found_within_its_flow_only(shell: Shell) -> None:
    shell.store.insert(flow := a_flow())
    shell.store.insert(other := a_flow())
    shell.store.insert_step(step := a_step(flow.id, "r"))
    assert shell.store.find_step_by_run_id(flow.id, "r") == step
    assert shell.store.find_step_by_run_id(other.id, "r") is None
    assert shell.store.find_step_by_run_id(flow.id, "s") is None


def test_update_step_stores_it_with_a_new_time(shell: Shell) -> None:
    shell.store.insert(flow := a_flow())
    shell.store.insert_step(step := a_step(flow.id, updated_at=now() - DAY))
    stored = shell.store.update_step(step.but(status=FlowStepStatus.FAILED, attempt=2))
    assert (stored.status, stored.attempt, stored.created_at) == (FlowStepStatus.FAILED, 2, step.created_at)
    assert stored.updated_at > step.updated_at
    assert shell.store.get_step(step.id) == stored


def test_an_update_of_an_unknown_step_is_not_found(shell: Shell) -> None:
    shell.store.insert(flow := a_flow())
    with pytest.raises(StepNotFound):
        shell.store.update_step(a_step(flow.id))
