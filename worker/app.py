"""The Celery app of ``celery -A celery_flows.worker``: configured by the environment, its flows by FLOW_IMPORTS."""

from __future__ import annotations

from typing import Any

import click
from celery import Celery, bootsteps

from celery_flows.tasks.logs import use_flow_logging
from celery_flows.worker.flows import Flows

app = Celery("celery_flows", set_as_current=False)
app.conf.update(
    # JSON only, both ways.
    task_serializer="json",
    result_serializer="json",
    accept_content=["json"],
    task_ignore_result=True,
    # A message is a hint: prefetching more than one only keeps work from idle workers.
    worker_prefetch_multiplier=1,
    worker_cancel_long_running_tasks_on_connection_loss=False,
    broker_connection_retry_on_startup=True,
    worker_soft_shutdown_timeout=20,
    # For Flower.
    worker_send_task_events=True,
    task_send_sent_event=True,
)
flows = Flows(app)
use_flow_logging(app)


class BrokerIsSet(bootsteps.Step):
    """Keeps this app, which is configured by the environment alone, from falling back to Celery's default broker."""

    def __init__(self, parent: Any, **options: Any) -> None:
        super().__init__(parent, **options)
        if not app.conf.broker_url:
            raise click.ClickException("no broker is set: set CELERY_BROKER_URL, e.g. redis://localhost:6379/0")


app.steps["worker"].add(BrokerIsSet)
