"""Workers are told to stop, at once or after a while: what they cut short is handed on at once, and is no crash.

Leases are long here: work that another worker takes up within seconds was given back, for it cannot have run out.
"""

from __future__ import annotations

import json
import signal
import time
from typing import Any

import pytest
import sqlalchemy as sa

from celery_flows import FlowHandle, FlowStatus
from celery_flows.store.tables import flow_dispatch
from tests.acceptance.conftest import MakeTown, Town
from tests.support.brokers import Broker
from tests.support.shop import CONF
from tests.support.waiting import until
from tests.support.workers import Worker, is_alive

LEASE_SECONDS = 30
AT_ONCE = 10.0  # seconds, on a busy machine, too; a third of the lease

everywhere = pytest.mark.parametrize(
    ("broker", "way"), [("redis", "step"), ("redis", "inline"), ("rabbitmq", "step")], indirect=["broker"]
)


def start_workers(town: Town, **more: str) -> None:
    """Two of them, with long leases: the one that works, and the one that is to take over."""
    workers = [town.worker(ready=False, FLOW_LEASE_SECONDS=str(LEASE_SECONDS), **more) for _ in range(2)]
    for worker in workers:
        worker.wait_ready()


def begin(town: Town, way: str) -> FlowHandle[str]:
    """Starts a flow whose second step is held, and waits until it is."""
    flow = town.shop.held_step if way == "step" else town.shop.held_inline
    handle = flow.start("work")
    until(lambda: town.shop.effects.read("work began"), "the step began", within_seconds=30)
    return handle


def worker_of(town: Town, pid: int) -> Worker:
    """The worker whose process this is."""
    [found] = [worker for worker in town.workers if worker.process.poll() is None and pid in worker.children()]
    return found


def dispatch_rows(town: Town, handle: FlowHandle[Any]) -> list[Any]:
    """What stands in the flow's dispatch rows: who holds each, how often it was taken, and died in a row."""
    columns = flow_dispatch.c
    asked = sa.select(columns.worker, columns.fence, columns.crash_count)
    with town.shop.flows.store.engine.connect() as connection:
        return list(connection.execute(asked.where(columns.flow_id == handle.id)))


def check_handed_on(town: Town, handle: FlowHandle[str], cut: int, told_at: float) -> None:
    """The step was cut short in process ``cut``, and another process holds it by now, with no crash counted."""
    until(lambda: len(town.shop.effects.read("work began")) == 2, "another takes the step", within_seconds=AT_ONCE)
    assert time.monotonic() - told_at < AT_ONCE
    again = town.shop.effects.read("work began")[1]["pid"]
    rows = dispatch_rows(town, handle)
    [held] = [row for row in rows if row.worker is not None]
    assert f"/{again}/" in held.worker
    assert held.fence == 2
    assert [row.crash_count for row in rows] == [0] * len(rows)
    town.shop.open_gate()
    assert handle.result(timeout=30) == "work"
    assert town.shop.effects.counts() == {"before": 1, "work began": 2, "work ended": 1, "after": 1}
    until(lambda: not is_alive(cut), "the process that was cut short is gone")


@everywhere
def test_a_cold_shutdown_hands_its_work_on_at_once(town: Town, way: str) -> None:
    start_workers(town)
    handle = begin(town, way)
    pid = town.shop.effects.read("work began")[0]["pid"]
    worker = worker_of(town, pid)
    worker.process.send_signal(signal.SIGQUIT)
    told_at = time.monotonic()
    check_handed_on(town, handle, pid, told_at)
    worker.wait_exit()
    assert "Cold shutdown" in worker.output


@everywhere
def test_work_that_outlasts_a_soft_shutdown_is_handed_on(town: Town, way: str) -> None:
    seconds = 2
    start_workers(town, REMAP_SIGTERM="SIGQUIT", **{CONF: json.dumps({"worker_soft_shutdown_timeout": seconds})})
    handle = begin(town, way)
    pid = town.shop.effects.read("work began")[0]["pid"]
    worker = worker_of(town, pid)
    worker.terminate()
    told_at = time.monotonic()
    until(lambda: "Initiating Soft Shutdown" in worker.output, "the worker is stopping softly")
    assert is_alive(pid)
    check_handed_on(town, handle, pid, told_at)
    assert time.monotonic() - told_at > seconds
    worker.wait_exit()


def test_work_that_ends_within_a_soft_shutdown_is_not_done_again(make_town: MakeTown, redis_server: Broker) -> None:
    """Its lease, shorter than the shutdown, is kept meanwhile, though another worker looks for lost ones."""
    town = make_town(redis_server.url)
    town.environment[CONF] = json.dumps({"worker_soft_shutdown_timeout": 5, "flow_lease_seconds": 2})
    for _ in range(2):
        town.worker(REMAP_SIGTERM="SIGQUIT")
    handle = begin(town, "step")
    pid = town.shop.effects.read("work began")[0]["pid"]
    worker = worker_of(town, pid)
    worker.terminate()
    told_at = time.monotonic()
    until(lambda: "Initiating Soft Shutdown" in worker.output, "the worker is stopping softly")
    until(lambda: time.monotonic() - told_at > 3, "more than a lease's time passes")
    assert is_alive(pid)
    town.shop.open_gate()
    assert handle.result(timeout=30) == "work"
    assert town.shop.effects.counts() == {"before": 1, "work began": 1, "work ended": 1, "after": 1}
    worker.wait_exit()


def test_a_driver_with_many_steps_stops_between_two_of_them(make_town: MakeTown, redis_server: Broker) -> None:
    """A warm shutdown waits for one step, not for all that the flow has left to do."""
    town = make_town(redis_server.url)
    start_workers(town)
    count = 200  # of a tenth of a second each
    handle = town.shop.many_inline.start(count)
    ticked = town.shop.effects.read
    until(lambda: len(ticked()) >= 3, "the flow is among its steps", within_seconds=30)
    pid = ticked()[0]["pid"]
    worker = worker_of(town, pid)
    worker.terminate()
    told_at = time.monotonic()
    until(lambda: ticked()[-1]["pid"] != pid, "another goes on with the flow", within_seconds=AT_ONCE)
    assert time.monotonic() - told_at < AT_ONCE
    assert worker.wait_exit() == 0
    assert len(ticked()) < count
    assert handle.status() is FlowStatus.RUNNING
    [drive] = dispatch_rows(town, handle)
    assert (drive.fence, drive.crash_count) == (2, 0)
    town.shop.open_gate()
    assert handle.result(timeout=30) == sum(range(count))
    assert [line["effect"] for line in ticked()] == [f"tick {number}" for number in range(count)]
