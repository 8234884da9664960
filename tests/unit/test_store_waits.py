"""Wait conditions: parsed, stored, due."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_flows.store import ExternalEventWait, InvalidData, ManualWait, TimerWait
from celery_flows.store.waits import due_at, event_key, parse_wait, wait_json, wait_key

AT = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)
WAITS: list[TimerWait | ExternalEventWait | ManualWait] = [
    TimerWait(at=AT),
    ExternalEventWait(topic="approval", correlation_id="1"),
    ExternalEventWait(topic="approval", correlation_id="1", timeout_at=AT, run_id="r"),
    ManualWait(),
]


@pytest.mark.parametrize("wait", WAITS)
def test_a_wait_is_the_same_as_model_dict_and_stored(wait: TimerWait | ExternalEventWait | ManualWait) -> None:
    stored = wait_json(wait)
    assert parse_wait(wait) == parse_wait(stored) == wait
    assert wait_json(parse_wait(stored)) == stored
    assert None not in stored.values()


def test_times_are_stored_in_utc() -> None:
    wait = TimerWait(at=AT.astimezone(timezone(timedelta(hours=9))))
    assert wait_json(wait)["at"] == AT.isoformat()


def test_when_a_wait_ends_by_itself() -> None:
    assert [due_at(wait_json(wait)) for wait in WAITS] == [AT, None, AT, None]
    assert due_at(None) is None


@pytest.mark.parametrize(
    ("wait", "field"),
    [
        ({}, "wait"),
        ({"kind": "sometime"}, "wait"),
        ({"kind": "timer"}, "wait.timer.at"),
        ({"kind": "timer", "at": "soon"}, "wait.timer.at"),
        ({"kind": "timer", "at": datetime(2030, 1, 1)}, "wait.at"),  # noqa: DTZ001 (naive on purpose)
        ({"kind": "external_event", "topic": "t"}, "wait.external_event.correlation_id"),
        ({"kind": "external_event", "topic": "", "correlation_id": "c"}, "wait.topic"),
        ({"kind": "external_event", "topic": "t", "correlation_id": "c" * 201}, "wait.correlation_id"),
        ({"kind": "external_event", "topic": "t\0", "correlation_id": "c"}, "wait.topic"),
        ({"kind": "manual", "at": AT}, "wait.manual.at"),
    ],
)
def test_a_bad_wait_is_refused_by_field(wait: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidData) as caught:
        parse_wait(wait)
    assert caught.value.field == field


def test_only_a_wait_for_an_event_has_a_key() -> None:
    keys = [wait_key(wait_json(wait)) for wait in WAITS]
    assert keys == [None, event_key("approval", "1"), event_key("approval", "1"), None]
    assert wait_key(None) is None


names = st.text(min_size=1, max_size=5)


@given(names, names, names, names)
def test_two_keys_are_equal_only_for_the_same_topic_and_correlation(a: str, b: str, c: str, d: str) -> None:
    assert (event_key(a, b) == event_key(c, d)) is ((a, b) == (c, d))
