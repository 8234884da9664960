"""The Celery app and its two flows: an order, and each of its parcels."""

from __future__ import annotations

from datetime import timedelta

from celery import Celery
from pydantic import BaseModel

from celery_flows import Flows, Permanent, Retry, Run, WaitTimedOut

app = Celery("order_fulfilment")
app.conf.update(
    task_default_queue="orders",
    task_routes={f"{__name__}.{name}": {"queue": "payments"} for name in ("charge", "refund")},
    worker_prefetch_multiplier=1,
)
flows = Flows(app)

APPROVED_FROM_CENTS = 100_000


class Line(BaseModel):
    """So many of a thing, at so much each."""

    article: str
    count: int
    cents: int


class Order(BaseModel):
    """What a customer orders."""

    id: str
    address: str
    lines: list[Line]

    @property
    def cents(self) -> int:
        return sum(line.count * line.cents for line in self.lines)


class NotDeliverable(Permanent):
    """No courier takes it."""


# ---- the business: what a real shop would call elsewhere ----


def reserve(order: Order) -> str:
    """Takes the goods off the shelf."""
    return f"reservation {order.id}"


def release(reservation: str) -> str:
    """Puts them back."""
    return f"{reservation} released"


@app.task
def charge(order_id: str, cents: int) -> str:
    """Takes the money. The order's id is the payment provider's idempotency key."""
    return f"payment of {cents} for {order_id}"


@app.task
def refund(payment: str) -> str:
    """Gives it back."""
    return f"{payment} refunded"


@app.task
def print_label(address: str, article: str) -> str:
    """Asks the courier for a label."""
    if article == "a piano":
        raise NotDeliverable(f"no courier carries {article}")
    return f"{article} to {address}"


def hand_over(label: str) -> str:
    """Gives the parcel to the courier."""
    return f"sent: {label}"


def recall(order_id: str) -> str:
    """Has the courier bring back whatever it was given of this order, be it nothing."""
    return f"parcels of {order_id} recalled"


# ---- the flows ----


class Parcel(BaseModel):
    """What goes into one box."""

    address: str
    article: str


@flows.flow("orders/send parcel")
def send_parcel(run: Run, parcel: Parcel) -> str:
    """A child flow for each parcel."""
    label = run.step(print_label, parcel.address, parcel.article)
    return run.step(hand_over, label)


@flows.flow("orders/fulfil", retry=Retry(max_attempts=5), timeout=timedelta(days=30))
def fulfil(run: Run, order: Order) -> list[str]:
    """Ends with what was sent, or with what was not to be."""
    reservation = run.step(reserve, order)
    run.on_failure(release, reservation)
    if order.cents >= APPROVED_FROM_CENTS and (refusal := _refusal(run)):
        run.undo()
        return [refusal]
    payment = run.step(charge, order.id, order.cents)
    run.on_failure(refund, payment)
    run.on_failure(recall, order.id)  # before the parcels: when one fails, others may be on their way
    return run.gather([send_parcel.s(Parcel(address=order.address, article=line.article)) for line in order.lines])


def _refusal(run: Run) -> str:
    """Why a large order is not fulfilled; empty: it is."""
    run.update(asks="manager")
    try:
        decision = run.approval("manager", timeout=timedelta(days=2))
    except WaitTimedOut:
        return "nobody approved"
    run.update(asks=None)
    return "" if decision.granted else f"refused by {decision.by}: {decision.comment}"
