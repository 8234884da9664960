"""docs/starting.md does what it says: its code is run from top to bottom, as one program."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from celery_flows.store import FlowStatus
from celery_flows.store.engines import make_async_engine
from celery_flows.store.tables import flow_inbox, flows
from tests.support.bench import Bench
from tests.support.waiting import until

PAGE = Path(__file__).parents[2] / "docs" / "starting.md"


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "page_orders"
    id: Mapped[str] = mapped_column(primary_key=True)


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


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


def test_the_page_from_top_to_bottom(bench: Bench) -> None:
    Base.metadata.drop_all(bench.store.engine)
    Base.metadata.create_all(bench.store.engine)
    async_engine, django = make_async_engine(bench.url), Django()
    given = {
        "flows": bench.flows, "Session": Session, "engine": bench.store.engine, "Order": Order, "client": Client(bench),
        "AsyncSession": AsyncSession, "async_engine": async_engine, "transaction": django.transaction,
        "orders": django.orders,
    }  # fmt: skip
    names: dict[str, Any] = dict(given)
    for block in blocks():
        exec(compile(block, str(PAGE), "exec"), names)
        names["orders"] = django.orders

    async def place() -> str:
        placing = asyncio.create_task(names["place"]("order-6"))
        while not placing.done():
            await asyncio.to_thread(bench.work)
        await async_engine.dispose()
        return str(await placing)

    assert asyncio.run(place()) == "ORDER-6"
    names["create_order"]("order-7")
    names["make_up_for_orders_without_flow"]()
    django.after[0]()

    bench.work()
    query = sa.select(flows.c.idempotency_key, flows.c.status, flows.c.input_json)
    status = {row.input_json: row.status for row in bench.query(query)}
    later = {f"order-{n}" for n in (2, 3, 5)}
    assert {order for order in status if status[order] == FlowStatus.CREATED} == later
    assert len(status) == 1 + 100 + 2 + 1 + 1 + 1 + 1
    assert len(bench.query(sa.select(flow_inbox.c.id))) == 2
    assert {row.id for row in bench.query(sa.select(Order.id))} == {"order-4", "order-6"}
    assert set(names["handle"].get().owner_session_key.split(":")) == {"tenant", "acme"}
    until(lambda: not bench.claimable(), "only what is for later is left")


def test_the_schedules_of_the_page_are_beats(bench: Bench) -> None:
    names: dict[str, Any] = {"flows": bench.flows}
    for block in blocks():
        if block.startswith("from datetime") or "schedule=" in block:
            exec(compile(block, str(PAGE), "exec"), names)
    bench.app.finalize()
    assert {"celery-flows: reports/nightly", "celery-flows: stock/check"} < set(bench.app.conf.beat_schedule)
    bench.work()
