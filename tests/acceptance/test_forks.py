"""Workers fork: what the application opened before is not shared by the processes of the pool."""

from __future__ import annotations

import pytest

from tests.acceptance.conftest import MakeTown
from tests.acceptance.test_broker_faults import check_orders, start_orders
from tests.support.brokers import Broker
from tests.support.shop import GIVEN, USED_EARLY


@pytest.mark.parametrize("whose", ["its own", "given"])
def test_a_pool_forked_from_an_application_that_used_its_store_mixes_nothing_up(
    make_town: MakeTown, redis_server: Broker, database_url: str, whose: str
) -> None:
    town = make_town(redis_server.url, database_url)
    town.environment |= {USED_EARLY: "yes", **({GIVEN: "yes"} if whose == "given" else {})}
    town.worker("-c", "4")
    check_orders(town, start_orders(town, 10))
    assert len({effect["pid"] for effect in town.shop.effects.read()}) > 1  # several children at work
