"""AsyncRun: what an async flow function is handed. :class:`Run`, awaited."""

from __future__ import annotations

from asyncio import CancelledError
from collections.abc import Callable, Coroutine, Iterable
from datetime import datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Concatenate, Literal, NoReturn, ParamSpec, TypeVar, overload
from uuid import UUID

from celery import Signature
from sqlalchemy.orm import Session

from celery_flows.store import InvalidData
from celery_flows.tasks.approval import Approval
from celery_flows.tasks.children import ChildFlow
from celery_flows.tasks.errors import StepFailed
from celery_flows.tasks.gather import First, Work
from celery_flows.tasks.loop import spawn
from celery_flows.tasks.retry import Retry
from celery_flows.tasks.run import Run

if TYPE_CHECKING:
    from celery_flows.tasks.registry import FlowDefinition

P = ParamSpec("P")
T = TypeVar("T")
In = TypeVar("In")
Out = TypeVar("Out")


class AsyncRun:
    """The flow's own view of itself, for an ``async def``. What :class:`Run` says of its methods holds for these.

    Steps are taken one after the other; side by side they are the members of one :meth:`gather`. A task that takes a
    step beside another's is refused, for which comes first would depend on how long they take. A step is bounded by
    ``run.options(timeout=…)``; one that is cancelled by the function, as ``asyncio.timeout`` does, raises InvalidData.

    What neither waits nor records is not awaited.
    """

    def __init__(self, run: Run) -> None:
        self._run, self._replay = run, run._replay
        self.flow_id: UUID = run.flow_id
        self.owner: str = run.owner
        self.logger = run.logger

    async def _take(self, what: str, call: Callable[[], T]) -> T:
        if self._is_ending:  # cleaning up in the function, as it is cancelled, takes no steps
            raise CancelledError
        with self._replay.taking(f"run.{what}"):
            try:
                return await spawn(call)
            except Exception:
                raise
            except CancelledError:
                if self._is_ending:
                    raise
                told = "was cancelled by the flow function; bound a step by run.options(timeout=…)"
                raise InvalidData(f"run.{what}", told) from None
            except BaseException as error:
                self._replay.unwound_by = error
                self._replay.driver.loop.end_main()
                raise

    @property
    def _is_ending(self) -> bool:
        return self._replay.driver.loop.is_ending or self._replay.unwound_by is not None

    # ---- steps ----

    def options(
        self,
        *,
        name: str | None = None,
        retry: Retry | None = None,
        timeout: timedelta | None = None,
        key: str | None = None,
    ) -> AsyncRun:
        """:meth:`Run.options`. An async function is cancelled past its timeout, under each kind of pool."""
        return AsyncRun(self._run.options(name=name, retry=retry, timeout=timeout, key=key))

    @overload
    async def step(self, work: Signature[T], /) -> T: ...
    @overload
    async def step(self, work: Callable[P, Coroutine[Any, Any, T]], /, *args: P.args, **kwargs: P.kwargs) -> T: ...
    @overload
    async def step(self, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T: ...
    async def step(self, work: Any, /, *args: Any, **kwargs: Any) -> Any:
        """:meth:`Run.step`. A function that is not async keeps the event loop waiting."""
        return await self._take("step", partial(self._run.step, work, *args, **kwargs))

    async def transaction(self, work: Callable[Concatenate[Session, P], T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """:meth:`Run.transaction`, of a plain function with a plain Session."""
        return await self._take("transaction", partial(self._run.transaction, work, *args, **kwargs))

    async def flow(self, definition: FlowDefinition[In, Out], input: In | None = None, /) -> Out:
        """:meth:`Run.flow`."""
        return await self._take("flow", partial(self._run.flow, definition, input))

    @overload
    async def gather(
        self,
        members: Iterable[Signature[T] | ChildFlow[T] | Callable[[], Coroutine[Any, Any, T]]],
        *,
        limit: int | None = None,
    ) -> list[T]: ...
    @overload
    async def gather(
        self, members: Iterable[Signature[T] | ChildFlow[T] | Callable[[], T]], *, limit: int | None = None
    ) -> list[T]: ...
    @overload
    async def gather(
        self,
        members: Iterable[Signature[T] | ChildFlow[T] | Callable[[], Coroutine[Any, Any, T]]],
        *,
        return_exceptions: Literal[True],
        limit: int | None = None,
    ) -> list[T | StepFailed]: ...
    @overload
    async def gather(
        self,
        members: Iterable[Signature[T] | ChildFlow[T] | Callable[[], T]],
        *,
        return_exceptions: Literal[True],
        limit: int | None = None,
    ) -> list[T | StepFailed]: ...
    @overload
    async def gather(
        self, members: Iterable[Work], *, return_exceptions: bool = False, limit: int | None = None
    ) -> list[Any]: ...
    async def gather(
        self, members: Iterable[Work], *, return_exceptions: bool = False, limit: int | None = None
    ) -> list[Any]:
        """:meth:`Run.gather`."""
        call = partial(self._run.gather, members, return_exceptions=return_exceptions, limit=limit)
        return await self._take("gather", call)

    @overload
    async def first(self, members: Iterable[Signature[T] | ChildFlow[T]], /) -> First[int, T]: ...
    @overload
    async def first(self, members: Iterable[Work], /) -> First[int, Any]: ...
    @overload
    async def first(self, /, **members: Signature[T] | ChildFlow[T]) -> First[str, T]: ...
    @overload
    async def first(self, /, **members: Work) -> First[str, Any]: ...
    async def first(self, members: Iterable[Any] | None = None, /, **named: Any) -> First[Any, Any]:
        """:meth:`Run.first`."""
        return await self._take("first", partial(self._run.first, members, **named))

    # ---- undoing ----

    @overload
    def on_failure(self, undo: Signature[Any], /) -> None: ...
    @overload
    def on_failure(self, undo: Callable[P, object], /, *args: P.args, **kwargs: P.kwargs) -> None: ...
    def on_failure(self, undo: Any, /, *args: Any, **kwargs: Any) -> None:
        """:meth:`Run.on_failure`; not awaited, for it is only noted. An async function is run in an event loop as a
        step is, when this one has ended."""
        self._replay.refuse_beside("run.on_failure")
        self._run.on_failure(undo, *args, **kwargs)

    async def undo(self) -> list[str]:
        """:meth:`Run.undo`."""
        return await self._take("undo", self._run.undo)

    # ---- waits ----

    async def sleep(self, duration: timedelta) -> None:
        """:meth:`Run.sleep`."""
        await self._take("sleep", partial(self._run.sleep, duration))

    async def sleep_until(self, at: datetime) -> None:
        """:meth:`Run.sleep_until`."""
        await self._take("sleep_until", partial(self._run.sleep_until, at))

    async def wait_for(self, topic: str, correlation_id: str, *, timeout: timedelta | None = None) -> Any:
        """:meth:`Run.wait_for`."""
        return await self._take("wait_for", partial(self._run.wait_for, topic, correlation_id, timeout=timeout))

    async def approval(self, name: str, *, timeout: timedelta | None = None) -> Approval:
        """:meth:`Run.approval`."""
        return await self._take("approval", partial(self._run.approval, name, timeout=timeout))

    # ---- what is recorded besides ----

    async def update(self, **state: Any) -> None:
        """:meth:`Run.update`."""
        await self._take("update", partial(self._run.update, **state))

    async def restart_as(self, input: Any = None) -> NoReturn:
        """:meth:`Run.restart_as`."""
        await self._take("restart_as", partial(self._run.restart_as, input))
        raise AssertionError("the driver suspends")

    async def now(self) -> datetime:
        """:meth:`Run.now`."""
        return await self._take("now", self._run.now)

    def uuid(self) -> UUID:
        """:meth:`Run.uuid`; not awaited, for it costs no record."""
        self._replay.refuse_beside("run.uuid()")
        return self._run.uuid()

    def random(self) -> float:
        """:meth:`Run.random`; not awaited, as :meth:`uuid`."""
        self._replay.refuse_beside("run.random()")
        return self._run.random()
