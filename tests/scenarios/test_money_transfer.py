"""Money goes from one account to another, or comes back. After Temporal's money transfer."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from celery import Celery
from pydantic import BaseModel

from celery_flows import FlowFailed, FlowHandle, Flows, Permanent, Retry, Run
from celery_flows.testing import FlowApp, FlowCrash
from tests.scenarios.conftest import Killing
from tests.scenarios.gate import pass_gate
from tests.scenarios.ledger import Ledger

app = Celery("money_transfer")
app.conf.update(task_default_queue="money-transfer", worker_prefetch_multiplier=1)
flows = Flows(app)


class Transfer(BaseModel):
    reference: str
    source: str
    target: str
    cents: int


class NoSuchAccount(Permanent):
    pass


@app.task
def withdraw(transfer: dict[str, Any]) -> str:
    return Ledger().book(f"{transfer['reference']} out", transfer["source"], -transfer["cents"])


@app.task
def deposit(transfer: dict[str, Any]) -> str:
    if transfer["target"] == "nobody":
        raise NoSuchAccount(transfer["target"])
    booked = Ledger().book(f"{transfer['reference']} in", transfer["target"], transfer["cents"])
    pass_gate("deposit")
    return booked


@app.task
def give_back(transfer: dict[str, Any]) -> str:
    return Ledger().book(f"{transfer['reference']} back", transfer["source"], transfer["cents"])


# ---- the flow ----


@flows.flow("transfer", retry=Retry(max_attempts=10, maximum=timedelta(seconds=2)))
def transfer_money(run: Run, transfer: Transfer) -> str:
    told = transfer.model_dump()
    withdrawn = run.step(withdraw, told)
    run.on_failure(give_back, told)
    deposited = run.step(deposit, told)
    return f"{withdrawn}, {deposited}"


# ---- its tests ----

TEN = Transfer(reference="t-1", source="ann", target="bob", cents=10)


@pytest.mark.parametrize("when", ["before", "during", "after", None])
@pytest.mark.parametrize("step", ["withdraw", "deposit"])
def test_money_is_moved_once(flow_app: FlowApp, flow_crash: FlowCrash, ledger: Ledger, step: str, when: Any) -> None:
    if when is not None:
        flow_crash.at(step, when=when)
    assert transfer_money.start(TEN, key="t-1").result() == "t-1 out, t-1 in"
    assert (ledger.balance("ann"), ledger.balance("bob")) == (-10, 10)


def test_what_cannot_be_deposited_comes_back(flow_app: FlowApp, ledger: Ledger) -> None:
    handle = transfer_money.start(TEN.model_copy(update={"target": "nobody"}))
    with pytest.raises(FlowFailed, match="NoSuchAccount"):
        handle.result()
    assert (ledger.balance("ann"), ledger.balance("nobody")) == (0, 0)
    assert sum("deposit" in name for name in flow_app.ran) == 1


def test_a_worker_killed_with_the_money_in_its_hands_moves_it_once(killing: Killing, ledger: Ledger) -> None:
    def outcome(handle: FlowHandle[str]) -> str:
        return handle.result(timeout=60)

    assert killing.result(lambda: transfer_money.start(TEN, key="t-1"), "deposit", outcome) == "t-1 out, t-1 in"
    assert (ledger.balance("ann"), ledger.balance("bob")) == (-10, 10)
