"""The examples' flows on a clock that the test moves, and with workers that die; as processes they are run in
tests/acceptance."""

from __future__ import annotations

from datetime import datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest

from celery_flows import FlowFailed, FlowHandle, FlowStatus
from celery_flows.testing import FlowApp, FlowClock, FlowCrash
from examples.agent_loop import app as agent
from examples.nightly_report import app as report
from examples.order_fulfilment import app as orders
from tests.support.fold import assert_whole


@pytest.fixture
def flow_celery_app(request: pytest.FixtureRequest) -> Any:
    return request.param


def example(module: Any) -> pytest.MarkDecorator:
    """Marks a test of this example."""
    return pytest.mark.parametrize("flow_celery_app", [module.flows], indirect=True, ids=[module.app.main])


# ---- order_fulfilment ----


def order(cents: int, address: str = "Elm Street 1") -> orders.Order:
    lines = [orders.Line(article=article, count=1, cents=cents) for article in ("chair", "table")]
    return orders.Order(id="order-1", address=address, lines=lines)


@example(orders)
@pytest.mark.parametrize("crash", ["examples.order_fulfilment.app.charge", "hand_over", None])
def test_an_order_is_sent_whatever_dies(flow_app: FlowApp, flow_crash: FlowCrash, crash: str | None) -> None:
    if crash is not None:
        flow_crash.at(crash, when="during")
    handle = orders.fulfil.start(order(5))
    assert handle.result() == ["sent: chair to Elm Street 1", "sent: table to Elm Street 1"]
    assert flow_app.ran.count("reserve") == 1
    assert_whole(flow_app.store, handle.id)


@example(orders)
def test_payments_have_a_queue_of_their_own(flow_app: FlowApp) -> None:
    orders.fulfil.start(order(5)).result()
    queues = {message.queue for message in flow_app.messages.sent if message.task.endswith("charge")}
    assert queues == {"payments"}


@example(orders)
def test_an_order_that_cannot_be_sent_is_undone(flow_app: FlowApp) -> None:
    with pytest.raises(FlowFailed, match="NotDeliverable"):
        orders.fulfil.start(order(5, "nowhere")).result()
    assert flow_app.ran[-2:] == ["examples.order_fulfilment.app.refund", "release"]


@example(orders)
@pytest.mark.parametrize("way", ["approved", "refused", "nobody"])
def test_a_large_order_is_approved_or_not(flow_app: FlowApp, way: str) -> None:
    handle = orders.fulfil.start(order(90_000))
    flow_app.run()
    assert (handle.status(), handle.state()) == (FlowStatus.WAITING, {"asks": "manager"})
    if way == "approved":
        handle.approve("manager", by="ann")
    elif way == "refused":
        handle.reject("manager", by="ann", comment="too dear")
    told = {"refused": ["refused by ann: too dear"], "nobody": ["nobody approved"]}
    assert handle.result() == told.get(way, ["sent: chair to Elm Street 1", "sent: table to Elm Street 1"])
    assert ("release" in flow_app.ran) == (way != "approved")


# ---- nightly_report ----


def look(flow_app: FlowApp) -> list[str]:
    """What a worker does with beat's message, and all that comes of it; gives the reports there are, oldest first."""
    report.app.tasks["flows.look"].apply(kwargs={"name": "reports/nightly"}, throw=True)
    flow_app.run()
    flows = flow_app.store.list_by_status(FlowStatus.FINISHED, None)
    return [flow.result_json for flow in sorted(flows, key=lambda flow: str(flow.input_json))]


@example(report)
def test_each_night_is_reported_once_and_those_missed_too(flow_app: FlowApp, flow_clock: FlowClock) -> None:
    assert look(flow_app) == []
    flow_clock.advance_to(next_night(flow_clock))
    [first] = look(flow_app)
    assert look(flow_app) == [first]
    flow_clock.move_to(flow_clock.now() + timedelta(days=3))  # nobody was there
    for number in (2, 3, 4, 4):
        assert len(look(flow_app)) == number
    days = [datetime.fromisoformat(told.split()[2].rstrip(":")) for told in look(flow_app)]
    assert [later - earlier for earlier, later in pairwise(days)] == [timedelta(days=1)] * 3


def next_night(clock: FlowClock) -> datetime:
    now = clock.now().astimezone(report.app.timezone)
    return now.replace(hour=3, minute=0, second=1) + timedelta(days=1)


# ---- agent_loop ----


def tidied(flow_app: FlowApp) -> FlowHandle[str]:
    """A conversation in which somebody allows all but what is done to b.txt."""
    asked = agent.Message(by="user", text="tidy up /tmp/old")
    started = agent.converse.start(agent.Conversation(messages=[asked]))
    for _ in range(3):
        flow_app.run()
        flow = started
        while (after := flow.get().continued_as) is not None:
            flow = agent.flows.handle(after)
        state = flow.state()
        (flow.reject if "b.txt" in state["calls"] else flow.approve)(state["asks"], by="ann")
    return started


@example(agent)
def test_an_agent_asks_before_what_is_dangerous(flow_app: FlowApp) -> None:
    started = tidied(flow_app)
    assert started.result() == "done after 4 calls"
    assert [name for name in flow_app.ran if "delete" in name] == ["examples.agent_loop.app.delete_file"] * 2
    assert started.get().continued_as is not None


@example(agent)
@pytest.mark.parametrize(("when", "times"), [("before", 5), ("during", 6), ("after", 5)])
def test_a_model_is_asked_nothing_twice_but_what_it_was_answering(
    flow_app: FlowApp, flow_crash: FlowCrash, flow_clock: FlowClock, when: Any, times: int
) -> None:
    flow_crash.at("ask_model", when=when)
    flow_clock.advance(seconds=0)
    asked = agent.converse.start(agent.Conversation(messages=[agent.Message(by="user", text="tidy up")]))
    assert asked.result() == "done after 4 calls"  # nobody allows anything: each deletion is refused in the end
    assert flow_app.ran.count("ask_model") == times
