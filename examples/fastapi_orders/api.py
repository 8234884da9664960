"""The HTTP side. What a request writes, and what it does to a flow, is one transaction: both, or neither."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any
from uuid import UUID

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from celery_flows import AlreadyTerminal, FlowError, FlowNotFound, FlowStatus, InvalidData, KeyConflict
from examples.fastapi_orders.orders import NewOrder, flows, fulfil


class Base(DeclarativeBase):
    """The application's own tables."""


class Order(Base):
    """An order, and the flow that fulfils it."""

    __tablename__ = "orders"

    id: Mapped[str] = mapped_column(primary_key=True)
    cents: Mapped[int]
    flow_id: Mapped[UUID]


class Approval(BaseModel):
    """Who says yes."""

    by: str


async def a_session(request: Request) -> AsyncIterator[AsyncSession]:
    """A session for one request."""
    async with request.app.state.sessions() as session:
        yield session


DatabaseSession = Annotated[AsyncSession, Depends(a_session)]


async def put_order(order: NewOrder, session: DatabaseSession) -> dict[str, Any]:
    """Takes an order. Sent twice it is one order and one flow: the flow's key is the order's id."""
    async with session.begin():
        handle = await fulfil.astart(order, key=order.id, session=session)
        await session.merge(Order(id=order.id, cents=order.cents, flow_id=handle.id))
    return {"order": order.id, "flow": handle.id}


async def get_order(order_id: str, session: DatabaseSession) -> dict[str, Any]:
    """How an order stands."""
    flow = await flows.handle((await _known(session, order_id)).flow_id).aget()
    told: dict[str, Any] = {"order": order_id, "status": flow.status, "step": flow.current_step}
    return {**told, "result": flow.result_json} if flow.status is FlowStatus.FINISHED else told


async def post_approval(order_id: str, approval: Approval, session: DatabaseSession) -> dict[str, Any]:
    """Tells the flow; kept for it, if it does not wait yet."""
    async with session.begin():
        await _known(session, order_id)
        event_id = await flows.aemit("approval", order_id, approval.model_dump(), session=session)
    return {"event": event_id}


async def delete_order(order_id: str, session: DatabaseSession) -> dict[str, Any]:
    """Asks the flow to cancel; it gives the money back first."""
    async with session.begin():
        order = await _known(session, order_id)
        await flows.handle(order.flow_id).acancel(session=session)
    return {"order": order_id}


async def _known(session: AsyncSession, order_id: str) -> Order:
    order = await session.get(Order, order_id)
    if order is None:
        raise HTTPException(404, f"no order {order_id}")
    return order


STATUS_CODES: dict[type[FlowError], int] = {
    KeyConflict: 409, AlreadyTerminal: 409, InvalidData: 422, FlowNotFound: 404,
}  # fmt: skip


async def answer_error(_: Request, error: Exception) -> JSONResponse:
    """What a flow refuses is the client's to know, in one sentence; anything else says: later."""
    code = next((code for kind, code in STATUS_CODES.items() if isinstance(error, kind)), 503)
    return JSONResponse({"detail": str(error)}, code)


def make_api(engine: AsyncEngine | None = None) -> FastAPI:
    """The application, over an engine or ``DATABASE_URL``; its tables are made at its start."""
    database = engine or create_async_engine(os.environ["DATABASE_URL"])

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with database.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        try:
            yield
        finally:
            await database.dispose()

    api = FastAPI(lifespan=lifespan)
    api.state.sessions = async_sessionmaker(database)
    api.put("/orders")(put_order)
    api.get("/orders/{order_id}")(get_order)
    api.post("/orders/{order_id}/approval", status_code=202)(post_approval)
    api.delete("/orders/{order_id}", status_code=202)(delete_order)
    api.exception_handler(FlowError)(answer_error)
    return api
