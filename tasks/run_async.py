"""AsyncRun: what an async flow function is handed. :class:`Run`, awaited."""

from __future__ import annotations

from asyncio import CancelledError
from collections.abc import Callable, Coroutine, Iterable
from datetime import datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Concatenate, Literal, NoReturn, ParamSpec, TypeAlias, TypeVar, overload
from uuid import UUID

from celery import Signature
from sqlalchemy.orm import Session

from celery_flows.store import InvalidData
from celery_flows.tasks.approval import Approval
from celery_flows.tasks.children import ChildFlow
from celery_flows.tasks.errors import StepFailed
from celery_flows.tasks.gather import First
from celery_flows.tasks.loop import spawn
from celery_flows.tasks.retry import Retry
from celery_flows.tasks.run import Run
from celery_flows.tasks.work import Work

if TYPE_CHECKING:
    from celery_flows.tasks.registry import FlowDefinition

P = ParamSpec("P")
T = TypeVar("T")
In = TypeVar("In")
Out = TypeVar("Out")

Promised: TypeAlias = Coroutine[Any, Any, T]  # begins when it is awaited


class AsyncRun:
    """The flow's own view of itself, for an ``async def``. What :class:`Run` says of its methods holds for these.

    Steps are taken one after the other; side by side they are the members of one :meth:`gather`. A task that takes a
    step beside another's is refused, for which comes first would depend on how long they take. A step is bounded by
    ``run.options(timeout=…)``; one that is cancelled by the function, as ``asyncio.timeout`` does, raises InvalidData.

    What neither waits nor records is not awaited. What was to be awaited, and was not, fails the flow when its function
    ends.
    """

    def __init__(self, run: Run) -> None:
        self._run, self._replay = run, run._replay
        self.flow_id: UUID = run.flow_id
        self.owner: str = run.owner
        self.logger = run.logger

    def _take(self, what: str, call: Callable[[], T]) -> Promised[T]:
        taken = self._taken(what, call)
        self._replay.note_promised(f"run.{what}", taken)
        return taken

    async def _taken(self, what: str, call: Callable[[], T]) -> T:
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
    def step(self, work: Signature[T], /) -> Promised[T]: ...
    @overload
    def step(self, work: Callable[P, Coroutine[Any, Any, T]], /, *args: P.args, **kwargs: P.kwargs) -> Promised[T]: ...
    @overload
    def step(self, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Promised[T]: ...
    def step(self, work: Any, /, *args: Any, **kwargs: Any) -> Promised[Any]:
        """:meth:`Run.step`. A function that is not async keeps the event loop waiting."""
        return self._take("step", partial(self._run.step, work, *args, **kwargs))

    def transaction(
        self, work: Callable[Concatenate[Session, P], T], /, *args: P.args, **kwargs: P.kwargs
    ) -> Promised[T]:
        """:meth:`Run.transaction`, of a plain function with a plain Session."""
        return self._take("transaction", partial(self._run.transaction, work, *args, **kwargs))

    def flow(self, definition: FlowDefinition[In, Out], input: In | None = None, /) -> Promised[Out]:
        """:meth:`Run.flow`."""
        return self._take("flow", partial(self._run.flow, definition, input))

    @overload
    def gather(
        self,
        members: Iterable[Signature[T] | ChildFlow[T] | Callable[[], Coroutine[Any, Any, T]]],
        *,
        limit: int | None = None,
    ) -> Promised[list[T]]: ...
    @overload
    def gather(
        self, members: Iterable[Signature[T] | ChildFlow[T] | Callable[[], T]], *, limit: int | None = None
    ) -> Promised[list[T]]: ...
    @overload
    def gather(
        self,
        members: Iterable[Signature[T] | ChildFlow[T] | Callable[[], Coroutine[Any, Any, T]]],
        *,
        return_exceptions: Literal[True],
        limit: int | None = None,
    ) -> Promised[list[T | StepFailed]]: ...
    @overload
    def gather(
        self,
        members: Iterable[Signature[T] | ChildFlow[T] | Callable[[], T]],
        *,
        return_exceptions: Literal[True],
        limit: int | None = None,
    ) -> Promised[list[T | StepFailed]]: ...
    @overload
    def gather(
        self, members: Iterable[Work], *, return_exceptions: bool = False, limit: int | None = None
    ) -> Promised[list[Any]]: ...
    def gather(
        self, members: Iterable[Work], *, return_exceptions: bool = False, limit: int | None = None
    ) -> Promised[list[Any]]:
        """:meth:`Run.gather`."""
        call = partial(self._run.gather, members, return_exceptions=return_exceptions, limit=limit)
        return self._take("gather", call)

    @overload
    def first(self, members: Iterable[Signature[T] | ChildFlow[T]], /) -> Promised[First[int, T]]: ...
    @overload
    def first(self, members: Iterable[Work], /) -> Promised[First[int, Any]]: ...
    @overload
    def first(self, /, **members: Signature[T] | ChildFlow[T]) -> Promised[First[str, T]]: ...
    @overload
    def first(self, /, **members: Work) -> Promised[First[str, Any]]: ...
    def first(self, members: Iterable[Any] | None = None, /, **named: Any) -> Promised[First[Any, Any]]:
        """:meth:`Run.first`."""
        return self._take("first", partial(self._run.first, members, **named))

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

    def undo(self) -> Promised[list[str]]:
        """:meth:`Run.undo`."""
        return self._take("undo", self._run.undo)

    # ---- waits ----

    def sleep(self, duration: timedelta) -> Promised[None]:
        """:meth:`Run.sleep`."""
        return self._take("sleep", partial(self._run.sleep, duration))

    def sleep_until(self, at: datetime) -> Promised[None]:
        """:meth:`Run.sleep_until`."""
        return self._take("sleep_until", partial(self._run.sleep_until, at))

    def wait_for(self, topic: str, correlation_id: str, *, timeout: timedelta | None = None) -> Promised[Any]:
        """:meth:`Run.wait_for`."""
        return self._take("wait_for", partial(self._run.wait_for, topic, correlation_id, timeout=timeout))

    def approval(self, name: str, *, timeout: timedelta | None = None) -> Promised[Approval]:
        """:meth:`Run.approval`."""
        return self._take("approval", partial(self._run.approval, name, timeout=timeout))

    # ---- what is recorded besides ----

    def update(self, /, **state: Any) -> Promised[None]:
        """:meth:`Run.update`."""
        return self._take("update", partial(self._run.update, **state))

    def restart_as(self, input: Any = None) -> Promised[NoReturn]:
        """:meth:`Run.restart_as`."""
        return self._take("restart_as", partial(self._run.restart_as, input))

    def now(self) -> Promised[datetime]:
        """:meth:`Run.now`."""
        return self._take("now", self._run.now)

    def uuid(self) -> UUID:
        """:meth:`Run.uuid`; not awaited, for it costs no record."""
        self._replay.refuse_beside("run.uuid()")
        return self._run.uuid()

    def random(self) -> float:
        """:meth:`Run.random`; not awaited, as :meth:`uuid`."""
        self._replay.refuse_beside("run.random()")
        return self._run.random()
