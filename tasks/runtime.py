"""What the engine's parts share: the Celery app, the settings, the definitions, this process's store and publisher."""

from __future__ import annotations

import os
import socket
from functools import cached_property
from pathlib import Path

from celery import Celery
from celery.utils.imports import import_from_cwd

from celery_flows.store import FlowManager, InvalidData, SqlFlowStore
from celery_flows.store.engines import make_engine
from celery_flows.tasks.publish import Publisher
from celery_flows.tasks.registry import Registry
from celery_flows.tasks.settings import FlowSettings, load_settings


class Runtime:
    """One per application. Nothing is read or opened before it is needed."""

    def __init__(self, app: Celery, store: SqlFlowStore | None = None) -> None:
        self.app = app
        self.registry = Registry()
        self._given_store = store
        self._store: SqlFlowStore | None = None
        self._store_pid = 0

    @cached_property
    def settings(self) -> FlowSettings:
        """The validated settings.

        Raises:
            InvalidData: naming the setting and what to write.
        """
        return load_settings(self.app.conf)

    @property
    def store(self) -> SqlFlowStore:
        """This process's store, opened at the first use; its schema is checked then.

        A forked child opens its own: connections must not be shared with the parent. The parent's are left alone.

        Raises:
            SchemaOutdated, StoreError, InvalidData
        """
        if self._store is None or self._store_pid != os.getpid():
            self._store, self._store_pid = self._open_store(), os.getpid()
        return self._store

    def _open_store(self) -> SqlFlowStore:
        if self._store is not None:  # forked: the pool is the parent's, its sockets must stay open
            self._store.engine.dispose(close=False)
        if self._given_store is not None:
            return self._given_store
        return SqlFlowStore(make_engine(self.settings.require_store_url()))

    def import_definitions(self) -> None:
        """Imports the modules that ``flow_imports`` names.

        Raises:
            InvalidData: one cannot be imported.
        """
        for module in self.settings.imports:
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
        return Publisher(self.app, self.settings)

    @property
    def first_pause(self) -> float:
        """Seconds before the sweep publishes a new row again."""
        return self.settings.republish_seconds

    def default_queue(self) -> str:
        """The queue of flows that name none."""
        return str(self.app.conf.task_default_queue)


def worker_token(pid: int, request_id: str) -> str:
    """Who holds a lease: node, boot, process and Celery request. No two claims of different messages share one."""
    return f"{_NODE}/{pid}/{request_id}"


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8]
    except OSError:
        return "0"


_NODE = f"{socket.gethostname()[:60]}/{_boot_id()}"
