"""What a short run of an example needs: a database, a broker, a worker."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from celery import Celery

from celery_flows import SqlFlowStore
from celery_flows.worker.embedded import Processes, await_fact, start_broker


@contextmanager
def servers(app: Celery) -> Iterator[Processes]:
    """Has the app use FLOW_STORE_URL, else SQLite in a temporary file, and CELERY_BROKER_URL, else an embedded Redis;
    for as long as the block runs."""
    with tempfile.TemporaryDirectory(prefix="celery-flows-") as scratch, Processes(Path(scratch)) as processes:
        store = os.environ.setdefault("FLOW_STORE_URL", f"sqlite:///{processes.directory / 'flows.db'}")
        broker = os.environ["CELERY_BROKER_URL"] = start_broker(processes)
        app.conf.update(broker_url=broker)
        SqlFlowStore.open(store).close()
        yield processes


def start_worker(processes: Processes, module: str, *options: str) -> None:
    """A worker of this module's app; it is ready when this returns."""
    command = [sys.executable, "-m", "celery", "-A", module, "worker", "-c", "2", "-l", "info", *options]
    worker, log = processes.start("worker", command), processes.log_of("worker")
    await_fact(lambda: b" ready." in log.read_bytes(), worker, log)
