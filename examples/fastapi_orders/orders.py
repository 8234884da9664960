"""The Celery app and its flow: charge, wait for an approval, ship."""

from __future__ import annotations

from datetime import timedelta

from celery import Celery
from pydantic import BaseModel, Field

from celery_flows import FlowCancelled, Flows, Run

app = Celery("orders")
app.conf.task_default_queue = "orders"
flows = Flows(app)


class NewOrder(BaseModel):
    """What a customer orders."""

    id: str = Field(max_length=100)
    cents: int = Field(gt=0)


@app.task
def charge(order_id: str, cents: int) -> str:
    """Takes the money. The order's id is the payment provider's idempotency key."""
    return f"paid {cents} for {order_id}"


@app.task
def refund(payment: str) -> str:
    """Gives it back."""
    return f"refunded: {payment}"


@flows.flow("orders/fulfil")
def fulfil(run: Run, order: NewOrder) -> str:
    """Ends with the payment, and who approved of it."""
    payment = run.step(charge, order.id, order.cents)
    try:
        approval = run.wait_for("approval", order.id, timeout=timedelta(days=3))
    except FlowCancelled:
        run.step(refund, payment)
        raise
    return f"{payment}, approved by {approval['by']}"
