"""Redis delivers again what nobody acknowledged within its visibility timeout; work and timers longer than that are had
once all the same. Beside each stands a plain Celery task, to show that Redis did deliver again meanwhile.
"""

from __future__ import annotations

import json

import pytest

from tests.acceptance.conftest import MakeTown, Town
from tests.support.brokers import Broker
from tests.support.shop import CONF, Order
from tests.support.waiting import until

EFFECTS = {"reserve": 1, "charge": 1, "label 0": 1, "label 1": 1}
AGAIN = 3  # deliveries of a plain task: the timeout passed twice at least
TIMER_SECONDS = 6

# Looked at once a second; left to themselves, Celery's consumers look once in about a hundred.
TRANSPORT = {"visibility_timeout": 2, "unacked_restore_interval": 1, "unacked_restore_throttle": 1}


@pytest.fixture
def impatient_town(make_town: MakeTown, redis_server: Broker) -> Town:
    """A town whose broker delivers again after 2 seconds; that our own sweep sends something again takes a minute."""
    town = make_town(redis_server.url)
    conf = {"broker_transport_options": TRANSPORT, "task_acks_late": True, "flow_republish_seconds": 60}
    town.environment[CONF] = json.dumps(conf)
    town.shop.app.conf.update(conf)
    return town


def test_a_step_and_a_timer_longer_than_the_visibility_timeout_have_one_effect(impatient_town: Town) -> None:
    town = impatient_town
    for _ in range(2):
        town.worker("-c", "3")
    town.shop.app.send_task("shop.hold", ("plain",), ignore_result=True)
    town.shop.greet.apply_async(("plain",), countdown=TIMER_SECONDS)
    held, delayed = town.shop.held_step.start("work"), town.shop.delayed.start(TIMER_SECONDS)
    counts = town.shop.effects.counts
    until(lambda: counts()["work began"] and counts()["plain began"], "both began", within_seconds=30)
    until(lambda: counts()["plain began"] >= AGAIN, "Redis delivers a running task again", within_seconds=40)
    town.shop.open_gate()
    assert held.result(timeout=30) == "work"
    until(lambda: counts()["hello plain"] >= AGAIN, "Redis delivered a countdown again", within_seconds=40)
    assert delayed.result(timeout=30) == "on time"
    expected = {"before": 1, "work began": 1, "work ended": 1, "after": 1, "early": 1, "on time": 1}
    assert {effect: counts()[effect] for effect in expected} == expected


def test_a_message_that_a_busy_worker_keeps_is_delivered_again_and_has_one_effect(impatient_town: Town) -> None:
    """It was taken off the queue and not begun, so it is not acknowledged; in the end both workers have run it."""
    town = impatient_town
    busy = town.worker("-c", "1")
    town.shop.held_step.start("work")
    until(lambda: town.shop.effects.read("work began"), "the worker is busy", within_seconds=30)
    town.shop.flows.emit("approval", "o-1", "yes")
    order = town.shop.fulfil.start(Order(id="o-1", boxes=2))
    message = f"Task shop/fulfil[{order.id}]"
    until(lambda: f"{message} received" in busy.output, "the busy worker keeps the message")
    idle = town.worker()
    assert order.result(timeout=30)["approval"] == "yes"
    assert f"{message} received" in idle.output
    town.shop.open_gate()
    until(lambda: f"{message} succeeded" in busy.output, "the busy worker has run the message, too", within_seconds=20)
    counts = town.shop.effects.counts()
    assert {effect: counts[effect] for effect in EFFECTS} == EFFECTS
