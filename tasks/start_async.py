"""Starting flows from asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from datetime import datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Generic, TypeVar, cast

from celery_flows.store.validation import check_list
from celery_flows.tasks.aio import AsyncTransaction, run
from celery_flows.tasks.handle import FlowHandle
from celery_flows.tasks.start import Options, start
from celery_flows.tasks.start_many import start_many, wanted

if TYPE_CHECKING:
    from celery_flows.tasks.registry import FlowDefinition
    from celery_flows.tasks.runtime import Runtime

In = TypeVar("In")
Out = TypeVar("Out")


class AsyncStarts(Generic[In, Out]):
    """What :class:`FlowDefinition` has for asyncio."""

    _runtime: Runtime

    async def astart(
        self,
        input: In | None = None,
        *,
        key: str | None = None,
        owner: str = "default",
        goal: str = "",
        priority: int | None = None,
        countdown: float | timedelta | None = None,
        eta: datetime | None = None,
        session: AsyncTransaction | None = None,
    ) -> FlowHandle[Out]:
        """:meth:`FlowDefinition.start`, awaited; ``session`` is an AsyncSession or AsyncConnection."""
        options = Options(owner, goal, priority, countdown, eta)
        return await run(self._runtime, session, partial(start, self._runtime, self._synchronous, input, key, options))

    async def astart_many(
        self,
        inputs: Iterable[In | None],
        *,
        keys: Iterable[str | None] | None = None,
        owner: str = "default",
        goal: str = "",
        priority: int | None = None,
        countdown: float | timedelta | None = None,
        eta: datetime | None = None,
        session: AsyncTransaction | None = None,
    ) -> list[FlowHandle[Out]]:
        """:meth:`FlowDefinition.start_many`, awaited; ``session`` is an AsyncSession or AsyncConnection."""
        options = Options(owner, goal, priority, countdown, eta)
        each, by = check_list("inputs", inputs), None if keys is None else check_list("keys", keys)
        # Encoding thousands of inputs takes a while.
        asked = await asyncio.to_thread(wanted, self._synchronous, each, by, options)
        call = partial(start_many, self._runtime, self._synchronous, asked, options)
        return await run(self._runtime, session, call)

    @property
    def _synchronous(self) -> FlowDefinition[In, Out]:
        return cast("FlowDefinition[In, Out]", self)
