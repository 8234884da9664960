"""How the application's side is called from asyncio, by the methods whose names begin with an a.

Inside the caller's transaction they run on its async connection; else in a thread, on this process's own. Neither keeps
the event loop waiting for a database or a broker.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session

from celery_flows.store import InvalidData

if TYPE_CHECKING:
    from celery_flows.tasks.runtime import Runtime

T = TypeVar("T")

AsyncTransaction = AsyncConnection | AsyncSession


async def run(runtime: Runtime, session: AsyncTransaction | None, call: Callable[..., T]) -> T:
    """Calls ``call(session=…)`` with the synchronous face of the caller's transaction; without one, in a thread, with
    None.

    Raises:
        InvalidData: the session is no async one.
    """
    if session is None:
        return await asyncio.to_thread(call, session=None)
    given = _given(session)
    await asyncio.to_thread(lambda: runtime.store)  # its first use connects
    return await given.run_sync(lambda face: call(session=face))


def _given(session: Any) -> AsyncTransaction:
    if isinstance(session, async_scoped_session):
        scoped: AsyncSession = session()
        return scoped
    if isinstance(session, AsyncSession | AsyncConnection):
        return session
    raise InvalidData("session", f"must be an AsyncSession or AsyncConnection, not {type(session).__name__}")
