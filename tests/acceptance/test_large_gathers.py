"""A gather of thousands of Celery steps, with real workers: its cost must grow with its members, and no faster."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from tests.acceptance.conftest import MakeTown, Town
from tests.support.brokers import Broker
from tests.support.shop import Order

MEMBERS = 2_000


def statistics_of(town: Town, table: str) -> Any:
    """What PostgreSQL has counted of a table until now, or a little less."""
    asked = sa.text(
        "SELECT seq_tup_read + idx_tup_fetch AS read, n_tup_ins AS inserted, n_tup_upd AS updated "
        "FROM pg_stat_user_tables WHERE relname = :table"
    )
    with town.shop.flows.store.engine.connect() as connection:
        return connection.execute(asked, {"table": table}).one()


def test_two_thousand_members_are_run_once_and_joined_once(make_town: MakeTown, redis_server: Broker) -> None:
    town = make_town(redis_server.url)
    town.worker("-l", "WARNING", SHOP_DEFAULTS="1")
    town.shop.flows.emit("approval", "large", "granted")
    handle = town.shop.fulfil.start(Order(id="large", boxes=MEMBERS))
    labels = [f"label {box}" for box in range(MEMBERS)]
    assert handle.result(timeout=180)["labels"] == labels
    assert town.shop.effects.counts() == dict.fromkeys([*labels, "reserve", "charge"], 1)

    kinds = [event.kind for event in town.shop.flows.store.list_events(handle.id, None)]
    assert kinds.count("step_started") == MEMBERS + 1  # charging is one, too
    drives = sum(kinds.count(kind) for kind in ("started", "resumed", "reclaimed"))
    assert drives <= 6  # its start, the charge, the join, the timer, and the event, whose look may come twice

    # Each member's row is read and written by its claim and its completion; history is read once a drive.
    steps = statistics_of(town, "flow_steps")
    assert steps.read < (drives + 4) * MEMBERS
    assert steps.updated < 2.1 * MEMBERS
    assert statistics_of(town, "flow_dispatch").updated < 3 * MEMBERS
