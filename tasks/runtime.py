"""What the engine's parts share: the Celery app, the settings, the definitions, this process's store and publisher."""

from __future__ import annotations

import os
import secrets
import socket
import threading
import weakref
from collections.abc import Callable
from datetime import datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from celery import Celery
from celery.utils.imports import import_from_cwd

from celery_flows.store import FlowManager, InvalidData, SqlFlowStore, dispatch, schema
from celery_flows.store.engines import make_engine
from celery_flows.store.pruning import Archive
from celery_flows.store.script import Call
from celery_flows.tasks.ahead import Ahead, NotBegun
from celery_flows.tasks.interrupts import Interrupts
from celery_flows.tasks.loop import pause
from celery_flows.tasks.polling import poll
from celery_flows.tasks.publish import Publisher, broker_scheme, urgency
from celery_flows.tasks.registry import Registry
from celery_flows.tasks.settings import FlowSettings, load_settings
from celery_flows.tasks.stopping import Stopping
from celery_flows.tasks.watch import Watch

if TYPE_CHECKING:
    from celery_flows.tasks.mirror import MirrorRule
    from celery_flows.tasks.schedule import Schedule

AHEAD = timedelta(seconds=1)  # beat's clock may be this much ahead of the database's; the flow begins at its slot


class Runtime:
    """One per application. Nothing is read or opened before it is needed."""

    def __init__(self, app: Celery, store: SqlFlowStore | None = None) -> None:
        self.app = app
        self.registry = Registry()
        self.stopping = Stopping()
        self.interrupts = Interrupts()
        self.ahead: dict[NotBegun, Ahead] = {"step": Ahead(), "flow": Ahead()}
        self.watch = Watch(lambda: self.settings.tracing)
        self.mirror_rules: list[MirrorRule] = []
        self.archive: Archive | None = None  # takes what is pruned
        self._store = store
        self._opening = threading.Lock()
        refer = weakref.WeakMethod(self._after_fork)
        os.register_at_fork(after_in_child=lambda: (after := refer()) and after())

    def _after_fork(self) -> None:
        """In a forked child: the pooled connections are the parent's, their sockets stay open and are not used here."""
        self._opening = threading.Lock()
        if self._store is not None:
            self._store.engine.dispose(close=False)

    @cached_property
    def settings(self) -> FlowSettings:
        """The validated settings.

        Raises:
            InvalidData: naming the setting and what to write.
        """
        return load_settings(self.app.conf)

    @property
    def mirrors(self) -> bool:
        """Whether workers of this application record mirrored flows."""
        return bool(self.mirror_rules) or self.settings.mirror

    @property
    def store(self) -> SqlFlowStore:
        """This process's store, opened at the first use; its schema is checked then.

        Raises:
            SchemaOutdated, StoreError, InvalidData
        """
        with self._opening:
            if self._store is None:
                self._store = SqlFlowStore(make_engine(self.settings.require_store_url()))
            return self._store

    def schema_version(self) -> str | None:
        """The version the database is at (None: no tables), whether or not this program can work with it.

        Asked once: a database that does not answer costs one connection's timeout.

        Raises:
            StoreError, InvalidData
        """
        if self._store is not None:
            return _version(self._store)
        engine = make_engine(self.settings.require_store_url())
        try:
            return _version(SqlFlowStore(engine, check=False))
        finally:
            engine.dispose()

    def import_definitions(self) -> None:
        """Imports the modules that ``flow_imports`` names.

        Raises:
            InvalidData: one cannot be imported.
        """
        # Read for this alone: whoever imports the definitions may not have set everything yet.
        for module in load_settings(self.app.conf).imports:
            try:
                import_from_cwd(module)  # the current folder is searched, as for Celery's own imports
            except Exception as error:
                why = f"{type(error).__name__}: {error}"
                raise InvalidData("flow_imports", f"module {module!r} cannot be imported ({why})") from error

    @property
    def manager(self) -> FlowManager:
        """The manager over this process's store."""
        return FlowManager(self.store)

    @cached_property
    def publisher(self) -> Publisher:
        """What sends messages, over its own bounded connection."""
        return Publisher(self.app, self.settings, self.watch)

    def urgency(self, priority: int | None) -> int:
        """Of flows that wait for the same: lower comes first, as the broker would have it."""
        return urgency(broker_scheme(self.app), priority)

    def call_worker(self, run_id: str) -> None:
        """Sends the message of this dispatch row, if it is there and needs a worker.

        Raises:
            StoreError: the row could not be read. The sweep sends it later, as it does if the broker fails.
        """
        hint = self.store.run(dispatch.find_hint, run_id)
        if hint is not None:
            self.publisher.publish(hint)

    # The test kit puts parts of its own in the place of these, of `store` and of `publisher`.

    wait_until = staticmethod(poll)
    pause = staticmethod(pause)

    def before_body(self, step: str, body: Callable[..., Any]) -> None:
        """Told each time the body of a step is about to run in this process. Does nothing."""

    def due_slots(self, schedule: Schedule, now: datetime, last: datetime | None) -> list[datetime]:
        """The slots of a schedule that are to be started now; ``last`` as in :meth:`Schedule.due`."""
        return schedule.due(now + AHEAD, last, self.app.timezone)

    @property
    def first_pause(self) -> float:
        """Seconds before the sweep publishes a new row again."""
        return self.settings.republish_seconds

    def default_queue(self) -> str:
        """The queue of flows that name none."""
        return str(self.app.conf.task_default_queue)


def _version(store: SqlFlowStore) -> str | None:
    version: str | None = store.attempt(Call(schema.current), patience=0.0)
    return version


def worker_token(pid: int, request_id: str) -> str:
    """Who runs a message: node, boot, application process, process and Celery request. A claim adds a part of its own,
    so that no two share one; the worker's parent process renews and releases by this beginning."""
    return f"{NODE}/{pid}/{request_id}"


def claim_token(worker: str) -> str:
    """The token of one claim by this worker: one that no other claim has, not even of the same message."""
    return f"{worker}/{secrets.token_hex(4)}"


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8]
    except OSError:
        return "0"


def pid_of(token: str) -> int:
    """The process that holds a row under this token."""
    return int(token.removeprefix(f"{NODE}/").partition("/")[0])


# The last part tells applications apart that share host name, boot and process ids, as containers may; a forked child
# has its parent's.
NODE = f"{socket.gethostname()[:60]}/{_boot_id()}/{secrets.token_hex(4)}"
