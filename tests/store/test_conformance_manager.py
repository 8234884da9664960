"""What the manager promises, over each database, synchronous and awaited."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from uuid import UUID, uuid4

import pytest

from celery_flows.store import (
    AlreadyTerminal,
    CancelPending,
    DuplicateFlow,
    Flow,
    FlowManager,
    FlowMode,
    FlowNotFound,
    FlowStatus,
    IllegalTransition,
    InvalidData,
    TimerWait,
)
from tests.support.fold import assert_whole
from tests.support.samples import DAY, NAMES, UNSTORABLE, now
from tests.support.shells import Shell

MANUAL = {"kind": "manual"}

Mutation = Callable[[FlowManager, UUID, dict[str, Any]], Flow]
MUTATIONS: dict[str, Mutation] = {
    "start_running": lambda manager, id_, gate: manager.start_running(id_, **gate),
    "set_waiting": lambda manager, id_, gate: manager.set_waiting(id_, MANUAL, **gate),
    "resume": lambda manager, id_, gate: manager.resume(id_, **gate),
    "update_state": lambda manager, id_, gate: manager.update_state(id_, {"a": 1}, **gate),
    "finish": lambda manager, id_, gate: manager.finish(id_, **gate),
    "fail": lambda manager, id_, gate: manager.fail(id_, "why", **gate),
    "request_cancel": lambda manager, id_, gate: manager.request_cancel(id_, **gate),
    "cancel": lambda manager, id_, gate: manager.cancel(id_, **gate),
    "pause": lambda manager, id_, gate: manager.pause(id_, **gate),
    "unpause": lambda manager, id_, gate: manager.unpause(id_, **gate),
}
EVERY = pytest.mark.parametrize("name", MUTATIONS)


def in_status(manager: FlowManager, status: FlowStatus) -> Flow:
    """A flow brought to ``status`` by the manager."""
    flow = manager.create_managed(**NAMES)
    if status is FlowStatus.CREATED:
        return flow
    if status is FlowStatus.CANCELLED:
        return manager.cancel(flow.id)
    flow = manager.start_running(flow.id)
    if status is FlowStatus.WAITING:
        return manager.set_waiting(flow.id, MANUAL)
    if status is FlowStatus.FINISHED:
        return manager.finish(flow.id)
    return manager.fail(flow.id, "why") if status is FlowStatus.FAILED else flow


def kinds(shell: Shell, flow_id: UUID) -> list[str]:
    """The kinds of a flow's events, oldest first, its history being whole."""
    return [event.kind for event in assert_whole(shell.store, flow_id)]


# ---- creation -------------------------------------------------------------------------------------------------------


def test_a_managed_flow_is_created_with_its_event(shell: Shell) -> None:
    flow = shell.manager.create_managed(
        **NAMES, goal="g", requester_origin="api", current_step="s", state_json={"a": 1}, deadline_at=now() + DAY
    )
    assert (flow.status, flow.mode, flow.revision, flow.state_json) == (
        FlowStatus.CREATED,
        FlowMode.MANAGED,
        1,
        {"a": 1},
    )
    assert shell.manager.get(flow.id) == flow
    assert kinds(shell, flow.id) == ["created"]


def test_a_mirrored_flow_is_born_running(shell: Shell) -> None:
    flow = shell.manager.create_mirrored(**NAMES)
    assert (flow.status, flow.mode) == (FlowStatus.RUNNING, FlowMode.MIRRORED)
    assert kinds(shell, flow.id) == ["created"]


def test_creation_under_a_taken_id_or_key_leaves_no_trace(shell: Shell) -> None:
    flow = shell.manager.create_managed(**NAMES, idempotency_key="k")
    with pytest.raises(DuplicateFlow):
        shell.manager.create_managed(**NAMES, id=flow.id)
    with pytest.raises(DuplicateFlow):
        shell.manager.create_managed(**NAMES, id=(second := uuid4()), idempotency_key="k")
    assert shell.store.get(second) is None
    assert shell.store.list_events(second) == []
    assert kinds(shell, flow.id) == ["created"]


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("controller_id", ""),
        ("controller_id", "c" * 201),
        ("owner_session_key", "  "),
        ("owner_session_key", "a\0"),
        ("idempotency_key", ""),
        ("current_step", "\ud800"),
        ("goal", "g" * 4001),
        ("deadline_at", now().replace(tzinfo=None)),
        ("surprise", 1),
    ],
)
def test_a_bad_field_is_refused_by_name(shell: Shell, field: str, bad: object) -> None:
    with pytest.raises(InvalidData) as caught:
        shell.manager.create_managed(**{**NAMES, field: bad})
    assert caught.value.field == field
    assert shell.store.list_by_status(FlowStatus.CREATED) == []


@pytest.mark.parametrize("payload", UNSTORABLE.values(), ids=UNSTORABLE)
def test_an_unstorable_payload_is_refused_and_nothing_written(shell: Shell, payload: dict[str, Any]) -> None:
    for field in ("state_json", "input_json"):
        with pytest.raises(InvalidData) as caught:
            shell.manager.create_managed(**NAMES, **{field: payload})
        assert caught.value.field.startswith(field)
    flow = in_status(shell.manager, FlowStatus.RUNNING)
    for write in (shell.manager.update_state, shell.manager.finish, shell.manager.resume):
        with pytest.raises(InvalidData):
            write(flow.id, payload)
    assert shell.manager.get(flow.id) == flow
    assert kinds(shell, flow.id) == ["created", "started"]
    assert len(shell.store.list_by_owner(flow.owner_session_key)) == 1


@pytest.mark.parametrize("reason", ["a\0b", "\ud800", "x" * (1024 * 1024)])
def test_a_bad_reason_is_refused(shell: Shell, reason: str) -> None:
    flow = in_status(shell.manager, FlowStatus.RUNNING)
    with pytest.raises(InvalidData):
        shell.manager.fail(flow.id, reason)
    assert shell.manager.get(flow.id) == flow


@pytest.mark.parametrize("patch", [[("a", 1)], "ab", 7])
def test_a_patch_that_is_no_object_is_refused(shell: Shell, patch: Any) -> None:
    flow = in_status(shell.manager, FlowStatus.RUNNING)
    for write in (shell.manager.update_state, shell.manager.finish, shell.manager.resume):
        with pytest.raises(InvalidData):
            write(flow.id, patch)
    assert shell.manager.get(flow.id) == flow


def test_a_state_may_not_grow_past_the_limit_patch_by_patch(shell: Shell) -> None:
    flow = shell.manager.create_managed(**NAMES, state_json={"a": "x" * 700_000})
    with pytest.raises(InvalidData):
        shell.manager.update_state(flow.id, {"b": "x" * 700_000})
    assert shell.manager.get(flow.id) == flow


# ---- transitions ----------------------------------------------------------------------------------------------------


def test_a_flow_from_start_to_finish(shell: Shell) -> None:
    flow = shell.manager.create_managed(**NAMES, state_json={"kept": {"deep": 1}, "replaced": {"deep": 1}})
    shell.manager.start_running(flow.id)
    waiting = shell.manager.set_waiting(flow.id, TimerWait(at=now() + DAY))
    assert waiting.wait_json is not None
    assert waiting.wait_json["kind"] == "timer"
    resumed = shell.manager.resume(flow.id, {"replaced": {"other": 2}})
    assert resumed.wait_json is None
    moved = shell.manager.update_state(flow.id, {"new": None}, "ship")
    assert moved.current_step == "ship"
    ended = shell.manager.finish(flow.id, {"new": 3})
    assert ended.state_json == {"kept": {"deep": 1}, "replaced": {"other": 2}, "new": 3}
    assert (ended.status, ended.revision) == (FlowStatus.FINISHED, 6)
    assert ended.finished_at == ended.updated_at
    assert shell.manager.get(flow.id) == ended
    assert kinds(shell, flow.id) == ["created", "started", "waiting", "resumed", "state_updated", "finished"]


@pytest.mark.parametrize("status", [FlowStatus.RUNNING, FlowStatus.WAITING])
def test_fail_puts_the_reason_into_the_state(shell: Shell, status: FlowStatus) -> None:
    flow = in_status(shell.manager, status)
    shell.manager.update_state(flow.id, {"failure": {"hint": "h", "reason": "old"}, "kept": 1})
    failed = shell.manager.fail(flow.id, "no stock")
    assert failed.state_json == {"failure": {"hint": "h", "reason": "no stock"}, "kept": 1}
    assert (failed.status, failed.wait_json) == (FlowStatus.FAILED, None)
    assert failed.finished_at is not None
    assert kinds(shell, flow.id)[-1] == "failed"


def test_fail_works_whatever_the_state_calls_failure(shell: Shell) -> None:
    flow = in_status(shell.manager, FlowStatus.RUNNING)
    shell.manager.update_state(flow.id, {"failure": "mine"})
    assert shell.manager.fail(flow.id, "why").state_json == {"failure": {"reason": "why"}}


@pytest.mark.parametrize("status", [FlowStatus.CREATED, FlowStatus.RUNNING, FlowStatus.WAITING])
def test_an_open_flow_can_be_cancelled(shell: Shell, status: FlowStatus) -> None:
    flow = in_status(shell.manager, status)
    cancelled = shell.manager.cancel(flow.id)
    assert (cancelled.status, cancelled.cancel_requested, cancelled.wait_json) == (FlowStatus.CANCELLED, True, None)
    assert cancelled.finished_at is not None
    assert kinds(shell, flow.id)[-1] == "cancelled"


def test_a_requested_cancel_is_sticky(shell: Shell) -> None:
    flow = in_status(shell.manager, FlowStatus.RUNNING)
    requested = shell.manager.request_cancel(flow.id)
    assert (requested.cancel_requested, requested.status) == (True, FlowStatus.RUNNING)
    assert shell.manager.request_cancel(flow.id) == requested
    for name in ("finish", "fail", "set_waiting"):
        with pytest.raises(CancelPending) as caught:
            MUTATIONS[name](shell.manager, flow.id, {})
        assert caught.value.flow_id == flow.id
    assert shell.manager.update_state(flow.id, {"cleanup": 1}).cancel_requested
    assert shell.manager.cancel(flow.id).status is FlowStatus.CANCELLED
    expected = ["created", "started", "cancel_requested", "state_updated", "cancelled"]
    assert kinds(shell, flow.id) == expected


@EVERY
@pytest.mark.parametrize("status", [FlowStatus.FINISHED, FlowStatus.FAILED, FlowStatus.CANCELLED])
def test_a_terminal_flow_changes_no_more(shell: Shell, status: FlowStatus, name: str) -> None:
    flow = in_status(shell.manager, status)
    before = shell.store.list_events(flow.id)
    with pytest.raises(AlreadyTerminal) as caught:
        MUTATIONS[name](shell.manager, flow.id, {})
    assert (caught.value.flow_id, caught.value.status) == (flow.id, status)
    assert shell.manager.get(flow.id) == flow
    assert shell.store.list_events(flow.id) == before


def test_what_the_lifecycle_does_not_know_is_refused(shell: Shell) -> None:
    created = in_status(shell.manager, FlowStatus.CREATED)
    for name in ("finish", "fail", "resume", "set_waiting"):
        with pytest.raises(IllegalTransition):
            MUTATIONS[name](shell.manager, created.id, {})
    waiting = in_status(shell.manager, FlowStatus.WAITING)
    with pytest.raises(IllegalTransition):
        shell.manager.finish(waiting.id)
    with pytest.raises(IllegalTransition):
        shell.manager.start_running(waiting.id)
    assert shell.manager.get(created.id) == created
    assert shell.manager.get(waiting.id) == waiting


@pytest.mark.parametrize(
    "wait",
    [
        {"kind": "sometime"},
        {"kind": "timer"},
        {"kind": "timer", "at": "2030-01-01T00:00:00"},
        {"kind": "external_event", "topic": "t"},
        {"kind": "external_event", "topic": "", "correlation_id": "c"},
        {"kind": "manual", "surprise": 1},
        {},
    ],
)
def test_a_bad_wait_is_refused(shell: Shell, wait: dict[str, Any]) -> None:
    flow = in_status(shell.manager, FlowStatus.RUNNING)
    with pytest.raises(InvalidData):
        shell.manager.set_waiting(flow.id, wait)
    assert shell.manager.get(flow.id) == flow


def test_a_paused_flow_keeps_its_status(shell: Shell) -> None:
    flow = in_status(shell.manager, FlowStatus.WAITING)
    paused = shell.manager.pause(flow.id)
    assert paused.paused_at is not None
    assert paused.paused_at.utcoffset() is not None
    unpaused = shell.manager.unpause(flow.id)
    assert unpaused.paused_at is None
    assert (unpaused.status, unpaused.wait_json) == (flow.status, flow.wait_json)
    assert kinds(shell, flow.id)[-2:] == ["paused", "unpaused"]


# ---- owners ---------------------------------------------------------------------------------------------------------

LEGAL_IN = {"start_running": FlowStatus.CREATED, "resume": FlowStatus.WAITING}


@EVERY
def test_another_owners_flow_is_not_found(shell: Shell, name: str) -> None:
    flow = in_status(shell.manager, LEGAL_IN.get(name, FlowStatus.RUNNING))
    before = shell.store.list_events(flow.id)
    with pytest.raises(FlowNotFound):
        MUTATIONS[name](shell.manager, flow.id, {"owner_session_key": "tenant:other"})
    assert shell.manager.get(flow.id) == flow
    assert shell.store.list_events(flow.id) == before
    changed = MUTATIONS[name](shell.manager, flow.id, {"owner_session_key": flow.owner_session_key})
    assert changed.revision == flow.revision + 1


@EVERY
def test_an_unknown_flow_is_not_found(shell: Shell, name: str) -> None:
    with pytest.raises(FlowNotFound):
        MUTATIONS[name](shell.manager, uuid4(), {})


def test_another_owners_flow_is_not_read_either(shell: Shell) -> None:
    flow = in_status(shell.manager, FlowStatus.RUNNING)
    for read in (shell.manager.get, shell.manager.list_steps, shell.manager.list_events):
        with pytest.raises(FlowNotFound):
            read(flow.id, owner_session_key="tenant:other")
        with pytest.raises(FlowNotFound):
            read(uuid4())
        read(flow.id, owner_session_key=flow.owner_session_key)


def test_the_managers_lists_are_the_stores(shell: Shell) -> None:
    flow = in_status(shell.manager, FlowStatus.RUNNING)
    assert shell.manager.list_by_owner(flow.owner_session_key) == [flow]
    assert shell.manager.list_by_status(FlowStatus.RUNNING) == [flow]
    assert shell.manager.list_by_status(FlowStatus.RUNNING, -1) == []
    assert [event.kind for event in shell.manager.list_events(flow.id, 1)] == ["started"]
    assert shell.manager.list_events(flow.id, -1) == []
