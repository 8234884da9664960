"""All items are seen to, a few at a time; what fails keeps nothing else back."""

from __future__ import annotations

from collections import Counter

import pytest

from celery_flows.testing import FlowApp, FlowClock, FlowCrash, When, most_at_once
from tests.scenarios.outside import Outside
from tests.scenarios.sliding_window import AT_ONCE, frame_all, print_all

PICTURES = [f"p{number:02}" for number in range(30)]


def test_a_few_tasks_are_out_at_a_time(flow_app: FlowApp, world: Outside) -> None:
    handle = print_all.start(PICTURES)
    assert handle.result() == []
    assert Counter(world.asked) == Counter(f"print {each}" for each in PICTURES)
    assert most_at_once(handle, "pictures.print") == AT_ONCE


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
    began = flow_clock.now()
    handle = frame_all.start(PICTURES)
    assert handle.result() == [f"print {each}, dry" for each in PICTURES]
    assert most_at_once(handle, "pictures/frame") == AT_ONCE
    assert 6 <= (flow_clock.now() - began).total_seconds() / 3600 < 6.5


@pytest.mark.parametrize("name", ["print_picture", "pictures.print"])
def test_a_crash_in_a_child_prints_its_picture_once(
    flow_app: FlowApp, flow_crash: FlowCrash, world: Outside, name: str
) -> None:
    flow_crash.at(name, when="after")
    assert len(frame_all.start(PICTURES).result()) == 30
    assert len(world.asked) == 30
