"""A guard in front of Celery's tasks: a malformed message is dropped with a line in the log.

Without it a message of valid JSON and the wrong shape (``"hello"``, ``null``) that names a known task ends the worker
with an "Unrecoverable error", is delivered to the next worker, and ends that one too (Celery 5.7, Redis and RabbitMQ).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from celery import Celery
from celery.utils.imports import instantiate

log = logging.getLogger("celery_flows.guard")


def guard_tasks(app: Celery) -> None:
    """Puts the guard in front of every task of the app, whatever strategy the task has."""
    tasks: list[Any] = list(app.tasks.values())
    for task in tasks:
        task.Strategy = _guarded(task.Strategy)


def _guarded(strategy: Any) -> Callable[..., Any]:
    if getattr(strategy, "guards", False):
        return strategy  # type: ignore[no-any-return]

    def start(task: Any, app: Celery, consumer: Any, **options: Any) -> Callable[..., Any]:
        receive = instantiate(strategy, task, app, consumer, **options)

        def guard(message: Any, body: Any, ack: Any, reject: Any, callbacks: Any, **more: Any) -> Any:
            if is_well_formed(message.payload):
                return receive(message, body, ack, reject, callbacks, **more)
            log.error("a malformed message for %s is dropped", task.name)
            message.reject_log_error(log, consumer.connection_errors)
            return None

        return guard

    start.guards = True  # type: ignore[attr-defined]
    return start


def is_well_formed(payload: Any) -> bool:
    """Whether this is the body of a task message: ``[args, kwargs, embed]``, or the object of protocol 1."""
    match payload:
        case [list() | tuple(), dict(), dict()]:
            return True
        case {"task": str(), "args": list() | tuple(), "kwargs": dict()}:
            return True
    return False
