"""Flows: what an application makes of its Celery app to define, start and drive flows."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any, Self, TypeVar, overload
from uuid import UUID
from weakref import WeakKeyDictionary

import sqlalchemy as sa
from celery import Celery
from sqlalchemy.orm import Session

from celery_flows.store import FlowManager, InvalidData, SqlFlowStore
from celery_flows.tasks.celery_tasks import register
from celery_flows.tasks.emit import emit
from celery_flows.tasks.handle import FlowHandle
from celery_flows.tasks.registry import FlowDefinition, Registry
from celery_flows.tasks.retry import Retry
from celery_flows.tasks.run import Run
from celery_flows.tasks.runtime import Runtime
from celery_flows.tasks.settings import FlowSettings
from celery_flows.worker.lifecycle import install
from celery_flows.worker.schedule import add_beat_entries

In = TypeVar("In")
Out = TypeVar("Out")

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
        if app in _installed:
            raise InvalidData("app", "has its Flows already; use that one (Flows.of(app))")
        self.app = app
        self.runtime = Runtime(app, store)
        register(app, self.runtime)
        install(app, self.runtime)
        add_beat_entries(app)
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
    ) -> _Define:
        """Registers a flow function under a name, which is for good: flows that are open are driven by it.

        Args:
            queue: where its drive messages go; None: ``task_default_queue``.
            version: a flow goes on with the version that it began with. A function whose steps change gets a new
                version, and the old one stays until its flows have ended.
            retry: how often and when its steps are tried again, where nothing else is said.
            timeout: how long after its start a flow has to end; past that it is told (:class:`FlowTimedOut`), and
                fails.

        Raises:
            InvalidData: name and version are taken, the function takes more than the run and one input, or an option is
                wrong.
        """
        define = partial(FlowDefinition, self.runtime, name, queue=queue, version=version, retry=retry, timeout=timeout)
        return _Define(define, self.runtime.registry)

    def handle(self, flow_id: UUID | str) -> FlowHandle[Any]:
        """The handle of a flow by its id.

        Raises:
            InvalidData: it is no UUID.
        """
        try:
            return FlowHandle(self.runtime, flow_id if isinstance(flow_id, UUID) else UUID(flow_id))
        except ValueError:
            raise InvalidData("flow_id", "is no flow id (a UUID)") from None

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


class _Define:
    """What ``@flows.flow(name)`` gives: takes the function, gives its definition."""

    def __init__(self, define: Callable[..., FlowDefinition[Any, Any]], registry: Registry) -> None:
        self._define, self._registry = define, registry

    @overload
    def __call__(self, function: Callable[[Run, In], Out]) -> FlowDefinition[In, Out]: ...
    @overload
    def __call__(self, function: Callable[[Run], Out]) -> FlowDefinition[None, Out]: ...
    def __call__(self, function: Callable[..., Any]) -> FlowDefinition[Any, Any]:
        definition = self._define(function=function)
        self._registry.add(definition)
        return definition
