"""``python -m examples.mirror_a_chord``: applies the chord, mirrored, and shows the flow, planned and ended.

The database is FLOW_STORE_URL, else SQLite in a temporary file; the broker CELERY_BROKER_URL, else an embedded Redis.
Celery's results are kept in CELERY_RESULT_BACKEND, else in the broker, which must then be a Redis.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from celery_flows import FlowHandle, SqlFlowStore
from celery_flows.worker.embedded import Processes, await_fact, start_broker
from examples.mirror_a_chord.app import app, count_all, flows

TEXTS = ["to be or not to be", "that is the question", "whether"]
SECONDS = 60.0


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="celery-flows-") as scratch, Processes(Path(scratch)) as processes:
        _start_servers(processes)
        result, flow = flows.mirror(count_all(TEXTS), goal="how many words are these?").apply_async()
        show(flow)
        _start_worker(processes)
        words = result.get(timeout=SECONDS)  # Celery's own
        flow.result(timeout=SECONDS)  # what the body published may still run
        show(flow)
        print(f"{words} words")


def _start_servers(processes: Processes) -> None:
    store = os.environ.setdefault("FLOW_STORE_URL", f"sqlite:///{processes.directory / 'flows.db'}")
    broker = os.environ["CELERY_BROKER_URL"] = start_broker(processes)
    results = os.environ.setdefault("CELERY_RESULT_BACKEND", broker)
    app.conf.update(broker_url=broker, result_backend=results)
    SqlFlowStore.open(store).close()


def _start_worker(processes: Processes) -> None:
    command = [sys.executable, "-m", "celery", "-A", "examples.mirror_a_chord.app", "worker", "-c", "2", "-l", "info"]
    worker, log = processes.start("worker", command), processes.log_of("worker")
    await_fact(lambda: b" ready." in log.read_bytes(), worker, log)


def show(flow: FlowHandle[None]) -> None:
    """The flow and its steps, as the store has them now."""
    print(f"{flow.get().goal} {flow.status()}")
    for step in flows.store.list_steps(flow.id):
        tries = f", attempt {step.attempt}" if step.attempt > 1 else ""
        print(f"  {step.task.rpartition('.')[2]}: {step.status}{tries}")


if __name__ == "__main__":
    main()
