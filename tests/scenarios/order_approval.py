"""An order waits for a person's yes, who is reminded; without an answer it is closed."""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta

from celery import Celery

from celery_flows import Approval, Flows, Run, WaitTimedOut
from tests.scenarios.outside import outside as mail

app = Celery("orders", set_as_current=False)
flows = Flows(app)

REMINDERS = 2
PATIENCE = timedelta(days=1)  # before each reminder, and after the last


def ask(order: str, flow_id: str) -> None:
    mail.ask(f"please decide on {order}", key=f"{flow_id} asked")


def remind(order: str, number: int) -> None:
    mail.ask(f"reminder {number} of {order}", key=f"{order} {number}")


def ship(order: str) -> str:
    return mail.ask(f"ship {order}", key=f"ship {order}")


def close(order: str, why: str) -> str:
    return mail.ask(f"close {order}, {why}", key=f"close {order}")


@flows.flow("orders/place")
def place(run: Run, order: str) -> str:
    run.step(ask, order, str(run.flow_id))
    decision = decided(run, order)
    if decision is None:
        return run.step(close, order, "nobody answered")
    if not decision.granted:
        return run.step(close, order, f"{decision.by} said no: {decision.comment}")
    return run.step(ship, order)


def decided(run: Run, order: str) -> Approval | None:
    """What the manager says, if anything."""
    for number in range(REMINDERS + 1):
        if number:
            run.step(remind, order, number)
        with suppress(WaitTimedOut):
            return run.approval("manager", timeout=PATIENCE)
    return None
