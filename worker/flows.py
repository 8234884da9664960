"""Flows: what an application makes of its Celery app to define, start and drive flows."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from datetime import datetime, timedelta
from functools import partial
from typing import Any, Self, TypeVar, overload
from uuid import UUID
from weakref import WeakKeyDictionary

import sqlalchemy as sa
from celery import Celery
from celery.canvas import Signature
from celery.schedules import crontab
from sqlalchemy.orm import Session

from celery_flows.store import Flow, FlowManager, FlowStatus, InvalidData, SqlFlowStore
from celery_flows.store import operations as op
from celery_flows.store.clock import as_utc
from celery_flows.store.models import parse_id
from celery_flows.store.pruning import Archive
from celery_flows.store.schedules import Overlap
from celery_flows.store.validation import check_name, check_text
from celery_flows.tasks.aio import AsyncTransaction, run
from celery_flows.tasks.celery_tasks import register
from celery_flows.tasks.emit import emit
from celery_flows.tasks.handle import FlowHandle
from celery_flows.tasks.limit import Limit
from celery_flows.tasks.mirror import Mirror, MirrorRule, flow_id_of_root
from celery_flows.tasks.registry import FlowDefinition
from celery_flows.tasks.retry import Retry
from celery_flows.tasks.run import Run
from celery_flows.tasks.run_async import AsyncRun
from celery_flows.tasks.runtime import Runtime
from celery_flows.tasks.schedule import CatchUp, parse_schedule, refuse_without_schedule
from celery_flows.tasks.settings import FlowSettings
from celery_flows.tasks.waiting import register_waiting_flows
from celery_flows.worker.lifecycle import install
from celery_flows.worker.schedule import add_beat_entries, add_late_beat_entry

In = TypeVar("In")
Out = TypeVar("Out")
A = TypeVar("A", bound=Archive)

_installed: WeakKeyDictionary[Celery, Flows] = WeakKeyDictionary()


class Flows:
    """Durable flows for a Celery app: adds our tasks, the worker's threads and beat's entries; your own tasks and
    settings stay as they are.

    ::

        app = Celery("shop", broker="redis://localhost")
        app.conf.flow_store_url = "postgresql://localhost/shop"
        flows = Flows(app)

    Nothing is connected or read before it is needed.

    Args:
        app: your Celery app; one Flows an app.
        store: a store of your own making, in place of ``flow_store_url``.
    """

    def __init__(self, app: Celery, *, store: SqlFlowStore | None = None) -> None:
        if not isinstance(app, Celery):
            raise InvalidData("app", f"must be your Celery app, not {type(app).__name__}")
        if app in _installed:
            raise InvalidData("app", "has its Flows already; use that one (Flows.of(app))")
        self.app = app
        self.runtime = Runtime(app, store)
        register(app, self.runtime)
        register_waiting_flows(self.runtime)
        install(app, self.runtime)
        add_beat_entries(app, self.runtime)
        _installed[app] = self

    @classmethod
    def of(cls, app: Celery) -> Self:
        """The Flows of this app; made now, if it has none."""
        found = _installed.get(app)
        return found if found is not None else cls(app)  # type: ignore[return-value]

    @property
    def settings(self) -> FlowSettings:
        """The validated settings.

        Raises:
            InvalidData: naming the setting and what to write.
        """
        return self.runtime.settings

    @property
    def store(self) -> SqlFlowStore:
        """This process's store.

        Raises:
            InvalidData, SchemaOutdated, StoreError
        """
        return self.runtime.store

    @property
    def manager(self) -> FlowManager:
        """The manager over :attr:`store`, for flows that no definition drives, and for operators."""
        return self.runtime.manager

    def flow(
        self,
        name: str,
        *,
        queue: str | None = None,
        version: int = 1,
        retry: Retry | None = None,
        timeout: timedelta | None = None,
        retain: timedelta | None = None,
        priority: int | None = None,
        limit: Limit | None = None,
        schedule: crontab | timedelta | float | None = None,
        catch_up: CatchUp = "last",
        overlap: Overlap = "allow",
    ) -> _Define:
        """Registers a flow function under a name, which is for good: flows that are open are driven by it.

        Args:
            queue: where its drive messages go; None: ``task_default_queue``.
            version: a flow goes on with the version that it began with. A function whose steps change gets a new
                version, and the old one stays until its flows have ended.
            retry: how often and when its steps are tried again, where nothing else is said.
            timeout: how long after its start a flow has to end; past that it is told (:class:`FlowTimedOut`), and
                fails.
            retain: how long a flow is kept after its end, however it ended; None: ``flow_retain_days``, or
                ``flow_retain_failed_days``. It holds for flows that start from now on.
            priority: of its messages, 0 to 255, as your broker has it.
            limit: how many of them may be at work, or begin within some time (:class:`Limit`); the others queue, by
                priority and then by age.
            schedule: have beat start it: a Celery crontab, by the clock of the app's time zone, or an interval as
                timedelta or seconds. One flow for each slot, however many beats there are. Its input, if it takes any,
                is the slot's time.
            catch_up: what becomes of slots at which nobody looked: the last one is made up for, or all (at most 100),
                or none.
            overlap: what becomes of a slot while the flow of the one before is still open: "allow" starts its flow all
                the same, "skip" leaves it out, "wait" starts it when that one has ended: the last of those that waited,
                or all, by ``catch_up``.

        Raises:
            InvalidData: name and version are taken, the function takes other parameters than the run and one input, is
                async and takes no AsyncRun, or an option is wrong.
        """
        if not isinstance(name, str):
            raise InvalidData("flow name", f'is missing; write @flows.flow("a/name"), not {type(name).__name__}')
        if schedule is None:
            refuse_without_schedule(name, catch_up, overlap)
        by = None if schedule is None else parse_schedule(name, schedule, catch_up, overlap)
        define = partial(
            FlowDefinition, self.runtime, name, queue=queue, version=version, retry=retry, timeout=timeout,
            retain=retain, priority=priority, schedule=by, limit=limit,
        )  # fmt: skip
        return _Define(define, self.runtime)

    def handle(self, flow_id: UUID | str) -> FlowHandle[Any]:
        """The handle of a flow by its id.

        Raises:
            InvalidData: it is no UUID.
        """
        return FlowHandle(self.runtime, parse_id("flow_id", flow_id))

    def search(
        self,
        *,
        owner: str | None = None,
        status: FlowStatus | str | None = None,
        definition: str | None = None,
        key: str | None = None,
        created_after: datetime | None = None,
        created_before: datetime | None = None,
        limit: int = 100,
        after: Flow | None = None,
    ) -> list[Flow]:
        """Flows that fit all that is given, newest first, a page at a time; as quick among millions as among few.

        Args:
            definition: the name of its definition, in whatever version.
            key: the idempotency key it was started with.
            created_after, created_before: aware times, by the database's clock; the first is included, the second not.
            limit: at most so many.
            after: the last flow of the page before.

        Raises:
            InvalidData: there is no such status, a time is naive, the limit is below 1, or ``after`` is no flow.
        """
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise InvalidData("limit", "must be a whole number from 1")
        if after is not None and not isinstance(after, Flow):
            raise InvalidData("after", f"must be the last flow of the page before, not {type(after).__name__}")
        return self.store.run(
            op.search_flows,
            owner=owner,
            status=None if status is None else _status(status),
            definition=definition,
            key=key,
            created_after=None if created_after is None else as_utc("created_after", created_after),
            created_before=None if created_before is None else as_utc("created_before", created_before),
            limit=limit,
            after=after,
        )

    async def asearch(
        self,
        *,
        owner: str | None = None,
        status: FlowStatus | str | None = None,
        definition: str | None = None,
        key: str | None = None,
        created_after: datetime | None = None,
        created_before: datetime | None = None,
        limit: int = 100,
        after: Flow | None = None,
    ) -> list[Flow]:
        """:meth:`search`, awaited."""
        return await asyncio.to_thread(
            self.search, owner=owner, status=status, definition=definition, key=key, created_after=created_after,
            created_before=created_before, limit=limit, after=after,
        )  # fmt: skip

    def emit(
        self, topic: str, correlation_id: str, payload: Any = None, *, session: sa.Connection | Session | None = None
    ) -> UUID:
        """Tells of something outside: resumes the flow that has waited longest for this topic and correlation id, or
        keeps the event until one does. Gives the event's id.

        With ``session`` the event is stored in your transaction and handed over after your commit.

        Raises:
            InvalidData: a name is empty or too long, or the payload cannot be JSON. Nothing was written.
            StoreError: the database could not be reached.
        """
        return emit(self.runtime, topic, correlation_id, payload, session)

    async def aemit(
        self, topic: str, correlation_id: str, payload: Any = None, *, session: AsyncTransaction | None = None
    ) -> UUID:
        """:meth:`emit`, awaited; ``session`` is an AsyncSession or AsyncConnection."""
        return await run(self.runtime, session, partial(self.emit, topic, correlation_id, payload))

    def mirror(
        self,
        canvas: Signature[Any],
        *,
        name: str | None = None,
        goal: str = "",
        owner: str = "default",
        key: str | None = None,
    ) -> Mirror:
        """A signature, chain, group or chord, to be applied as ever, and shown as a flow with a step for each task::

            result, flow = flows.mirror(chord(parts, total.s()), goal="the month's total").apply_async()

        Args:
            canvas: stays as it is; what is applied is a copy.
            name: what the flow is listed as; None: the name of the first task.
            goal, owner: as in :meth:`FlowDefinition.start`.
            key: idempotency key within the name: the same key again applies nothing, and gives what is there.

        Raises:
            InvalidData: it is no canvas.
        """
        return Mirror(self.runtime, canvas, name=name, goal=goal, owner=owner, key=key)

    def mirror_rule(self, pattern: str, *, goal: str = "", owner: str = "default") -> None:
        """Has every root task whose name matches ``pattern`` (``shop.*``) mirrored from its start, whoever sends it,
        with all it brings about. A root task is one that no other task published. The first rule that matches counts.

        Raises:
            InvalidData: the pattern or owner is empty or too long.
        """
        check_name("pattern", pattern)
        self.runtime.mirror_rules.append(MirrorRule(pattern, check_text("goal", goal), check_name("owner", owner)))

    def archive(self, function: A) -> A:
        """Has this function be handed what is pruned, before it is deleted: for each flow a line of JSON that holds
        the flow, its steps and its events. A decorator, or called with a :class:`JsonLinesFile`::

            @flows.archive
            def keep(lines: Sequence[str]) -> None: ...

        It is called within the transaction that deletes those flows, a few hundred at a time. What it raises ends that
        prune, and they stay. If the transaction fails after it they are handed to it again, so what it gets is to be
        told apart by the flow's id. It is to be quick: an open transaction holds up the database's own cleaning.
        """
        self.runtime.archive = function
        return function

    def mirrored(self, task_id: str) -> FlowHandle[None]:
        """The handle of the flow that a :meth:`mirror_rule` makes for this root task."""
        return FlowHandle(self.runtime, flow_id_of_root(task_id))


def _status(status: FlowStatus | str) -> FlowStatus:
    try:
        return FlowStatus(status)
    except ValueError:
        raise InvalidData("status", f"must be one of {', '.join(FlowStatus)}") from None


class _Define:
    """What ``@flows.flow(name)`` gives: takes the function, gives its definition."""

    def __init__(self, define: Callable[..., FlowDefinition[Any, Any]], runtime: Runtime) -> None:
        self._define, self._runtime = define, runtime

    @overload
    def __call__(self, function: Callable[[AsyncRun, In], Coroutine[Any, Any, Out]]) -> FlowDefinition[In, Out]: ...
    @overload
    def __call__(self, function: Callable[[AsyncRun], Coroutine[Any, Any, Out]]) -> FlowDefinition[None, Out]: ...
    @overload
    def __call__(self, function: Callable[[Run, In], Out]) -> FlowDefinition[In, Out]: ...
    @overload
    def __call__(self, function: Callable[[Run], Out]) -> FlowDefinition[None, Out]: ...
    def __call__(self, function: Callable[..., Any]) -> FlowDefinition[Any, Any]:
        definition = self._define(function=function)
        self._runtime.registry.add(definition)
        add_late_beat_entry(self._runtime.app, definition)
        return definition
