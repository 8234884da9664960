"""Whoever of the two decides first has decided; after a week it is too late."""

from __future__ import annotations

import pytest

from celery_flows import AlreadyTerminal
from celery_flows.testing import FlowApp, FlowClock, FlowCrash, When
from tests.scenarios.expense import PEOPLE, Expense, claim
from tests.scenarios.outside import Outside

EXPENSE = Expense(number=7, cents=4200)
ASKED = ["ask manager about 7", "ask accountant about 7"]


@pytest.mark.parametrize("person", PEOPLE)
def test_either_may_grant_it(flow_app: FlowApp, world: Outside, person: str) -> None:
    handle = claim.start(EXPENSE)
    flow_app.run()
    handle.approve(person, by="ann")
    assert handle.result() == "pay 4200"
    assert world.asked == [*ASKED, "pay 4200"]


def test_the_first_answer_counts(flow_app: FlowApp, world: Outside) -> None:
    handle = claim.start(EXPENSE)
    flow_app.run()
    assert handle.reject("accountant", by="bob")
    flow_app.run()
    with pytest.raises(AlreadyTerminal):
        handle.approve("manager", by="ann")
    assert handle.result() == "refused by bob"
    assert world.asked == ASKED


def test_after_a_week_it_is_refused(flow_app: FlowApp, flow_clock: FlowClock, world: Outside) -> None:
    began = flow_clock.now()
    handle = claim.start(EXPENSE)
    assert handle.result() == "nobody decided"
    assert (flow_clock.now() - began).days == 7
    assert world.asked == ASKED


@pytest.mark.parametrize(("when", "times"), [("before", 1), ("during", 2), ("after", 1)])
def test_a_crash_pays_once(flow_app: FlowApp, flow_crash: FlowCrash, world: Outside, when: When, times: int) -> None:
    flow_crash.at("ask", when="after")
    flow_crash.at("pay", when=when)
    handle = claim.start(EXPENSE)
    handle.approve("manager", by="ann")
    assert handle.result() == "pay 4200"
    assert world.asked == [*ASKED, *["pay 4200"] * times]
    assert world.done == [*ASKED, "pay 4200"]
