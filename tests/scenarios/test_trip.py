"""A trip that cannot be booked whole is given back, the latest part first."""

from __future__ import annotations

import pytest

from celery_flows import FlowFailed
from celery_flows.testing import FlowApp, FlowCrash, When, history
from tests.scenarios.outside import Outside
from tests.scenarios.trip import book_trip

TRIP = ["car", "hotel", "flight"]
BOOKED = ["book car", "book hotel", "book flight"]


def test_all_is_booked(flow_app: FlowApp, world: Outside) -> None:
    assert book_trip.start(TRIP).result() == BOOKED
    assert world.asked == BOOKED


def test_a_failure_undoes_in_reverse(flow_app: FlowApp, world: Outside) -> None:
    world.refuse("book flight")
    handle = book_trip.start(TRIP)
    with pytest.raises(FlowFailed) as failed:
        handle.result()
    assert failed.value.undo_failed == ()
    undone = [f"step_succeeded cancel {part}" for part in reversed(TRIP)]
    assert [line for line in history(handle) if "succeeded cancel" in line] == undone
    assert world.done == ["book car", "book hotel", "cancel flight", "cancel hotel", "cancel car"]


def test_an_undo_that_fails_is_reported_and_the_others_are_done(flow_app: FlowApp, world: Outside) -> None:
    world.refuse("book flight")
    world.refuse("cancel hotel")
    with pytest.raises(FlowFailed, match="not undone: cancel hotel") as failed:
        book_trip.start(TRIP).result()
    assert failed.value.undo_failed == ("cancel hotel",)
    assert world.asked.count("cancel hotel") == 2
    assert world.done == ["book car", "book hotel", "cancel flight", "cancel car"]


@pytest.mark.parametrize(("when", "times"), [("before", 1), ("during", 2), ("after", 1)])
@pytest.mark.parametrize("step", ["book hotel", "cancel hotel"])
def test_a_crash_does_nothing_twice(
    flow_app: FlowApp, flow_crash: FlowCrash, world: Outside, step: str, when: When, times: int
) -> None:
    world.refuse("book flight")
    flow_crash.at(step, when=when)
    with pytest.raises(FlowFailed):
        book_trip.start(TRIP).result()
    assert world.done == ["book car", "book hotel", "cancel flight", "cancel hotel", "cancel car"]
    assert world.asked.count(step) == times
    assert world.asked.count("book car") == 1
