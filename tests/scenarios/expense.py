"""An expense, which either of two people may decide on; after a week it is refused."""

from __future__ import annotations

from datetime import timedelta

from celery import Celery
from pydantic import BaseModel

from celery_flows import Decision, Flows, Run, Timer
from tests.scenarios.outside import outside as office

app = Celery("expenses", set_as_current=False)
flows = Flows(app)

PEOPLE = ("manager", "accountant")
PATIENCE = timedelta(days=7)


class Expense(BaseModel):
    number: int
    cents: int


def ask(person: str, expense: Expense) -> None:
    office.ask(f"ask {person} about {expense.number}", key=f"{expense.number} {person}")


def pay(expense: Expense) -> str:
    return office.ask(f"pay {expense.cents}", key=f"pay {expense.number}")


@flows.flow("expenses/claim")
def claim(run: Run, expense: Expense) -> str:
    for person in PEOPLE:
        run.step(ask, person, expense)
    first = run.first(manager=Decision("manager"), accountant=Decision("accountant"), late=Timer(PATIENCE))
    if first.which == "late":
        return "nobody decided"
    if not first.value.granted:
        return f"refused by {first.value.by}"
    return run.step(pay, expense)
