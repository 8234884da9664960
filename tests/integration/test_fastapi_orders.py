"""The example over HTTP: a request's transaction holds the order and its flow alike."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import sqlalchemy as sa

from celery_flows.store.engines import make_async_engine
from celery_flows.store.tables import flows as flows_table
from examples.fastapi_orders.api import Base, make_api
from examples.fastapi_orders.orders import app
from tests.integration.conftest import MakeBench
from tests.support.bench import Bench

Story = Callable[[httpx.AsyncClient], Awaitable[None]]
ORDER = {"id": "order-1", "cents": 1200}


@asynccontextmanager
async def a_client(url: str) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the application, which runs in this process and loop."""
    engine = make_async_engine(url)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.drop_all)  # of an earlier test
    api = make_api(engine)
    transport = httpx.ASGITransport(app=api, raise_app_exceptions=False)
    async with (
        api.router.lifespan_context(api),
        httpx.AsyncClient(transport=transport, base_url="http://orders") as client,
    ):
        yield client


def tell(make_bench: MakeBench, story: Callable[[httpx.AsyncClient, Bench], Awaitable[None]]) -> None:
    bench = make_bench(app=app)

    async def told() -> None:
        async with a_client(bench.url) as client:
            await story(client, bench)

    asyncio.run(told())


async def status(client: httpx.AsyncClient) -> Any:
    return (await client.get("/orders/order-1")).json()


def count(bench: Bench) -> int:
    return len(bench.query(sa.select(flows_table.c.id)))


def test_an_order_is_taken_approved_and_fulfilled(make_bench: MakeBench) -> None:
    async def story(client: httpx.AsyncClient, bench: Bench) -> None:
        first, again = [await client.put("/orders", json=ORDER) for _ in range(2)]
        assert (first.status_code, again.json()) == (200, first.json())
        assert (await status(client))["status"] == "created"
        await asyncio.to_thread(bench.work)
        assert (await status(client))["status"] == "waiting"
        approved = await client.post("/orders/order-1/approval", json={"by": "Ada"})
        assert approved.status_code == 202
        await asyncio.to_thread(bench.finish, bench.flows.handle(first.json()["flow"]))
        assert (await status(client))["result"] == "paid 1200 for order-1, approved by Ada"
        late = await client.delete("/orders/order-1")
        assert (late.status_code, "it has ended" in late.json()["detail"]) == (409, True)

    tell(make_bench, story)


def test_an_order_that_is_cancelled_is_refunded(make_bench: MakeBench) -> None:
    async def story(client: httpx.AsyncClient, bench: Bench) -> None:
        flow_id = (await client.put("/orders", json=ORDER)).json()["flow"]
        await asyncio.to_thread(bench.work)
        assert (await client.delete("/orders/order-1")).status_code == 202
        await asyncio.to_thread(bench.work)
        assert (await status(client))["status"] == "cancelled"
        steps = bench.store.list_steps(bench.flows.handle(flow_id).id)
        assert steps[-1].result_json == "refunded: paid 1200 for order-1"

    tell(make_bench, story)


def test_what_is_refused_leaves_neither_order_nor_flow(make_bench: MakeBench) -> None:
    async def story(client: httpx.AsyncClient, bench: Bench) -> None:
        assert (await client.put("/orders", json={**ORDER, "cents": 0})).status_code == 422
        assert (await client.get("/orders/order-1")).status_code == 404
        assert (await client.post("/orders/order-1/approval", json={"by": "Ada"})).status_code == 404
        await client.put("/orders", json=ORDER)
        other = await client.put("/orders", json={**ORDER, "cents": 9})
        assert (other.status_code, "use another key" in other.json()["detail"]) == (409, True)
        assert count(bench) == 1
        await asyncio.to_thread(bench.work)

    tell(make_bench, story)


def test_a_transaction_that_fails_after_the_start_takes_the_flow_with_it(make_bench: MakeBench) -> None:
    async def story(client: httpx.AsyncClient, bench: Bench) -> None:
        with bench.store.engine.begin() as connection:
            connection.exec_driver_sql("DROP TABLE orders")
        assert (await client.put("/orders", json=ORDER)).status_code == 500
        assert (count(bench), bench.messages()) == (0, [])

    tell(make_bench, story)
