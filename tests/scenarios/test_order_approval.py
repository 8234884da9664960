"""A person decides at once, late, or never; nobody is asked or reminded twice over one crash."""

from __future__ import annotations

import pytest

from celery_flows import FlowStatus
from celery_flows.testing import FlowApp, FlowClock, FlowCrash, When
from tests.scenarios.order_approval import place
from tests.scenarios.outside import Outside

ASKED = "please decide on o1"


def test_a_yes_ships_the_order(flow_app: FlowApp, world: Outside) -> None:
    handle = place.start("o1")
    flow_app.run()
    assert handle.status() is FlowStatus.WAITING
    handle.approve("manager", by="ann")
    assert handle.result(0) == "ship o1"
    assert world.asked == [ASKED, "ship o1"]


def test_a_no_closes_it(flow_app: FlowApp, world: Outside) -> None:
    handle = place.start("o1")
    handle.reject("manager", by="ann", comment="too much")
    assert handle.result() == "close o1, ann said no: too much"


def test_who_is_late_is_reminded(flow_app: FlowApp, flow_clock: FlowClock, world: Outside) -> None:
    handle = place.start("o1")
    flow_clock.advance(hours=23)
    assert world.asked == [ASKED]
    flow_clock.advance(hours=2)
    assert world.asked == [ASKED, "reminder 1 of o1"]
    handle.approve("manager", by="ann")
    assert handle.result(0) == "ship o1"
    assert world.asked == [ASKED, "reminder 1 of o1", "ship o1"]


def test_without_an_answer_it_is_closed(flow_app: FlowApp, flow_clock: FlowClock, world: Outside) -> None:
    began = flow_clock.now()
    assert place.start("o1").result() == "close o1, nobody answered"
    assert world.asked[1:3] == ["reminder 1 of o1", "reminder 2 of o1"]
    assert (flow_clock.now() - began).days == 3


@pytest.mark.parametrize(("when", "times"), [("before", 2), ("during", 3), ("after", 2)])
def test_a_crash_reminds_nobody_twice(
    flow_app: FlowApp, flow_crash: FlowCrash, world: Outside, when: When, times: int
) -> None:
    flow_crash.at("remind", when=when)
    assert place.start("o1").result() == "close o1, nobody answered"
    assert flow_app.ran.count("ask") == 1
    assert flow_app.ran.count("remind") == times
    assert world.done == [ASKED, "reminder 1 of o1", "reminder 2 of o1", "close o1, nobody answered"]
