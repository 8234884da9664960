"""``python -m examples.mirror_a_chord``: applies the chord, mirrored, and shows the flow, planned and ended.

The database is FLOW_STORE_URL, else SQLite in a temporary file; the broker CELERY_BROKER_URL, else an embedded Redis.
Celery's results are kept in CELERY_RESULT_BACKEND, else in the broker, which must then be a Redis.
"""

from __future__ import annotations

import os

from celery_flows import FlowHandle
from examples.mirror_a_chord.app import app, count_all, flows
from examples.servers import servers, start_worker

TEXTS = ["to be or not to be", "that is the question", "whether"]
SECONDS = 60.0


def main() -> None:
    with servers(app) as processes:
        results = os.environ.setdefault("CELERY_RESULT_BACKEND", os.environ["CELERY_BROKER_URL"])
        app.conf.update(result_backend=results)
        result, flow = flows.mirror(count_all(TEXTS), goal="how many words are these?").apply_async()
        show(flow)
        start_worker(processes, "examples.mirror_a_chord.app")
        words = result.get(timeout=SECONDS)  # Celery's own
        flow.result(timeout=SECONDS)  # what the body published may still run
        show(flow)
        print(f"{words} words")


def show(flow: FlowHandle[None]) -> None:
    """The flow and its steps, as the store has them now."""
    print(f"{flow.get().goal} {flow.status()}")
    for step in flows.store.list_steps(flow.id):
        tries = f", attempt {step.attempt}" if step.attempt > 1 else ""
        print(f"  {step.task.rpartition('.')[2]}: {step.status}{tries}")


if __name__ == "__main__":
    main()
