"""For the tests of flows: what the pytest plugin's fixtures are, and what can be used without pytest.

The fixtures ``flow_app``, ``flow_clock``, ``flow_beat``, ``flow_crash`` and ``flow_messages`` come with the
installed package.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from celery import Celery

from celery_flows.store import InvalidData
from celery_flows.tasks.publish import DRIVE_TASK
from celery_flows.tasks.testing.app import FlowApp
from celery_flows.tasks.testing.beat import FlowBeat
from celery_flows.tasks.testing.clock import FlowClock
from celery_flows.tasks.testing.crash import FlowCrash, When
from celery_flows.tasks.testing.databases import copy_template, open_for_tests
from celery_flows.tasks.testing.history import assert_history, history, most_at_once
from celery_flows.tasks.testing.inline import NotInline, run_inline
from celery_flows.tasks.testing.messages import FlowMessages
from celery_flows.tasks.testing.stuck import NeverStruck, Spins, Stuck
from celery_flows.worker.flows import Flows

__all__ = [
    "FlowApp",
    "FlowBeat",
    "FlowClock",
    "FlowCrash",
    "FlowMessages",
    "NeverStruck",
    "NotInline",
    "Spins",
    "Stuck",
    "When",
    "assert_history",
    "copy_template",
    "history",
    "most_at_once",
    "open_flow_app",
    "run_inline",
]


@contextmanager
def open_flow_app(app: Celery | Flows, store_url: str) -> Iterator[FlowApp]:
    """What the ``flow_app`` fixture is: the application's flows, driven in this process until the end, over a database
    for tests, which is emptied first. The store and the broker that the application is configured with are left alone.

    Raises:
        InvalidData: the app has no Flows, or the database holds flows that are no test's.
        StoreError: the database cannot be reached.
    """
    flows = flows_of(app)
    engine = open_for_tests(store_url)
    try:
        with FlowApp(flows.runtime, engine).installed() as flow_app:
            yield flow_app
    finally:
        engine.dispose()


def flows_of(app: Celery | Flows) -> Flows:
    """The Flows of the application, whose modules are imported first.

    Raises:
        InvalidData: it has none.
    """
    celery_app = app.app if isinstance(app, Flows) else app
    if not isinstance(celery_app, Celery):
        raise InvalidData("flow_celery_app", f"is a {type(app).__name__}; name your Celery app, or its Flows")
    celery_app.loader.import_default_modules()  # as a worker does: tasks, and flow definitions
    if DRIVE_TASK not in celery_app.tasks:
        raise InvalidData("flow_celery_app", f"{celery_app.main!r} has no flows: write flows = Flows(app) beside it")
    return Flows.of(celery_app)
