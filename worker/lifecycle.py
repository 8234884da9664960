"""What a Celery worker gets besides its tasks: a check at its start, and threads that keep leases and sweep."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import click
from celery import Celery, bootsteps, signals

from celery_flows.store import FlowError, InvalidData
from celery_flows.tasks.maintenance import sweep
from celery_flows.tasks.runtime import Runtime
from celery_flows.worker.guard import guard_tasks
from celery_flows.worker.leases import Leases

log = logging.getLogger("celery_flows.worker")

T = TypeVar("T")

STOP_SECONDS = 5.0
LOOK_SECONDS = 1.0  # how soon a dead child is noticed


def install(app: Celery, runtime: Runtime) -> None:
    """Has the app's programs import the flow definitions that ``flow_imports`` names, and adds our step to its worker's
    blueprint: that lives as long as the worker, through broker reconnects."""
    app.steps["worker"].add(type("FlowsStep", (WorkerStep,), {"runtime": runtime}))
    signals.import_modules.connect(lambda **_: refuse_or(runtime.import_definitions), sender=app, weak=False)


class Refused(click.ClickException):
    """The command or its configuration is wrong: one sentence, exit code 2."""

    exit_code = 2


def refuse_or(action: Callable[[], T]) -> T:
    """Does something at the start of a program.

    Raises:
        click.ClickException: one sentence, in place of any :class:`FlowError`.
    """
    try:
        return action()
    except InvalidData as error:
        raise Refused(str(error)) from error
    except FlowError as error:
        raise click.ClickException(str(error)) from error


class WorkerStep(bootsteps.StartStopStep):
    """Checks settings, database and schema before the worker starts; then ticks until it stops."""

    requires = ("celery.worker.components:Pool",)
    runtime: Runtime

    def __init__(self, parent: Any, **options: Any) -> None:
        super().__init__(parent, **options)
        refuse_or(lambda: self.runtime.store)
        guard_tasks(self.runtime.app)
        self._tickers: list[Ticker] = []

    def start(self, parent: Any) -> None:
        settings = self.runtime.settings
        # Two threads: a sweep that is held up must not keep leases from being renewed.
        self._tickers = [
            Ticker("leases", Leases(self.runtime).keep, min(LOOK_SECONDS, settings.lease_seconds / 10)),
            Ticker("sweep", lambda: sweep(self.runtime), settings.sweep_seconds),
        ]
        for ticker in self._tickers:
            ticker.start()
        # Not in stop(), which comes before the pool's: that waits for what is running, and its leases must be kept.
        signals.worker_shutdown.connect(self._end, sender=parent, weak=False)

    def terminate(self, parent: Any) -> None:
        self._end()

    def _end(self, **_: Any) -> None:
        for ticker in self._tickers:
            ticker.stop()


class Ticker(threading.Thread):
    """Does a chore every so often, with jitter, until told to stop. A failure is told once, and the chore tried on."""

    def __init__(self, name: str, chore: Callable[[], object], seconds: float) -> None:
        super().__init__(name=f"celery-flows {name}", daemon=True)
        self._chore, self._seconds = chore, seconds
        self._stopped = threading.Event()
        self._failing = False

    def run(self) -> None:
        while not self._stopped.wait(self._seconds * random.uniform(0.8, 1.0)):
            self._tick()

    def _tick(self) -> None:
        try:
            self._chore()
        except Exception as error:
            if not self._failing:
                log.error("%s fails, and is tried again (%s: %s)", self.name, type(error).__name__, error)
            self._failing = True
        else:
            if self._failing:
                log.info("%s succeeds again", self.name)
            self._failing = False

    def stop(self) -> None:
        self._stopped.set()
        if self.is_alive():
            self.join(STOP_SECONDS)
