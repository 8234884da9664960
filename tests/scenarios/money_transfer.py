"""Money moves from one account to another, or comes back."""

from __future__ import annotations

from celery import Celery
from pydantic import BaseModel

from celery_flows import Flows, Retry, Run
from tests.scenarios.outside import outside as bank

app = Celery("transfers", set_as_current=False)
flows = Flows(app)


class Transfer(BaseModel):
    reference: str
    source: str
    target: str
    cents: int


def withdraw(order: Transfer) -> str:
    return bank.ask(f"withdraw {order.cents} from {order.source}", key=f"{order.reference} out")


def deposit(order: Transfer) -> str:
    return bank.ask(f"deposit {order.cents} to {order.target}", key=f"{order.reference} in")


def refund(order: Transfer) -> str:
    return bank.ask(f"refund {order.cents} to {order.source}", key=f"{order.reference} back")


@flows.flow("transfers/transfer", retry=Retry(max_attempts=3))
def transfer(run: Run, order: Transfer) -> list[str]:
    withdrawn = run.step(withdraw, order)
    run.on_failure(refund, order)
    return [withdrawn, run.step(deposit, order)]
