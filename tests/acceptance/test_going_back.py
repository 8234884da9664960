"""Flows that go back are driven by real workers, and what they took over is not done again when those are killed."""

from __future__ import annotations

from celery_flows import FlowStatus
from tests.acceptance.conftest import MakeTown, Town
from tests.support.brokers import Broker
from tests.support.shop import Order
from tests.support.waiting import until

EFFECTS = {"reserve": 1, "charge": 1, "label 0": 1, "label 1": 1}


def test_a_cancelled_order_is_retried_and_a_finished_one_forked(make_town: MakeTown, redis_server: Broker) -> None:
    town = make_town(redis_server.url)
    town.worker()
    handle = town.shop.fulfil.start(Order(id="o-1", boxes=2), key="o-1")
    until(lambda: handle.status() is FlowStatus.WAITING, "the order waits", within_seconds=30)
    handle.cancel()
    until(lambda: handle.status() is FlowStatus.CANCELLED, "it is cancelled", within_seconds=30)

    retried = handle.retry()
    town.shop.flows.emit("approval", "o-1", "granted")
    assert retried.result(timeout=30)["approval"] == "granted"
    assert town.shop.effects.counts() == EFFECTS

    forked = retried.fork(from_step="shop.label")
    town.shop.flows.emit("approval", "o-1", "granted again")
    assert forked.result(timeout=30) == {**retried.result(), "approval": "granted again"}
    assert town.shop.effects.counts() == EFFECTS | {"label 0": 2, "label 1": 2}


def test_a_killed_worker_leaves_a_fork_with_what_it_took_over(make_town: MakeTown, redis_server: Broker) -> None:
    town = make_town(redis_server.url)
    worker = town.worker("--concurrency", "2")
    handle = town.shop.held_step.start("work")
    until(lambda: began(town) == 1, "the step began", within_seconds=30)
    forked = handle.fork(from_step="shop.hold")
    until(lambda: began(town) == 2, "the fork's step began, too", within_seconds=30)
    worker.kill()
    town.shop.open_gate()
    town.worker()
    assert [each.result(timeout=60) for each in (handle, forked)] == ["work", "work"]
    counts = town.shop.effects.counts()
    assert counts["work began"] == 4, "the fault struck"
    assert (counts["before"], counts["after"]) == (1, 2)


def began(town: Town) -> int:
    """How often the held step has begun."""
    return len(town.shop.effects.read("work began"))
