"""Flows that the clock starts: one for each slot, however many beats there are, and whichever of them dies."""

from __future__ import annotations

from datetime import datetime, timedelta
from itertools import pairwise

import sqlalchemy as sa

from celery_flows.store import FlowStatus
from celery_flows.store.tables import flows
from tests.acceptance.conftest import MakeTown, Town
from tests.support.brokers import Broker
from tests.support.shop import BELLS
from tests.support.waiting import until

EVERY = timedelta(seconds=2)


def rung(town: Town) -> dict[datetime, FlowStatus]:
    """The slots of the bell's flows and how these stand, oldest first; a slot of two flows fails."""
    query = sa.select(flows.c.input_json, flows.c.status).where(flows.c.controller_id == "shop/bell")
    with town.shop.flows.store.engine.connect() as connection:
        rows = [(datetime.fromisoformat(row.input_json), row.status) for row in connection.execute(query)]
    slots = dict(sorted(rows))
    assert len(slots) == len(rows), "a slot has two flows"
    return slots


def test_two_beats_start_one_flow_a_slot_and_one_of_them_is_enough(make_town: MakeTown, redis_server: Broker) -> None:
    town = make_town(redis_server.url)
    town.environment[BELLS] = str(EVERY.total_seconds())
    worker = town.worker("-c", "4")
    beats = [town.beat("one"), town.beat("two")]
    until(lambda: min(beat.sent("flows.look") for beat in beats) >= 5, "both beats fire", within_seconds=60)
    until(lambda: len(rung(town)) >= 5, "five slots have their flows", within_seconds=30)
    looks = sum(beat.sent("flows.look") for beat in beats)
    assert looks > len(rung(town)) + 2, "both beats have asked for the same slots"

    beats[0].process.kill()
    before = max(rung(town))
    until(lambda: max(rung(town)) >= before + 3 * EVERY, "the other beat goes on", within_seconds=30)
    beats[1].process.kill()
    until(lambda: set(rung(town).values()) == {FlowStatus.FINISHED}, "all flows have run", within_seconds=30)

    slots = list(rung(town))
    assert [later - earlier for earlier, later in pairwise(slots)] == [EVERY] * (len(slots) - 1)
    rings = town.shop.effects.counts()
    assert rings == {f"bell {slot.isoformat()}": 1 for slot in slots}
    assert "ERROR/" not in worker.output
