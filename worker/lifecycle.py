"""What a Celery worker gets besides its tasks: a check at its start, and threads that keep leases and sweep."""

from __future__ import annotations

import logging
import math
import random
import signal
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import click
from celery import Celery, bootsteps, signals

from celery_flows.store import FlowError, InvalidData
from celery_flows.store.clock import boottime
from celery_flows.tasks import maintenance
from celery_flows.tasks.observer import Observer
from celery_flows.tasks.runtime import Runtime
from celery_flows.tasks.stopping import Stopping
from celery_flows.worker.guard import guard_tasks
from celery_flows.worker.leases import Leases
from celery_flows.worker.monitoring import open_endpoint
from celery_flows.worker.pools import check_pool, keep_inputs_out_of_events, tell_of_processes

log = logging.getLogger("celery_flows.worker")

T = TypeVar("T")

STOP_SECONDS = 5.0
LOOK_SECONDS = 1.0  # how soon a dead child is noticed
HEARTBEAT_SECONDS = 15.0  # between two heartbeats of a worker's sweeps


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
    """Checks settings, database, schema and pool before the worker starts; ticks until it stops; then has its work
    handed over to other workers."""

    requires = ("celery.worker.components:Pool",)
    runtime: Runtime

    def __init__(self, parent: Any, **options: Any) -> None:
        super().__init__(parent, **options)
        refuse_or(lambda: check_pool(parent))
        refuse_or(lambda: self.runtime.store)
        guard_tasks(self.runtime.app)
        self.runtime.stopping = Stopping()  # the pool has not forked yet
        self.runtime.interrupts.share()
        signals.worker_process_init.connect(self._listen, weak=False)
        settings = self.runtime.settings
        self._leases = Leases(self.runtime, lambda pid: parent.pool.terminate_job(pid, signal.SIGKILL))
        # Two threads: a sweep that is held up must not keep leases from being renewed.
        keeper = Ticker("leases", self._leases.keep, min(LOOK_SECONDS, settings.lease_seconds / 10))
        self._tickers = [keeper, Ticker("sweep", self._sweep, settings.sweep_seconds)]
        self._heartbeat_at = -math.inf

        def lost(request: Any) -> None:
            self._leases.lost(request)
            keeper.wake()

        tell_of_processes(self.runtime.app, lost, self._leases.timed_out)
        keep_inputs_out_of_events(self.runtime.app)
        self._endpoint = refuse_or(lambda: open_endpoint(self.runtime))
        self._observer = Observer(self.runtime) if self.runtime.mirrors else None
        if self._observer is not None:  # else Celery's signals have no handlers of ours
            self._observer.connect()

    def start(self, parent: Any) -> None:
        self._watch_soft_shutdown(parent)
        for ticker in self._tickers:
            ticker.start()
        if self._endpoint is not None:
            self._endpoint.start()
        # Not in stop(), which comes before the pool's: that waits for what is running, and its leases must be kept.
        signals.worker_shutdown.connect(self._end, sender=parent, weak=False)

    def _listen(self, **_: Any) -> None:
        self.runtime.interrupts.listen()

    def close(self, parent: Any) -> None:
        """Every way to stop begins with this, but for a soft one."""
        self.runtime.stopping.set()

    def terminate(self, parent: Any) -> None:
        parent.pool.terminate()  # as the pool's own step does next; only then are its processes dead
        self._end()

    def _watch_soft_shutdown(self, parent: Any) -> None:
        """A cold shutdown first waits for ``worker_soft_shutdown_timeout``, in a signal handler, and tells nobody."""
        wait = parent.wait_for_soft_shutdown

        def stop_softly() -> None:
            self.runtime.stopping.set()
            wait()

        parent.wait_for_soft_shutdown = stop_softly

    def _sweep(self) -> None:
        maintenance.sweep(self.runtime)
        every = max(HEARTBEAT_SECONDS, self.runtime.settings.sweep_seconds)
        if boottime() - self._heartbeat_at >= every:
            maintenance.heartbeat(self.runtime, maintenance.SWEEP, every)
            if self._endpoint is not None:
                self._endpoint.tallies.take_over()
            self._heartbeat_at = boottime()

    def _end(self, **_: Any) -> None:
        keeper, sweeper = self._tickers
        sweeper.stop()
        if self._observer is not None:
            self._observer.disconnect()
        if self._endpoint is not None:
            self._endpoint.stop()
        if self._leases.are_held_here():  # Python waits for threads before it ends, however cold the shutdown
            return
        keeper.stop()
        try:
            self._leases.hand_back()
        except FlowError as error:
            log.warning("leases are not handed back: they run out (%s)", type(error).__name__)


class Ticker(threading.Thread):
    """Does a chore every so often, with jitter, until told to stop. A failure is told once, and the chore tried on."""

    def __init__(self, name: str, chore: Callable[[], object], seconds: float) -> None:
        super().__init__(name=f"celery-flows {name}", daemon=True)
        self._chore, self._seconds = chore, seconds
        self._awake = threading.Event()
        self._stopped = False
        self._failing = False

    def run(self) -> None:
        while True:
            self._awake.wait(self._seconds * random.uniform(0.8, 1.0))
            self._awake.clear()
            if self._stopped:
                return
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

    def wake(self) -> None:
        """Has the chore done at once."""
        self._awake.set()

    def stop(self) -> None:
        """Ends the thread, after what it is doing."""
        self._stopped = True
        self._awake.set()
        if self.is_alive():
            self.join(STOP_SECONDS)
