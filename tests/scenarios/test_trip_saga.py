"""A car, a hotel and a flight, or none of them. After the trip booking sagas of Temporal and DBOS."""

from __future__ import annotations

from typing import Any

import pytest
from celery import Celery

from celery_flows import FlowFailed, FlowHandle, Flows, FlowStepStatus, Permanent, Retry, Run
from celery_flows.testing import FlowApp, FlowCrash
from tests.scenarios.conftest import Killing
from tests.scenarios.gate import pass_gate
from tests.scenarios.ledger import Ledger

app = Celery("trip_saga")
app.conf.update(task_default_queue="trip-saga", worker_prefetch_multiplier=1)
flows = Flows(app)


class SoldOut(Permanent):
    pass


@app.task
def book(what: str, request: str) -> str:
    if what == "flight to nowhere":
        raise SoldOut(what)
    Ledger().book(f"{request} booked", what, 1)
    return f"{what} booked"


@app.task
def cancel(what: str, request: str) -> str:
    """Heeds requests that never came to anything, too."""
    if what == "hotel":
        pass_gate("cancel hotel")
    Ledger().book(f"{request} cancelled", what, -1 if Ledger().balance(what) else 0)
    return f"{what} cancelled"


# ---- the flow ----


@flows.flow("trip", retry=Retry(max_attempts=5))
def book_trip(run: Run, destination: str) -> list[str]:
    booked = []
    for what in ("car", "hotel", f"flight to {destination}"):
        request = str(run.uuid())
        run.on_failure(cancel, what, request)  # before: a booking that failed may have been made
        booked.append(run.step(book, what, request))
    return booked


# ---- its tests ----

CANCELLED = ["flight to nowhere cancelled", "hotel cancelled", "car cancelled"]


def check_undone(handle: FlowHandle[Any], ledger: Ledger) -> list[str]:
    with pytest.raises(FlowFailed, match="SoldOut") as failed:
        handle.result(timeout=60)
    assert list(failed.value.undo_failed) == []
    steps = [step for step in flows.store.list_steps(handle.id) if step.task.endswith("cancel")]
    assert {step.status for step in steps} == {FlowStepStatus.SUCCEEDED}
    assert [ledger.balance(what) for what in ("car", "hotel", "flight to nowhere")] == [0, 0, 0]
    return [str(step.result_json) for step in steps]


def test_all_is_booked(flow_app: FlowApp, ledger: Ledger) -> None:
    assert book_trip.start("Rome").result() == ["car booked", "hotel booked", "flight to Rome booked"]
    assert ledger.balance("hotel") == 1


@pytest.mark.parametrize("when", ["before", "during", "after", None])
@pytest.mark.parametrize("step", ["book", "cancel"])
def test_or_nothing_is(flow_app: FlowApp, flow_crash: FlowCrash, ledger: Ledger, step: str, when: Any) -> None:
    if when is not None:
        flow_crash.at(step, when=when)
    assert check_undone(book_trip.start("nowhere"), ledger) == CANCELLED


def test_a_worker_killed_while_it_undoes_is_followed_by_another_that_does(killing: Killing, ledger: Ledger) -> None:
    def outcome(handle: FlowHandle[Any]) -> list[str]:
        return check_undone(handle, ledger)

    assert killing.result(lambda: book_trip.start("nowhere"), "cancel hotel", outcome) == CANCELLED
