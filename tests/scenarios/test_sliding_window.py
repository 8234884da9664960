"""All items are seen to, a few at a time; what fails keeps nothing else back."""

from __future__ import annotations

from collections import Counter

import pytest

from celery_flows import FlowStatus
from celery_flows.testing import FlowApp, FlowClock, FlowCrash, FlowMessages, When
from tests.scenarios.outside import Outside
from tests.scenarios.sliding_window import AT_ONCE, flows, frame_all, print_all

PICTURES = [f"p{number:02}" for number in range(30)]
OPEN = (FlowStatus.CREATED, FlowStatus.RUNNING, FlowStatus.WAITING)


def test_a_few_tasks_are_out_at_a_time(
    flow_app: FlowApp, flow_messages: FlowMessages, world: Outside, monkeypatch: pytest.MonkeyPatch
) -> None:
    out: list[int] = []
    ask = world.ask

    def noting(what: str, *, key: str = "") -> str:
        sent = {message.run_id for message in flow_messages.sent if message.task == "pictures.print"}
        out.append(len(sent) - len(out))
        return ask(what, key=key)

    monkeypatch.setattr(world, "ask", noting)
    assert print_all.start(PICTURES).result() == []
    assert Counter(world.asked) == Counter(f"print {each}" for each in PICTURES)
    assert max(out) == AT_ONCE


def test_what_fails_is_named_and_the_others_are_done(flow_app: FlowApp, world: Outside) -> None:
    world.refuse("print p07")
    world.refuse("print p21")
    assert print_all.start(PICTURES).result() == ["p07", "p21"]
    assert len(world.done) == 28


@pytest.mark.parametrize(("when", "times"), [("before", 30), ("during", 31), ("after", 30)])
def test_a_crash_prints_nothing_twice(
    flow_app: FlowApp, flow_crash: FlowCrash, world: Outside, when: When, times: int
) -> None:
    flow_crash.at("pictures.print", when=when)
    assert print_all.start(PICTURES).result() == []
    assert len(world.asked) == times
    assert sorted(world.done) == [f"print {each}" for each in PICTURES]


def test_a_few_child_flows_are_open_at_a_time(flow_app: FlowApp, flow_clock: FlowClock, world: Outside) -> None:
    handle = frame_all.start(PICTURES)
    flow_app.run()
    most, began = 0, flow_clock.now()
    while not handle.status().is_terminal:
        children = flows.search(definition="pictures/frame", limit=100)
        most = max(most, sum(child.status in OPEN for child in children))
        flow_clock.advance(minutes=10)
    assert handle.result(0) == [f"print {each}, dry" for each in PICTURES]
    assert most == AT_ONCE
    assert 6 <= (flow_clock.now() - began).total_seconds() / 3600 < 6.5


def test_a_crash_in_a_child_prints_its_picture_once(flow_app: FlowApp, flow_crash: FlowCrash, world: Outside) -> None:
    flow_crash.at("print_picture", when="after")
    assert len(frame_all.start(PICTURES).result()) == 30
    assert len(world.asked) == 30
