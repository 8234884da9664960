"""The app of a scenario, as its worker is started: ``celery -A tests.support.scenario_worker worker``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

from celery import Celery

from tests.support.shop import BROKER, DATABASE, QUEUE, READY, SHORT, tell_ready

SCENARIO = "SCENARIO"  # the module's name, in the environment


def configure(app: Celery, environment: Mapping[str, str]) -> None:
    """Puts the app on the servers of this environment."""
    app.conf.update(SHORT)
    app.conf.update(
        broker_url=environment[BROKER],
        flow_store_url=environment[DATABASE],
        task_default_queue=environment[QUEUE],
        worker_prefetch_multiplier=1,
        broker_connection_retry_on_startup=True,
    )


if SCENARIO in os.environ:
    app: Celery = import_module(f"tests.scenarios.{os.environ[SCENARIO]}").app
    configure(app, os.environ)
    tell_ready(Path(os.environ[READY]))
