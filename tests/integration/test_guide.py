"""The guide's code, run as it stands."""

from __future__ import annotations

import re
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from celery_flows import FlowCancelled, FlowFailed, FlowStatus, Permanent, Retry, Run, StepFailed, step
from tests.support.bench import Bench

GUIDE = Path(__file__).parents[2] / "docs" / "guide.md"
BLOCKS = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)


class CardDeclined(Permanent):
    """What the guide's gateway says of a card."""


class Gateway:
    """What the guide charges cards by."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)

    def charge(self, cents: int) -> str:
        if self.errors:
            raise self.errors.pop()
        return f"paid {cents}"


@pytest.fixture
def guide(bench: Bench) -> Any:
    """The definitions of the guide's flows, by the names of their functions; what they call is written here."""

    def noted(name: str) -> Any:
        def function(what: str) -> str:
            bench.effects.append(f"{name} {what}")
            if what == "nowhere" and name == "pay_for":
                raise LookupError(what)
            return f"{name} {what}"

        function.__name__ = name
        return function

    @bench.task("weigh")
    def weigh(parcel: str) -> int:
        return len(parcel)

    @bench.task("book")
    def book_carrier(carrier: str) -> str:
        if carrier == "slow":
            raise LookupError(carrier)
        return f"booked {carrier}"

    @bench.task("quote")
    def quote(carrier: str) -> str:
        if carrier == "slow":
            raise LookupError(carrier)
        return f"offer of {carrier}"

    functions = (
        "print_receipt", "reserve_seat", "release_seat", "book_hotel", "cancel_hotel", "book_flight", "cancel_flight",
        "pay_for", "post", "look_up", "hand_to_courier",
    )  # fmt: skip
    names: dict[str, Any] = {name: noted(name) for name in functions}
    names |= {
        "app": bench.app, "flows": bench.flows, "Run": Run, "Retry": Retry, "step": step, "timedelta": timedelta,
        "FlowCancelled": FlowCancelled, "StepFailed": StepFailed, "CardDeclined": CardDeclined, "gateway": Gateway(),
        "measure": lambda: 17, "weigh": weigh, "quote": quote, "book": book_carrier, "Session": Session,
        "text": sa.text,
    }  # fmt: skip
    for block in BLOCKS:
        if "def book(run" in block:  # the cancelling example has a name of its own for its function
            block = block.replace("def book(run", "def book_seat(run")
        exec(compile(block, str(GUIDE), "exec", dont_inherit=True), names)
    return SimpleNamespace(**names)


def test_there_is_code_in_the_guide() -> None:
    assert len(BLOCKS) >= 7


def test_paying_is_tried_again_but_not_with_a_declined_card(bench: Bench, guide: Any) -> None:
    assert bench.finish(guide.pay.start(5)) == "print_receipt paid 5"
    guide.gateway.errors = [CardDeclined("no")]
    with pytest.raises(FlowFailed, match="CardDeclined"):
        bench.finish(guide.pay.start(5))
    guide.gateway.errors = [ConnectionError("away")]
    handle = guide.pay.start(5)
    assert bench.finish(handle) == "print_receipt paid 5"
    assert [step.attempt for step in bench.store.list_steps(handle.id)] == [2, 1]


def test_parcels_are_weighed_side_by_side(bench: Bench, guide: Any) -> None:
    assert bench.finish(guide.weigh_all.start(["a", "bb"])) == "3 kg, booked fast, offer of fast"


def test_a_trip_is_booked_or_undone(bench: Bench, guide: Any) -> None:
    assert bench.finish(guide.book_trip.start("there")) == "book_hotel there, book_flight there"
    with pytest.raises(FlowFailed):
        bench.finish(guide.book_trip.start("nowhere"))
    assert bench.effects[-2:] == ["cancel_flight book_flight nowhere", "cancel_hotel book_hotel nowhere"]


def test_money_is_moved_once(bench: Bench, guide: Any) -> None:
    with bench.store.engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE accounts (name TEXT, cents INTEGER)"))
        connection.execute(sa.text("INSERT INTO accounts VALUES ('a', 10), ('b', 0)"))
    try:
        assert bench.finish(guide.move.start(3)) == "moved 3"
        assert dict(map(tuple, bench.query(sa.text("SELECT name, cents FROM accounts")))) == {"a": 7, "b": 3}
    finally:
        with bench.store.engine.begin() as connection:
            connection.execute(sa.text("DROP TABLE accounts"))


def test_an_expense_is_decided(bench: Bench, guide: Any) -> None:
    handle = guide.claim.start(5)
    bench.work()
    handle.reject("expense", by="ann")
    assert bench.finish(handle) == "refused by ann"


def test_a_seat_is_released_by_a_cancel(bench: Bench, guide: Any) -> None:
    handle = guide.book_seat.start("there")
    bench.work()
    handle.cancel()
    bench.work()
    assert bench.effects[-1] == "release_seat reserve_seat there"
    bench.flows.emit("payment", "here")
    assert bench.finish(guide.book_seat.start("here")) == "reserve_seat here"


def test_a_meter_is_read_through_its_lives(bench: Bench, guide: Any) -> None:
    handle = guide.read_meter.start(0)
    for _ in range(7):
        bench.work()
        advance(bench)
    assert handle.result(0) == 102
    assert handle.get().continued_as is not None


def advance(bench: Bench) -> None:
    """The hour of every timer has passed."""
    for flow in bench.store.list_by_status(FlowStatus.WAITING):
        bench.flows.handle(flow.id).resume()


def test_orders_are_shipped_by_the_latest_version(bench: Bench, guide: Any) -> None:
    assert bench.finish(guide.ship.start("o-1")) == "hand_to_courier look_up o-1"
    assert guide.ship.start("o-1").get().definition_version == 2
