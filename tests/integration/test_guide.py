"""docs/guide does what it says: the code of each page is run as one program, and then put to the test."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import sqlalchemy as sa
from pydantic import BaseModel
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

import celery_flows
from celery_flows import FlowCancelled, FlowFailed, Permanent
from celery_flows.store import FlowStatus
from celery_flows.store.engines import make_async_engine
from celery_flows.store.tables import flow_inbox, flows
from celery_flows.tasks import maintenance
from tests.support.bench import Bench
from tests.support.waiting import until

Test = TypeVar("Test", bound=Callable[..., Any])

GUIDE = Path(__file__).parents[2] / "docs" / "guide"
ELSEWHERE = {
    "testing": "test_testing_docs.py",
    "mirroring": "test_mirroring_page.py",
    "async": "test_async_page.py",
    "limits": "test_limits_page.py",
    "going-back": "test_going_back_page.py",
}  # a project, a process, a server of its own

_read: set[str] = set()  # the pages that tests here read


def reads(page: str) -> Callable[[Test], Test]:
    """Marks a test that runs this page's code."""
    _read.add(page)
    return pytest.mark.parametrize("page", [page])


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (GUIDE / f"{page}.md").read_text(), re.MULTILINE | re.DOTALL)


def test_every_page_with_code_is_run_by_a_test() -> None:
    pages = {path.stem for path in GUIDE.glob("*.md") if "```python" in path.read_text()}

    assert _read | set(ELSEWHERE) == pages
    assert [name for name in ELSEWHERE.values() if not Path(__file__).with_name(name).exists()] == []


def test_the_index_lists_every_page() -> None:
    linked = set(re.findall(r"^- \[.+?\]\(([\w-]+)\.md\)", (GUIDE / "index.md").read_text(), re.MULTILINE))

    assert linked == {path.stem for path in GUIDE.glob("*.md")} - {"index"}


class CardDeclined(Permanent):
    """What a card's bank says of it."""


class Gateway:
    """What cards are charged by; raises these first."""

    def __init__(self) -> None:
        self.errors: list[Exception] = []

    def charge(self, cents: int) -> str:
        if self.errors:
            raise self.errors.pop()
        return f"paid {cents}"


class Exporter:
    """What says of a job, one after the other, these."""

    def __init__(self) -> None:
        self.states: list[str] = []

    def state(self, job: str) -> str:
        return self.states.pop(0)


class Book:
    """The pages' surroundings: what their code calls and does not define."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.gateway, self.exporter = bench, Gateway(), Exporter()

        @bench.task("shop.charge")
        def charge(order_id: str, cents: int) -> str:
            return f"paid {cents} for {order_id}"

        @bench.task("weigh")
        def weigh(parcel: str) -> int:
            return len(parcel)

        @bench.task("book")
        def book(carrier: str) -> str:
            if carrier == "slow":
                raise LookupError(carrier)
            return f"booked {carrier}"

        noted = (
            "reserve_seat", "release_seat", "book_hotel", "cancel_hotel", "book_flight", "cancel_flight", "pay_for",
            "post", "look_up", "hand_to_courier", "file_away", "ship", "remind", "publish", "withdraw", "insert_row",
            "encode",
        )  # fmt: skip
        self.given: dict[str, Any] = {name: getattr(celery_flows, name) for name in celery_flows.__all__}
        self.given |= {name: self.noted(name) for name in noted}
        self.given |= {
            "app": SimpleNamespace(task=lambda function: bench.task(function.__name__)(function)),
            "flows": bench.flows, "timedelta": timedelta, "datetime": datetime, "date": date,
            "UTC": UTC, "BaseModel": BaseModel, "Session": Session, "text": sa.text, "CardDeclined": CardDeclined,
            "gateway": self.gateway, "exporter": self.exporter, "suppress": suppress, "charge": charge,
            "weigh": weigh, "book": book, "quote": book,
            "reserve": lambda order_id: 3, "measure": lambda: 17, "render": lambda name: time.sleep(10),
            "mail": SimpleNamespace(send=self.noted("send")), "__name__": "page",
        }  # fmt: skip

    def noted(self, name: str) -> Callable[[str], str]:
        """A function of this name that writes down that it ran; not all can be done for all."""

        def function(what: str) -> str:
            self.bench.effects.append(f"{name} {what}")
            if name == "pay_for" and what == "nowhere":
                raise LookupError(what)
            return f"{name} {what}"

        function.__name__ = name
        return function

    def open(self, page: str, **more: Any) -> Any:
        """Runs all code of a page, from top to bottom; gives what it defines."""
        names = {**self.given, **more}
        for block in blocks(page):
            if "handle.result(timeout=60)" in block:
                self.bench.work()
            exec(compile(block, str(GUIDE / f"{page}.md"), "exec", dont_inherit=True), names)
            names |= more
        return SimpleNamespace(**names)


@pytest.fixture
def book(bench: Bench) -> Book:
    return Book(bench)


@pytest.fixture
def guide(book: Book, page: str) -> Any:
    return book.open(page)


@reads("retention")
def test_flows_are_kept_as_long_as_they_say(bench: Bench, book: Book, page: str, tmp_path: Path) -> None:
    uploaded: list[str] = []
    guide = book.open(page, folder=tmp_path, uploaded=uploaded)
    bench.finish(guide.heartbeat.start())
    bench.finish(guide.invoice.start("order-1"))
    assert maintenance.prune(bench.runtime, 0) == 1
    assert [json.loads(line)["flow"]["controller_id"] for line in uploaded] == ["shop/heartbeat"]


@reads("index")
def test_the_first_flow(guide: Any) -> None:
    assert guide.handle.result(0) == "3 boxes, paid 3600 for order-1"


@reads("steps-and-retries")
def test_results_are_read_back_as_what_they_were(bench: Bench, guide: Any) -> None:
    handle, queues = guide.bill.start("order-1"), []
    for _ in range(2):
        bench.drive(handle.id)
        [step] = [row for row in bench.rows(handle.id) if row.kind == "step"]
        queues.append(step.queue)
        bench.run_step(step.run_id)
    assert queues == [bench.queue, "slow"]
    assert bench.finish(handle) == "17 of 2026"


@reads("steps-and-retries")
def test_paying_is_tried_again_but_not_with_a_declined_card(bench: Bench, guide: Any) -> None:
    assert bench.finish(guide.pay.start(5)) == "file_away paid 5"
    guide.gateway.errors = [CardDeclined("no")]
    declined = guide.pay.start(5)
    bench.work()
    assert guide.outcome(declined) == "charge_card: CardDeclined"
    guide.gateway.errors = [ConnectionError("away")]
    handle = guide.pay.start(5)
    assert bench.finish(handle) == "file_away paid 5"
    assert [step.attempt for step in bench.store.list_steps(handle.id)] == [2, 1]
    guide.gateway.errors = [CardDeclined("no")]
    assert bench.finish(guide.pay_somehow.start(5)) == "by invoice, for charge_card failed with CardDeclined"


@reads("steps-and-retries")
def test_steps_with_keys_are_known_by_them(bench: Bench, guide: Any) -> None:
    assert bench.finish(guide.ship_all.start(["a", "b"])) == ["ship a", "ship b"]


@reads("timeouts")
def test_a_step_takes_too_long(bench: Bench, guide: Any) -> None:
    assert bench.finish(guide.print_report.start("sales")) == "took longer than 0.2 s"


@reads("timeouts")
def test_a_flow_past_its_deadline_cleans_up_and_fails(bench: Bench, guide: Any) -> None:
    with pytest.raises(FlowFailed, match="FlowTimedOut"):
        bench.finish(guide.collect_offers.start("t-1"))
    assert bench.effects == ["publish t-1", "withdraw t-1"]


@reads("waits")
def test_time_events_and_people_are_waited_for(bench: Bench, guide: Any) -> None:
    assert bench.finish(guide.end_trial.start("ann")) == "remind ann"
    assert bench.finish(guide.await_payment.start("order-1")) == "paid 1200"
    assert bench.finish(guide.expense) == "refused by ann: too dear"


@reads("waits")
def test_who_does_not_decide_is_reminded(bench: Bench, guide: Any) -> None:
    assert bench.finish(guide.insist.start("bob")) == "nobody"
    assert bench.effects == ["remind bob"] * 2
    decided = guide.insist.start("bob")
    decided.approve("expense", by="bob")
    assert bench.finish(decided) == "bob"


@reads("waits")
@pytest.mark.parametrize(
    ("flow", "steps"), [("watch", ["state", "sleep"] * 2 + ["state"]), ("await_export", ["outcome"])]
)
def test_a_job_is_looked_at_until_it_has_ended(
    bench: Bench, book: Book, guide: Any, flow: str, steps: list[str]
) -> None:
    book.exporter.states = ["running", "running", "ready"]
    handle = getattr(guide, flow).start("job")
    assert bench.finish(handle) == "ready"
    assert [step.task for step in bench.store.list_steps(handle.id)] == steps


@reads("fan-out")
def test_parcels_are_weighed_side_by_side(bench: Bench, guide: Any) -> None:
    assert bench.finish(guide.weigh_all.start(["a", "bb"])) == "3 kg, booked fast"
    assert bench.finish(guide.cheapest.start("a")) == "booked fast"


@reads("fan-out")
def test_payment_a_decision_or_a_time_is_awaited(bench: Bench, guide: Any) -> None:
    paid, free = guide.await_parcel_payment.start("a"), guide.await_parcel_payment.start("b")
    bench.work()
    bench.flows.emit("payment", "a", {"cents": 5})
    free.approve("for free", by="ann")
    assert [bench.finish(handle) for handle in (paid, free)] == ["paid 5", "free"]


@reads("fan-out")
def test_flows_run_flows(bench: Bench, guide: Any) -> None:
    assert bench.finish(guide.deliver_all.start(["a", "b", "c"])) == ["ship a", "ship b", "ship c"]


@reads("cancel-and-pause")
def test_a_seat_is_released_by_a_cancel(bench: Bench, guide: Any) -> None:
    cancelled_first, waiting = guide.handle, guide.hold_seat.start("elsewhere")
    bench.work()
    with pytest.raises(FlowCancelled):
        cancelled_first.result(0)
    waiting.cancel()
    bench.work()
    assert waiting.status() is FlowStatus.CANCELLED
    assert bench.effects[-1] == "release_seat reserve_seat elsewhere"
    bench.flows.emit("payment", "here")
    assert bench.finish(guide.hold_seat.start("here")) == "reserve_seat here"


@reads("cancel-and-pause")
def test_what_is_paused_waits_but_for_its_cancel(bench: Bench, guide: Any) -> None:
    assert bench.finish(guide.paused) == 2
    handle = guide.import_rows.start(["c"])
    handle.pause()
    bench.drive(handle.id)
    assert handle.status() is FlowStatus.CREATED
    handle.cancel()
    bench.work()
    assert handle.status() is FlowStatus.CANCELLED
    assert "insert_row c" not in bench.effects


@reads("sagas")
def test_a_trip_is_booked_or_undone(bench: Bench, guide: Any) -> None:
    assert bench.finish(guide.book_trip.start("there")) == "book_hotel there, book_flight there"
    with pytest.raises(FlowFailed):
        bench.finish(guide.book_trip.start("nowhere"))
    assert bench.effects[-2:] == ["cancel_flight book_flight nowhere", "cancel_hotel book_hotel nowhere"]


@reads("sagas")
def test_an_undo_is_tried_for_longer_than_its_step(bench: Bench, book: Book, page: str) -> None:
    refusals = [LookupError()] * 2

    def cancel_hotel(trip: str) -> None:
        if refusals:
            raise refusals.pop()

    handle = book.open(page, cancel_hotel=cancel_hotel).book_surely.start(["there", "nowhere"])
    with pytest.raises(FlowFailed) as failed:
        bench.finish(handle, seconds=30)
    assert failed.value.undo_failed == ()
    steps = [(step.task, step.status, step.attempt) for step in bench.store.list_steps(handle.id)]
    assert steps[-2:] == [("nowhere", "succeeded", 3), ("there", "succeeded", 1)]


@reads("sagas")
def test_a_trip_is_undone_and_another_is_booked(bench: Bench, guide: Any) -> None:
    assert bench.finish(guide.book_another.start(["nowhere", "there"])) == "book_hotel there"
    assert bench.effects.count("cancel_hotel book_hotel nowhere") == 1
    assert bench.effects[-1] == "pay_for there"


@reads("transactions")
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


@reads("endless-flows")
def test_a_meter_is_read_through_its_lives(bench: Bench, guide: Any) -> None:
    handle = guide.read_meter.start(0)
    for _ in range(7):
        bench.work()
        for flow in bench.store.list_by_status(FlowStatus.WAITING):  # its hour has passed
            bench.flows.handle(flow.id).resume()
    assert handle.result(0) == 102
    assert handle.get().continued_as is not None
    assert guide.is_read(handle)
    assert guide.history_of(handle)[0].kind == "continued"
    assert bench.flows.search(key="meter 1")


@reads("versions")
def test_orders_are_shipped_by_the_latest_version(bench: Bench, guide: Any) -> None:
    assert bench.finish(guide.ship.start("o-1")) == "hand_to_courier look_up o-1"
    assert bench.finish(guide.ship_by_post.start("o-1")) == "post o-1"
    assert guide.ship.start("o-1").get().definition_version == 2


@reads("progress")
def test_progress_is_seen_while_it_is_made(bench: Bench, guide: Any) -> None:
    handle = guide.convert.start(["a", "b"])
    assert handle.state() == {}
    assert bench.finish(handle) == "2 scenes"
    assert handle.state() == {"done": 2, "of": 2}


@reads("bad-input")
def test_a_letter_is_sent_again_and_again(bench: Bench, guide: Any) -> None:
    assert bench.finish(guide.send_letters.start("ann")) == "send ann"
    assert bench.effects == ["send ann"] * 3


# ---- starting ----


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "page_orders"
    id: Mapped[str] = mapped_column(primary_key=True)


class Client:
    """Somebody else's Celery: what it sends is put before our task."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench

    def send_task(self, name: str, kwargs: dict[str, Any], **_: Any) -> None:
        self._bench.app.tasks[name].apply(kwargs=kwargs, task_id="a message", throw=True)


class Django:
    """As much of it as the page needs."""

    def __init__(self) -> None:
        self.created: list[str] = []
        self.after: list[Callable[[], object]] = []
        self.orders = SimpleNamespace(create=lambda id: self.created.append(id), recent_ids=lambda: self.created)
        self.transaction = SimpleNamespace(atomic=nullcontext, on_commit=self.after.append)


@reads("starting")
def test_starting_from_everywhere(bench: Bench, book: Book, page: str) -> None:
    Base.metadata.drop_all(bench.store.engine)
    Base.metadata.create_all(bench.store.engine)
    async_engine, django = make_async_engine(bench.url), Django()
    names = book.open(
        page, engine=bench.store.engine, Order=Order, client=Client(bench), AsyncSession=AsyncSession,
        async_engine=async_engine, transaction=django.transaction, orders=django.orders,
    )  # fmt: skip

    async def place() -> str:
        placing = asyncio.create_task(names.place("order-6"))
        while not placing.done():
            await asyncio.to_thread(bench.work)
        await async_engine.dispose()
        return str(await placing)

    assert asyncio.run(place()) == "ORDER-6"
    names.create_order("order-7")
    names.make_up_for_orders_without_flow()
    django.after[0]()

    bench.work()
    query = sa.select(flows.c.idempotency_key, flows.c.status, flows.c.input_json)
    status = {row.input_json: row.status for row in bench.query(query)}
    later = {f"order-{n}" for n in (2, 3, 5)}
    assert {order for order in status if status[order] == FlowStatus.CREATED} == later
    assert len(status) == 1 + 100 + 2 + 1 + 1 + 1 + 1
    assert len(bench.query(sa.select(flow_inbox.c.id))) == 2
    assert {row.id for row in bench.query(sa.select(Order.id))} == {"order-4", "order-6"}
    assert set(names.handle.get().owner_session_key.split(":")) == {"tenant", "acme"}
    until(lambda: not bench.claimable(), "only what is for later is left")


@reads("starting")
def test_the_schedules_of_the_page_are_beats(bench: Bench, page: str) -> None:
    names: dict[str, Any] = {"flows": bench.flows}
    for block in blocks(page):
        if block.startswith("from datetime") or "schedule=" in block:
            exec(compile(block, page, "exec"), names)
    bench.app.finalize()
    assert {"celery-flows: reports/nightly", "celery-flows: stock/check"} < set(bench.app.conf.beat_schedule)
    bench.work()
