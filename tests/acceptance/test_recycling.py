"""Worker processes are replaced after a few tasks, or once they have grown too large: nothing is lost or doubled."""

from __future__ import annotations

from collections import Counter

from tests.acceptance.conftest import MakeTown
from tests.support.brokers import Broker
from tests.support.shop import Order
from tests.support.waiting import until
from tests.support.workers import is_alive

LIMIT_MEGABYTES = 150


def test_processes_that_are_replaced_after_three_tasks_lose_nothing(make_town: MakeTown, redis_server: Broker) -> None:
    town = make_town(redis_server.url)
    worker = town.worker("--max-tasks-per-child", "3")
    count = 4
    orders = [town.shop.fulfil.start(Order(id=f"o-{n}", boxes=3)) for n in range(count)]
    for n in range(count):
        town.shop.flows.emit("approval", f"o-{n}", n)
    assert [order.result(timeout=60)["approval"] for order in orders] == list(range(count))
    labels = {f"label {box}": count for box in range(3)}
    assert town.shop.effects.counts() == {"reserve": count, "charge": count, **labels}
    # A Celery step is a task of its own.
    served = Counter(each["pid"] for effect in ("charge", *labels) for each in town.shop.effects.read(effect))
    assert served.total() == 4 * count
    assert max(served.values()) <= 3
    assert sum(not is_alive(pid) for pid in served) > 4 * count // 3 - 2  # all but those that serve now
    assert worker.process.poll() is None


def test_processes_that_outgrow_their_memory_are_replaced_and_lose_nothing(
    make_town: MakeTown, redis_server: Broker
) -> None:
    town = make_town(redis_server.url)
    worker = town.worker("--max-memory-per-child", str(LIMIT_MEGABYTES << 10))
    small, large = [1] * 6, [LIMIT_MEGABYTES] * 4
    assert town.shop.swollen.start(small).result(timeout=60) == small
    within = {each["pid"] for each in town.shop.effects.read("swell 1")}
    assert all(is_alive(pid) for pid in within)  # the limit leaves room for ordinary work
    assert town.shop.swollen.start(large).result(timeout=60) == large
    outgrown = [each["pid"] for each in town.shop.effects.read(f"swell {LIMIT_MEGABYTES}")]
    assert len(outgrown) == len(set(outgrown)) == len(large)
    until(lambda: not any(is_alive(pid) for pid in outgrown), "each process that grew too large has ended")
    assert worker.process.poll() is None
