"""Flows run from start to end by real workers, with each broker and each database."""

from __future__ import annotations

import pytest

from celery_flows import FlowStatus
from tests.acceptance.conftest import MakeTown, Town
from tests.support.brokers import Broker
from tests.support.shop import Order
from tests.support.waiting import until

EXPECTED = {"payment": "payment for o-1", "labels": ["label 0", "label 1", "label 2"], "approval": {"by": "me"}}
EFFECTS = {"reserve": 1, "charge": 1, "label 0": 1, "label 1": 1, "label 2": 1}


def run_an_order(town: Town) -> None:
    handle = town.shop.fulfil.start(Order(id="o-1"), key="o-1")
    until(lambda: waits_for_approval(town, handle.id), "the flow waits for its approval", within_seconds=30)
    town.shop.flows.emit("approval", "o-1", {"by": "me"})
    assert handle.result(timeout=30) == EXPECTED
    assert town.shop.effects.counts() == EFFECTS


def waits_for_approval(town: Town, flow_id: object) -> bool:
    flow = town.shop.flows.handle(str(flow_id)).get()
    return flow.status is FlowStatus.WAITING and (flow.wait_json or {}).get("topic") == "approval"


def test_a_flow_with_everything_in_it_runs_to_its_end(town: Town) -> None:
    town.worker()
    run_an_order(town)


def test_a_flow_runs_over_sqlite_too(make_town: MakeTown, redis_server: Broker, sqlite_url: str) -> None:
    town = make_town(redis_server.url, sqlite_url)
    town.worker()
    run_an_order(town)


def test_two_workers_share_many_flows_and_do_each_step_once(make_town: MakeTown, redis_server: Broker) -> None:
    """Their processes are replaced after every few tasks, too."""
    town = make_town(redis_server.url)
    for _ in range(2):
        town.worker("--max-tasks-per-child", "3")
    handles = [town.shop.fulfil.start(Order(id=f"o-{n}", boxes=2)) for n in range(10)]
    for n in range(10):
        town.shop.flows.emit("approval", f"o-{n}", n)
    assert [handle.result(timeout=60)["approval"] for handle in handles] == list(range(10))
    assert town.shop.effects.counts() == {"reserve": 10, "charge": 10, "label 0": 10, "label 1": 10}


def test_tasks_outside_flows_still_run_in_the_same_worker(make_town: MakeTown, redis_server: Broker) -> None:
    town = make_town(redis_server.url)
    town.worker()
    town.shop.greet.delay("you")
    until(lambda: town.shop.effects.counts()["hello you"], "the task runs")


@pytest.mark.parametrize("pool", ["threads", "solo"])
def test_flows_run_in_other_pools(make_town: MakeTown, redis_server: Broker, pool: str) -> None:
    town = make_town(redis_server.url)
    town.worker("--pool", pool)
    run_an_order(town)


def test_no_payload_is_in_a_workers_log(make_town: MakeTown, redis_server: Broker) -> None:
    town = make_town(redis_server.url)
    worker = town.worker("--loglevel", "DEBUG")
    handle = town.shop.held_inline.start("hunter2")
    town.shop.open_gate()
    assert handle.result(timeout=30) == "hunter2"
    worker.terminate()
    assert worker.wait_exit() == 0
    assert str(handle.id) in worker.output
    assert "hunter2" not in worker.output
