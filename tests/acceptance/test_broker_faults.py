"""The broker loses everything, or is not there: what was started runs all the same, a little later."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kombu import Connection, Producer

from celery_flows import FlowStatus
from celery_flows.store import dispatch
from celery_flows.tasks.drive import drive
from tests.acceptance.conftest import MakeTown, Town
from tests.support.brokers import Broker, OwnRedis
from tests.support.faults import black_hole, closed_port
from tests.support.shop import Order
from tests.support.waiting import until


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[OwnRedis]:
    """A Redis server that is the test's to start and to kill; not started yet."""
    server = OwnRedis(closed_port(), tmp_path)
    try:
        yield server
    finally:
        server.close()


def start_orders(town: Town, count: int) -> list[Any]:
    for n in range(count):
        town.shop.flows.emit("approval", f"o-{n}", n)
    return [town.shop.fulfil.start(Order(id=f"o-{n}", boxes=2)) for n in range(count)]


def check_orders(town: Town, handles: list[Any]) -> None:
    assert [handle.result(timeout=60)["approval"] for handle in handles] == list(range(len(handles)))
    count = len(handles)
    assert town.shop.effects.counts() == {"reserve": count, "charge": count, "label 0": count, "label 1": count}


def test_drive_messages_that_a_broker_lost_are_sent_again(town: Town, broker: Broker) -> None:
    handles = start_orders(town, 4)
    until(lambda: broker.count(town.queue) == 4, "the broker has the messages")
    broker.lose_everything(town.queue)
    assert broker.count(town.queue) == 0
    town.worker()
    check_orders(town, handles)


def test_step_messages_that_a_broker_lost_are_sent_again(town: Town, broker: Broker) -> None:
    handles = start_orders(town, 3)
    for handle in handles:
        drive(town.shop.flows.runtime, handle.id, "driver of this test")
    steps = [len(town.shop.flows.store.list_steps(handle.id)) for handle in handles]
    assert steps == [2, 2, 2]  # reserved, and to be charged
    until(lambda: broker.count(town.queue) == 6, "the broker has the messages of flows and steps")
    broker.lose_everything(town.queue)
    assert broker.count(town.queue) == 0
    town.worker()
    check_orders(town, handles)


def test_doubled_messages_have_one_effect(town: Town, broker: Broker) -> None:
    handles = start_orders(town, 3)
    runtime = town.shop.flows.runtime
    for handle in handles:
        drive(runtime, handle.id, "driver of this test")
        for row in runtime.store.run(dispatch.read_history, handle.id):
            step = dispatch.Hint(row.run_id, handle.id, "step", row.task, town.queue)
            flow = dispatch.Hint(str(handle.id), handle.id, "drive", "shop/fulfil", town.queue)
            assert runtime.publisher.publish(step, flow, step, flow) == 4
    until(lambda: broker.count(town.queue) >= 24, "the broker has every message several times")
    for _ in range(2):
        town.worker()
    check_orders(town, handles)


MALFORMED = [b"{broken", b'"hello"', b'{"a": 1}', b"null", b"[1, 2, 3]", b"[[], {}]", b"\xff\xfe"]


def test_malformed_messages_do_not_stop_a_worker(town: Town, broker: Broker) -> None:
    worker = town.worker("-c", "1")
    with Connection(broker.url) as connection, connection.channel() as channel:
        producer = Producer(channel)
        for task in ("flows.drive", "flows.step", "shop.greet", "celery.ping", "no.such.task"):
            for number, body in enumerate(MALFORMED):
                producer.publish(
                    body, routing_key=town.queue, content_type="application/json", content_encoding="utf-8",
                    headers={"task": task, "id": f"malformed-{number}", "lang": "py"},
                )  # fmt: skip
        producer.publish(
            b"gASVCAAAAAAAAACMBHBpY2tslC4=", routing_key=town.queue, content_type="application/x-python-serialize"
        )
        producer.publish({"no": "headers"}, routing_key=town.queue)
    handles = start_orders(town, 1)
    check_orders(town, handles)
    until(lambda: broker.count(town.queue) == 0, "every message is taken off the queue")
    assert worker.process.poll() is None


def test_a_broker_that_is_not_there_at_the_start_is_waited_for(make_town: MakeTown, own_redis: OwnRedis) -> None:
    town = make_town(own_redis.url)
    began = time.monotonic()
    handles = start_orders(town, 1)
    assert time.monotonic() - began < 5
    assert handles[0].status() is FlowStatus.CREATED
    own_redis.start()
    town.worker()
    check_orders(town, handles)


def test_a_broker_that_never_answers_does_not_hold_up_a_start(make_town: MakeTown, own_redis: OwnRedis) -> None:
    with black_hole() as port:
        town = make_town(f"redis://127.0.0.1:{port}/0")
        began = time.monotonic()
        handle = town.shop.held_inline.start("late")
        assert time.monotonic() - began < 5
        assert handle.status() is FlowStatus.CREATED
    own_redis.start()
    served = make_town(own_redis.url)
    served.shop.open_gate()
    served.worker()
    assert handle.result(timeout=40) == "late"
    assert served.shop.effects.counts()["late ended"] == 1


def test_a_broker_that_is_killed_and_comes_back_empty_stops_nothing(make_town: MakeTown, own_redis: OwnRedis) -> None:
    own_redis.start()
    town = make_town(own_redis.url)
    worker = town.worker()
    handle = town.shop.held_step.start("work")
    until(lambda: town.shop.effects.read("work began"), "the step began", within_seconds=30)
    own_redis.kill()
    town.shop.open_gate()  # the step ends while there is no broker
    until(lambda: town.shop.effects.read("work ended"), "the step ended")
    began = time.monotonic()
    handles = start_orders(town, 2)
    assert time.monotonic() - began < 10
    own_redis.start()
    assert handle.result(timeout=60) == "work"
    assert [order.result(timeout=60)["approval"] for order in handles] == [0, 1]
    assert town.shop.effects.counts()["work began"] == 1
    assert worker.process.poll() is None
