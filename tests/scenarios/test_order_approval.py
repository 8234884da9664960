"""A large order is looked at by a person before it is sent. After the approval samples of Prefect and Absurd."""

from __future__ import annotations

from datetime import timedelta

import pytest
from celery import Celery
from pydantic import BaseModel

from celery_flows import FlowCancelled, Flows, FlowStatus, Run, WaitTimedOut
from celery_flows.testing import FlowApp, FlowClock

app = Celery("order_approval")
app.conf.update(task_default_queue="order-approval")
flows = Flows(app)


class Order(BaseModel):
    id: str
    cents: int


def hold_goods(order: Order) -> str:
    return f"goods of {order.id}"


def free_goods(goods: str) -> str:
    return f"{goods} freed"


@app.task()
def send(goods: str) -> str:
    return f"{goods} sent"


# ---- the flow ----


@flows.flow("order with approval")
def order_with_approval(run: Run, order: Order) -> str:
    goods = run.step(hold_goods, order)
    run.on_failure(free_goods, goods)
    if order.cents > 10_000:
        try:
            decision = run.approval("order", timeout=timedelta(hours=24))
        except WaitTimedOut:
            run.undo()
            return "expired"
        if not decision.granted:
            run.undo()
            return f"refused by {decision.by}"
    return run.step(send, goods)


# ---- its tests ----

LARGE = Order(id="o-1", cents=20_000)


def test_a_small_order_is_sent_at_once(flow_app: FlowApp) -> None:
    handle = order_with_approval.start(Order(id="o-1", cents=5))
    flow_app.run()
    assert handle.result(0) == "goods of o-1 sent"


@pytest.mark.parametrize("early", [True, False])
def test_a_large_one_waits_for_a_person_who_may_come_early(
    flow_app: FlowApp, flow_clock: FlowClock, early: bool
) -> None:
    handle = order_with_approval.start(LARGE)
    if not early:
        flow_clock.advance(hours=23)
        assert handle.status() is FlowStatus.WAITING
    handle.approve("order", by="ann")
    flow_app.run()
    assert handle.result(0) == "goods of o-1 sent"


def test_a_refusal_frees_the_goods(flow_app: FlowApp) -> None:
    handle = order_with_approval.start(LARGE)
    handle.reject("order", by="ann")
    assert handle.result() == "refused by ann"
    assert flow_app.ran == ["hold_goods", "free_goods"]


def test_nobody_comes(flow_app: FlowApp, flow_clock: FlowClock) -> None:
    handle = order_with_approval.start(LARGE)
    flow_clock.advance(hours=24)
    assert handle.result(0) == "expired"
    assert flow_app.ran == ["hold_goods", "free_goods"]


def test_the_customer_cancels_meanwhile(flow_app: FlowApp) -> None:
    handle = order_with_approval.start(LARGE)
    flow_app.run()
    handle.cancel()
    with pytest.raises(FlowCancelled):
        handle.result()
    assert flow_app.ran == ["hold_goods", "free_goods"]
