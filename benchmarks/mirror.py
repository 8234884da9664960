"""``python -m benchmarks.mirror``: what mirroring costs a task, and how long a database that is stuck holds one up.

Tasks that do nothing run eagerly in this process, with all of Celery's signals and no broker. The database is
FLOW_STORE_URL, else SQLite in a temporary file.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from uuid import uuid4

import sqlalchemy as sa
from celery import Celery

from celery_flows import Flow, Flows, FlowStatus, SqlFlowStore
from celery_flows.store import FlowMode, FlowStepStatus, mirrors
from celery_flows.store.engines import make_engine
from celery_flows.store.observations import Observation
from celery_flows.tasks.canvas import HEADER
from celery_flows.tasks.observer import observed

TASKS, STUCK_TASKS, ROUNDS = 500, 20, 3

app = Celery("mirror", broker="memory://", set_as_current=False)


@app.task(shared=False)
def nothing() -> None:
    pass


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="celery-flows-") as scratch, ExitStack() as stack:
        url = os.environ.get("FLOW_STORE_URL", f"sqlite:///{Path(scratch) / 'flows.db'}")
        store = SqlFlowStore.open(url)
        stack.callback(store.close)
        flows = Flows(app, store=store)
        flow = _new_flow(store)
        header = {HEADER: str(flow.id)}
        ways: dict[str, Callable[[], list[float]]] = {
            "no mirroring in this process": lambda: _run({}),
            "mirroring, a task of nobody's": lambda: _observed(flows, {}),
            "mirroring, a mirrored task": lambda: _observed(flows, header),
            "its two writes by themselves": lambda: _writes(store, flow),
        }
        measured: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(ROUNDS):  # interleaved: the machine's moods are shared
            for name, way in ways.items():
                measured[name] += way()
        print(f"{store.engine.dialect.name}, {ROUNDS} rounds of {TASKS} tasks, milliseconds a task")
        for name, seconds in measured.items():
            median, worst = statistics.median(seconds), statistics.quantiles(seconds, n=100)[-1]
            print(f"{name:32} median {median * 1000:7.3f}   99 % {worst * 1000:7.3f}")
        with observed(flows.runtime), _stuck(url):
            first, *others = _run(header, STUCK_TASKS)
            print(f"with the database stuck: first {first * 1000:.1f}, others {statistics.mean(others) * 1000:.3f}")


def _new_flow(store: SqlFlowStore) -> Flow:
    flow = Flow(controller_id="nothing", owner_session_key="default", mode=FlowMode.MIRRORED, status=FlowStatus.RUNNING)
    store.run(mirrors.create, flow, [Observation(flow.id, "planned", "nothing", FlowStepStatus.PENDING)], 3600.0)
    return flow


def _observed(flows: Flows, headers: dict[str, str]) -> list[float]:
    with observed(flows.runtime):
        return _run(headers)


def _writes(store: SqlFlowStore, flow: Flow) -> list[float]:
    """As a task has them, from this thread."""
    seconds = []
    for _ in range(TASKS):
        began = time.perf_counter()
        run_id = str(uuid4())
        for status in (FlowStepStatus.RUNNING, FlowStepStatus.SUCCEEDED):
            store.run(mirrors.observe, [Observation(flow.id, run_id, "nothing", status, called={"parent_id": None})])
        store.run(mirrors.without_live_steps, [flow.id])
        seconds.append(time.perf_counter() - began)
    return seconds


def _run(headers: dict[str, str], count: int = TASKS) -> list[float]:
    """How long each task takes, from the moment it is called."""
    seconds = []
    for _ in range(count):
        began = time.perf_counter()
        nothing.apply(headers=headers)
        seconds.append(time.perf_counter() - began)
    return seconds


@contextmanager
def _stuck(url: str) -> Iterator[None]:
    """Whoever writes a step waits."""
    engine: sa.Engine = make_engine(url)
    with engine.connect() as connection:
        postgresql = connection.dialect.name == "postgresql"
        connection.exec_driver_sql("LOCK TABLE flow_steps" if postgresql else "BEGIN IMMEDIATE")
        yield
        connection.rollback()
    engine.dispose()


if __name__ == "__main__":
    main()
