"""Beat sweeps and prunes besides the workers, and two beats do no harm: every chore may be done twice, and at once."""

from __future__ import annotations

import json
import math
import re
from datetime import datetime
from uuid import UUID

import pytest
import sqlalchemy as sa

from celery_flows import Run
from celery_flows.store import Flow, FlowStatus, SqlFlowStore
from celery_flows.store import operations as op
from celery_flows.store.tables import flow_dispatch, flow_events, flows
from tests.acceptance.conftest import MakeTown, Town
from tests.acceptance.test_broker_faults import check_orders, start_orders
from tests.support.brokers import Broker
from tests.support.samples import DAY, a_flow, ended, now
from tests.support.shop import CONF
from tests.support.waiting import until
from tests.support.workers import Beat

PAST = 1500  # old flows: three batches, so that one prune is still at it when the next begins
OFTEN = {
    f"often: {task}": {"task": f"flows.{task}", "schedule": seconds}
    for task, seconds in (("sweep", 0.3), ("prune", 0.5))
}
NEVER = "3600"  # seconds


def add_past(store: SqlFlowStore) -> None:
    """Flows that ended before the retention, each with an event."""
    old = [ended(31, owner_session_key="past") for _ in range(PAST)]
    with store.engine.begin() as connection:
        connection.execute(
            sa.insert(flows),
            [{**dict(flow), "finished_at": flow.updated_at, "rest_at": flow.updated_at} for flow in old],
        )
        told = {"kind": "noted", "payload_json": {}, "at": now()}
        connection.execute(sa.insert(flow_events), [{"flow_id": flow.id, **told} for flow in old])


def count_past(store: SqlFlowStore) -> tuple[int, int]:
    """How many such flows are left, and how many of their events."""
    past = sa.select(sa.func.count()).where(flows.c.owner_session_key == "past")
    noted = sa.select(sa.func.count()).where(flow_events.c.kind == "noted")
    with store.engine.connect() as connection:
        return connection.scalar(past) or 0, connection.scalar(noted) or 0


def add_kept(store: SqlFlowStore) -> list[Flow]:
    """Flows that no prune may take: open, ended lately, or of a parent that is open."""
    at = now() - 40 * DAY
    parent = a_flow(status=FlowStatus.RUNNING, created_at=at, updated_at=at)
    kept = [parent, ended(29), ended(40, parent_flow_id=parent.id)]
    for flow in kept:
        store.insert(flow)
    return [store.get(flow.id) or flow for flow in kept]


def start_where_no_worker_is(town: Town, queue: str) -> UUID:
    """A flow whose messages pile up in a queue that nobody reads."""

    @town.shop.flows.flow("shop/elsewhere", queue=queue)
    def elsewhere(run: Run) -> None: ...

    return elsewhere.start().id


def published(store: SqlFlowStore, flow_id: UUID) -> tuple[int, datetime]:
    """How often the flow's message has been sent, and the database's time."""
    counted = sa.select(flow_dispatch.c.publish_count).where(flow_dispatch.c.run_id == str(flow_id))
    with store.engine.connect() as connection:
        return int(connection.scalar(counted) or 0), op.now(connection)


@pytest.mark.parametrize("schedules", [("one", "two"), ("one", "one")], ids=["own schedule files", "the same one"])
def test_two_beats_at_once_do_no_harm_and_one_prunes_worth_of_work(
    make_town: MakeTown, redis_server: Broker, schedules: tuple[str, str]
) -> None:
    town = make_town(redis_server.url)
    store = town.shop.flows.store
    add_past(store)
    kept = add_kept(store)
    handles = start_orders(town, 3)
    until(lambda: redis_server.count(town.queue) == 3, "the broker has the messages")
    redis_server.lose_everything(town.queue)
    unread = f"{town.queue}-elsewhere"
    began = store.run(op.now)
    waits = start_where_no_worker_is(town, unread)
    beats: list[Beat] = []

    def each_sent(times: int) -> bool:
        return min(beat.sent(f"flows.{task}") for beat in beats for task in ("sweep", "prune")) >= times

    for schedule in schedules:
        beats.append(town.beat(schedule, **{CONF: json.dumps({"beat_schedule": OFTEN})}))
        # Not at the very same time: each writes its schedule file soon after its first look, and Python's own dbm
        # raises if another process writes the same file just then.
        until(lambda: each_sent(3), "the beats send both chores", within_seconds=30)
    assert count_past(store) == (PAST, PAST)  # nobody has done them yet: the worker finds all of them at once
    worker = town.worker("-c", "4", FLOW_SWEEP_SECONDS=NEVER)
    check_orders(town, handles)
    until(lambda: count_past(store) == (0, 0), "the old flows are pruned", within_seconds=30)
    more = 3 + max(beat.sent("flows.prune") for beat in beats)
    until(lambda: each_sent(more), "both beats go on", within_seconds=30)
    until(lambda: redis_server.count(town.queue) == 0, "the worker has done all chores that were sent")

    deletions = [int(count) for count in re.findall(r"pruned (\d+) flows", worker.output)]
    assert len(deletions) > 6  # prunes; the first of them at once
    assert sum(deletions) == PAST
    assert [store.get(flow.id) for flow in kept] == kept
    check_pauses(town, waits, began, redis_server.count(unread))
    assert "ERROR/" not in worker.output
    assert "Traceback" not in worker.output


def check_pauses(town: Town, flow_id: UUID, began: datetime, messages: int) -> None:
    """However many sweeps there were, a message that nobody reads was sent again after a growing pause only."""
    count, at = published(town.shop.flows.store, flow_id)
    pause = town.shop.flows.settings.republish_seconds
    # The first pause, that once more, and then each twice as long as the one before.
    assert 1 < messages <= count <= 2 + math.log2((at - began).total_seconds() / pause)


def test_beat_sweeps_when_no_worker_does(make_town: MakeTown, redis_server: Broker) -> None:
    """With the schedule that is shipped, nothing of it shortened."""
    town = make_town(redis_server.url)
    town.shop.open_gate()
    handle = town.shop.held_inline.start("work")
    until(lambda: redis_server.count(town.queue) == 1, "the broker has the message")
    redis_server.lose_everything(town.queue)
    beat = town.beat("schedule")
    worker = town.worker(FLOW_SWEEP_SECONDS=NEVER)
    assert handle.result(timeout=40) == "work"
    assert town.shop.effects.counts() == {"before": 1, "work began": 1, "work ended": 1, "after": 1}
    assert beat.sent("flows.sweep") == 1
    assert "swept: 1 due, 1 published" in worker.output
