"""The records: frozen, validated, aware."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pydantic
import pytest

from celery_flows.store import Flow, FlowEvent, FlowMode, FlowStatus, FlowStep, FlowStepStatus, InvalidData, StepRuntime
from celery_flows.store.models import new_id
from tests.support.samples import NAMES, a_flow, a_step

NAIVE = datetime(2030, 1, 1)  # noqa: DTZ001 (naive on purpose)


def test_statuses_are_lower_case_text_under_upper_case_names() -> None:
    for enum in (FlowStatus, FlowStepStatus, StepRuntime, FlowMode):
        assert all(member.name == member.value.upper() for member in enum)
    assert [status.value for status in FlowStatus] == [
        "created", "running", "waiting", "cancelled", "finished", "failed",
    ]  # fmt: skip
    assert [status.value for status in FlowStepStatus] == ["pending", "running", "succeeded", "failed", "cancelled"]
    assert {status for status in FlowStepStatus if not status.is_terminal} == {"pending", "running"}


def test_records_are_frozen_and_refuse_unknown_fields() -> None:
    flow = a_flow()
    with pytest.raises(pydantic.ValidationError):
        flow.goal = "changed"  # type: ignore[misc]
    with pytest.raises(InvalidData) as caught:
        a_flow(surprise=1)
    assert caught.value.field == "surprise"


def test_new_records_have_what_is_needed() -> None:
    flow, step = a_flow(), a_step(new_id())
    assert (flow.status, flow.mode, flow.revision, flow.state_json) == (FlowStatus.CREATED, FlowMode.MANAGED, 1, {})
    assert (step.status, step.runtime, step.attempt) == (FlowStepStatus.PENDING, StepRuntime.MANAGED, 1)
    assert flow.id.version == step.id.version == 7
    assert flow.created_at.tzinfo is UTC


def test_ids_grow() -> None:
    ids = [new_id() for _ in range(1000)]
    assert len(set(ids)) == 1000
    assert ids[0] < ids[-1]


@pytest.mark.parametrize("field", ["created_at", "updated_at", "deadline_at", "paused_at", "finished_at"])
def test_a_naive_time_is_refused_and_an_aware_one_becomes_utc(field: str) -> None:
    with pytest.raises(InvalidData) as caught:
        a_flow(**{field: NAIVE})
    assert caught.value.field == field
    east = datetime(2030, 1, 1, 9, tzinfo=timezone(timedelta(hours=9)))
    assert getattr(a_flow(**{field: east}), field).isoformat() == "2030-01-01T00:00:00+00:00"


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("controller_id", ""), ("owner_session_key", " "), ("requester_origin", ""), ("current_step", "s" * 201),
        ("idempotency_key", "\0"), ("goal", "g" * 4001), ("revision", 0), ("definition_version", 0),
        ("status", "RUNNING"), ("state_json", []), ("state_json", {"x": float("nan")}), ("input_json", b"x"),
        ("result_json", {1}), ("error_json", "text"), ("id", "no uuid"), ("cancel_requested", "perhaps"),
    ],
)  # fmt: skip
def test_a_bad_field_of_a_flow_is_refused_by_name(field: str, bad: Any) -> None:
    with pytest.raises(InvalidData) as caught:
        Flow(**{**NAMES, field: bad})
    assert caught.value.field.split(".")[0].split("[")[0] == field


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("run_id", ""), ("task", "t" * 201), ("child_session_key", " "), ("status", "done"), ("runtime", "other"),
        ("attempt", 0), ("result_json", float("inf")), ("args_json", b"x"), ("flow_id", None), ("created_at", NAIVE),
    ],
)  # fmt: skip
def test_a_bad_field_of_a_step_is_refused_by_name(field: str, bad: Any) -> None:
    with pytest.raises(InvalidData) as caught:
        FlowStep(**{"flow_id": new_id(), "run_id": "r", "task": "t", field: bad})
    assert caught.value.field == field


def test_but_changes_some_fields_and_validates() -> None:
    flow = a_flow()
    changed = flow.but(goal="g", status="running")
    assert (changed.goal, changed.status, changed.id) == ("g", FlowStatus.RUNNING, flow.id)
    with pytest.raises(InvalidData):
        flow.but(goal="\0")


def test_a_missing_field_is_named() -> None:
    with pytest.raises(InvalidData) as caught:
        Flow(owner_session_key="o")  # type: ignore[call-arg]
    assert caught.value.field == "controller_id"


def test_an_event_is_of_any_kind() -> None:
    event = FlowEvent(id=1, flow_id=new_id(), kind="my_own", payload_json={}, at=datetime.now(UTC))
    assert event.revision is None
