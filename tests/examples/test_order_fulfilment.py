"""The example of an order: sent, approved, refused, forgotten, cancelled, undone."""

from __future__ import annotations

from datetime import timedelta

import pytest

from celery_flows import FlowCancelled, FlowFailed, FlowHandle, Flows, FlowStatus
from celery_flows.testing import FlowApp, FlowClock, FlowCrash, FlowMessages
from examples.order_fulfilment.app import Line, Order, flows, fulfil

TASKS = "examples.order_fulfilment.app"


@pytest.fixture
def flow_celery_app() -> Flows:
    return flows


def order(*articles: str, cents: int = 1200) -> FlowHandle[list[str]]:
    lines = [Line(article=article, count=1, cents=cents) for article in articles]
    return fulfil.start(Order(id="order-1", address="Elm Street 1", lines=lines))


def results(handle: FlowHandle[list[str]]) -> list[str | None]:
    """What the flow's own steps gave, in order."""
    return [step.result_json for step in flows.store.list_steps(handle.id) if isinstance(step.result_json, str)]


def test_a_small_order_is_sent_unasked(flow_app: FlowApp, flow_messages: FlowMessages) -> None:
    handle = order("a chair", "a table")
    assert handle.result() == ["sent: a chair to Elm Street 1", "sent: a table to Elm Street 1"]
    assert results(handle)[:2] == ["reservation order-1", "payment of 2400 for order-1"]
    assert flow_app.ran == ["reserve", f"{TASKS}.charge", *[f"{TASKS}.print_label", "hand_over"] * 2]
    queues = {message.task.removeprefix(f"{TASKS}."): message.queue for message in flow_messages.sent}
    assert (queues["charge"], queues["print_label"]) == ("payments", "orders")


def test_a_large_order_waits_for_its_manager(flow_app: FlowApp, flow_clock: FlowClock) -> None:
    handle = order("a sofa", cents=100_000)
    flow_clock.advance(days=1)
    assert (handle.status(), handle.state(), flow_app.ran) == (FlowStatus.WAITING, {"asks": "manager"}, ["reserve"])
    handle.approve("manager", by="ann")
    assert handle.result(0) == ["sent: a sofa to Elm Street 1"]
    assert handle.state() == {"asks": None}


def test_what_a_manager_refuses_goes_back_on_the_shelf(flow_app: FlowApp) -> None:
    handle = order("a sofa", cents=100_000)
    handle.reject("manager", by="ann", comment="too dear")
    assert handle.result() == ["refused by ann: too dear"]
    assert flow_app.ran == ["reserve", "release"]
    assert results(handle)[-1] == "reservation order-1 released"


def test_what_nobody_approves_goes_back_on_the_shelf_in_two_days(flow_app: FlowApp, flow_clock: FlowClock) -> None:
    began, handle = flow_clock.now(), order("a sofa", cents=100_000)
    assert handle.result() == ["nobody approved"]
    assert flow_app.ran == ["reserve", "release"]
    assert timedelta(days=2) <= flow_clock.now() - began < timedelta(days=2, seconds=1)


def test_an_order_that_is_cancelled_meanwhile_goes_back_on_the_shelf(flow_app: FlowApp) -> None:
    handle = order("a sofa", cents=100_000)
    flow_app.run()
    handle.cancel()
    with pytest.raises(FlowCancelled):
        handle.result()
    assert flow_app.ran == ["reserve", "release"]


def test_what_cannot_be_sent_is_undone_the_latest_first(flow_app: FlowApp) -> None:
    handle = order("a chair", "a piano")
    with pytest.raises(FlowFailed, match="no courier carries a piano") as failed:
        handle.result()
    assert failed.value.undo_failed == ()
    assert flow_app.ran.count(f"{TASKS}.print_label") == 2  # Permanent: not tried again
    assert flow_app.ran[-3:] == ["recall", f"{TASKS}.refund", "release"]
    assert results(handle)[-3:] == [
        "parcels of order-1 recalled", "payment of 2400 for order-1 refunded", "reservation order-1 released",
    ]  # fmt: skip


def test_a_charge_whose_worker_dies_runs_again_and_is_recorded_once(flow_app: FlowApp, flow_crash: FlowCrash) -> None:
    flow_crash.at(f"{TASKS}.charge", when="during")
    handle = order("a chair")
    assert handle.result() == ["sent: a chair to Elm Street 1"]
    assert flow_app.ran.count(f"{TASKS}.charge") == 2
    assert results(handle).count("payment of 1200 for order-1") == 1
