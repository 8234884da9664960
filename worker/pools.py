"""Which of Celery's pools a worker with flows runs under, and what a pool tells of its processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from billiard.exceptions import WorkerLostError
from celery import Celery
from celery.worker.request import Request

from celery_flows.store import InvalidData
from celery_flows.tasks.celery_tasks import START_TASK
from celery_flows.tasks.publish import DRIVE_TASK, STEP_TASK

REFUSED = {
    "celery.concurrency.eventlet": "eventlet",
    "celery.concurrency.gevent": "gevent",
}


def check_pool(worker: Any) -> None:
    """Says nothing if flows run under this worker's pool.

    Raises:
        InvalidData: they do not, and which do.
    """
    name = REFUSED.get(worker.pool_cls.__module__)
    if name is not None:
        raise InvalidData(
            "worker_pool",
            f"flows do not run under {name}: a step that does not yield would keep the worker's leases from being "
            "renewed; use prefork, threads or solo",
        )
    if getattr(worker, "pool_start_method", "fork") != "fork":
        raise InvalidData("worker_pool_start_method", "must be fork: the processes of a worker share what it knows")


def keep_inputs_out_of_events(app: Celery) -> None:
    """``flows.start`` alone carries an input in its message; its events, and so Flower, are not to show it."""

    class StartRequest(Request):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self._argsrepr, self._kwargsrepr = "()", "{}"

    task: Any = app.tasks[START_TASK]
    task.Request = StartRequest


def tell_of_processes(app: Celery, lost: Callable[[Any], None], timed_out: Callable[[Any], None]) -> None:
    """Has ``lost`` called, in the parent process, with each request for a flow whose process died over it, and
    ``timed_out`` with each whose process is ended for its hard time limit."""

    class FlowRequest(Request):
        def on_timeout(self, soft: bool, timeout: float) -> None:
            if not soft:
                timed_out(self)
            super().on_timeout(soft, timeout)

        def on_failure(self, exc_info: Any, *args: Any, **options: Any) -> Any:
            error = getattr(exc_info.exception, "exc", exc_info.exception)
            if isinstance(error, WorkerLostError):
                lost(self)
            return super().on_failure(exc_info, *args, **options)

    tasks: dict[str, Any] = app.tasks
    for name in (DRIVE_TASK, STEP_TASK):
        tasks[name].Request = FlowRequest
