"""An expense waits for its approver, who is reminded, and then for the approver's boss. After Temporal's expense
sample, with the reminders that people ask for next."""

from __future__ import annotations

from datetime import timedelta

import pytest
from celery import Celery
from pydantic import BaseModel

from celery_flows import Approval, Flows, Run, WaitTimedOut
from celery_flows.testing import FlowApp, FlowClock, FlowCrash

app = Celery("expense")
app.conf.update(task_default_queue="expense")
flows = Flows(app)


class Expense(BaseModel):
    id: str
    cents: int
    approvers: list[str]


def register(expense: Expense) -> str:
    return expense.id


@app.task
def remind(expense_id: str, approver: str) -> str:
    return f"{approver}: please look at {expense_id}"


@app.task
def pay(expense_id: str, cents: int) -> str:
    return f"paid {cents} for {expense_id}"


# ---- the flow ----

REMINDERS, PATIENCE = 2, timedelta(days=3)


@flows.flow("expense")
def expense_flow(run: Run, expense: Expense) -> str:
    expense_id = run.step(register, expense)
    for approver in expense.approvers:
        run.update(waits_for=approver)
        decision = ask(run, expense_id, approver)
        if decision is not None:
            return run.step(pay, expense_id, expense.cents) if decision.granted else f"refused by {decision.by}"
    return "nobody decided"


def ask(run: Run, expense_id: str, approver: str) -> Approval | None:
    for _ in range(1 + REMINDERS):
        try:
            return run.approval("expense", timeout=PATIENCE)
        except WaitTimedOut:
            run.step(remind, expense_id, approver)
    return None


# ---- its tests ----

EXPENSE = Expense(id="e-1", cents=4200, approvers=["ann", "bob"])
REMIND = "tests.scenarios.test_expense.remind"


@pytest.mark.parametrize(("days", "reminders"), [(0, 0), (3, 1), (8, 2), (10, 3), (17, 5)])
def test_whenever_somebody_decides_it_is_paid(
    flow_app: FlowApp, flow_clock: FlowClock, days: int, reminders: int
) -> None:
    handle = expense_flow.start(EXPENSE)
    flow_clock.advance(days=days)
    assert handle.state() == {"waits_for": "ann" if days < 9 else "bob"}
    handle.approve("expense", by="whoever")
    assert handle.result() == "paid 4200 for e-1"
    assert flow_app.ran.count(REMIND) == reminders


def test_a_refusal_is_told(flow_app: FlowApp) -> None:
    handle = expense_flow.start(EXPENSE)
    handle.reject("expense", by="ann")
    assert handle.result() == "refused by ann"


def test_nobody_decides_for_eighteen_days(flow_app: FlowApp, flow_clock: FlowClock) -> None:
    began = flow_clock.now()
    assert expense_flow.start(EXPENSE).result() == "nobody decided"
    assert (flow_clock.now() - began).days == 18


def test_a_reminder_whose_worker_died_is_sent_again(flow_app: FlowApp, flow_crash: FlowCrash) -> None:
    flow_crash.at(REMIND, when="before")
    assert expense_flow.start(EXPENSE).result() == "nobody decided"
    assert flow_app.ran.count(REMIND) == 6
