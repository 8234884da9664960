"""Our Celery tasks. Their messages carry ids only; what is to be done stands in the store."""

from __future__ import annotations

import logging
import os
from datetime import datetime
from typing import Any

from celery import Celery

from celery_flows.store import InvalidData
from celery_flows.store.models import parse_id
from celery_flows.store.validation import check_name
from celery_flows.tasks import maintenance, slots
from celery_flows.tasks.drive import drive
from celery_flows.tasks.errors import UnknownFlow
from celery_flows.tasks.publish import DRIVE_TASK, STEP_TASK
from celery_flows.tasks.runtime import Runtime, worker_token
from celery_flows.tasks.steps import delivery_of, run_step

log = logging.getLogger("celery_flows.tasks")

SWEEP_TASK, PRUNE_TASK, VERIFY_TASK = "flows.sweep", "flows.prune", "flows.verify"
LOOK_TASK, START_TASK = "flows.look", "flows.start"

# Early acknowledgement: the store sends what was lost again, so a late one would only bring redelivery loops,
# RabbitMQ's consumer timeout and Redis' visibility timeout. No result backend: the store is the truth.
# Not shared: Celery gives shared tasks to every app of the process, and another app's would drive with our runtime.
OPTIONS: dict[str, Any] = {
    "bind": True,
    "shared": False,
    "acks_late": False,
    "reject_on_worker_lost": False,
    "ignore_result": True,
    "serializer": "json",
    "max_retries": 0,
    "typing": False,
    "rate_limit": None,
}


def register(app: Celery, runtime: Runtime) -> None:
    """Adds our tasks to the app; nothing else of it changes."""

    @app.task(name=DRIVE_TASK, **OPTIONS)
    def drive_flow(self: Any, flow_id: Any = None, **_: Any) -> None:
        try:
            flow = parse_id("flow_id", flow_id)
        except InvalidData as error:
            log.warning("a message is dropped: %s", error)
            return
        drive(runtime, flow, worker_token(os.getpid(), self.request.id))

    @app.task(name=STEP_TASK, **OPTIONS)
    def run_flow_step(self: Any, run_id: Any = None, **_: Any) -> None:
        try:
            check_name("run_id", run_id)
        except InvalidData as error:
            log.warning("a message is dropped: %s", error)
            return
        run_step(runtime, run_id, delivery_of(self.request, worker_token(os.getpid(), self.request.id)))

    @app.task(name=SWEEP_TASK, **OPTIONS)
    def sweep(self: Any) -> None:
        maintenance.sweep_for_beat(runtime)

    @app.task(name=PRUNE_TASK, **OPTIONS)
    def prune(self: Any, retain_days: int | None = None) -> None:
        maintenance.prune(runtime, retain_days)

    @app.task(name=VERIFY_TASK, **OPTIONS)
    def verify(self: Any) -> None:
        maintenance.verify_sample(runtime)

    @app.task(name=LOOK_TASK, **OPTIONS)
    def look(self: Any, name: str) -> None:
        """Looks at the schedule of this definition. Which slots are due says the database's clock, not beat's."""
        slots.try_to_start(runtime, runtime.registry.require(name))

    @app.task(name=START_TASK, **{**OPTIONS, "ignore_result": False, "throws": (InvalidData, UnknownFlow)})
    def start(self: Any, name: Any = None, input: Any = None, **options: Any) -> str:
        """Starts a flow from any Celery client: ``app.send_task("flows.start", kwargs={"name": …, "input": …})``.

        The key defaults to this task's id, so a message that is delivered twice starts one flow.
        """
        try:
            definition = runtime.registry.require(check_name("name", name))
            with runtime.watch.spans.received(self.request):
                return str(definition.start(input, **{"key": self.request.id, **_start_options(options)}).id)
        except (InvalidData, UnknownFlow) as error:
            log.error("a start is refused: %s", error)
            raise


START_OPTIONS = ("key", "owner", "goal", "priority", "countdown", "eta")


def _start_options(given: dict[str, Any]) -> dict[str, Any]:
    """What a message may say of how a flow is to be started; times come as text.

    Raises:
        InvalidData: it says something else.
    """
    if unknown := sorted(given.keys() - set(START_OPTIONS)):
        raise InvalidData("options", f"{unknown[0][:50]!r} is none; there are {', '.join(START_OPTIONS)}")
    said = {name: value for name, value in given.items() if value is not None}
    if not isinstance(eta := said.get("eta"), str):
        return said
    try:
        return {**said, "eta": datetime.fromisoformat(eta)}
    except ValueError:
        raise InvalidData("eta", "must be a time in ISO 8601 with its offset, e.g. 2030-01-31T08:00:00+00:00") from None
