"""A limit holds for all workers together, also while one of them is killed."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator

import pytest
import sqlalchemy as sa

from celery_flows.store.clock import boottime
from celery_flows.store.tables import flow_dispatch, flow_limits
from tests.acceptance.conftest import Town
from tests.support.shop import AT_ONCE
from tests.support.waiting import until
from tests.support.workers import Worker

FLOWS = 10


def stays(town: Town, died: dict[int, float]) -> Iterator[tuple[float, float]]:
    """From when to when each step was at work; one that was killed, until its process was."""
    began: dict[tuple[str, int], float] = {}
    for line in town.shop.effects.read():
        _, number, what = line["effect"].split()
        if what == "began":
            began[number, line["pid"]] = line["at"]
        else:
            yield began.pop((number, line["pid"])), line["at"]
    yield from ((at, died[pid]) for (_, pid), at in began.items() if pid in died)


def most_at_once(intervals: list[tuple[float, float]]) -> int:
    return max(sum(begin <= at < end for begin, end in intervals) for at, _ in intervals)


def at_work(town: Town, pids: Collection[int]) -> bool:
    """Whether one of these processes is in a step, or was when it died."""
    last = {line["pid"]: line["effect"] for line in town.shop.effects.read()}
    return any(pid in pids and effect.endswith("began") for pid, effect in last.items())


def kill_at_work(town: Town, worker: Worker) -> dict[int, float]:
    """kill -9 while it holds a slot; gives when each of its processes was dead."""
    until(lambda: at_work(town, worker.children()), "it is at work", within_seconds=30)
    pids = worker.kill()
    return dict.fromkeys(pids, boottime())


@pytest.mark.timeout(180)
def test_a_worker_killed_with_a_slot_leaks_none_and_the_limit_holds(town: Town) -> None:
    victim, _other = town.worker(), town.worker()
    handles = [town.shop.limited.start(number) for number in range(1, FLOWS + 1)]
    until(lambda: len(town.shop.effects.read()) >= 5, "some have been at work", within_seconds=30)
    died: dict[int, float] = {}
    for _ in range(20):  # until a step was really cut off
        died |= kill_at_work(town, victim)
        if at_work(town, died):
            break
        victim = town.worker()
    assert at_work(town, died), "this proves nothing"
    ended = time.monotonic() + 90
    assert [handle.result(max(1.0, ended - time.monotonic())) for handle in handles] == [
        -number for number in range(1, FLOWS + 1)
    ]
    intervals = list(stays(town, died))
    assert len(intervals) > 2 * FLOWS, "the step that was cut off ran again"
    assert most_at_once(intervals) == AT_ONCE
    with town.shop.flows.store.engine.connect() as connection:
        assert connection.scalar(sa.select(sa.func.count()).where(flow_dispatch.c.has_slot)) == 0
    until(lambda: _out_of_use(town), "nothing of the limit is left")


def _out_of_use(town: Town) -> bool:
    with town.shop.flows.store.engine.connect() as connection:
        return connection.scalar(sa.select(sa.func.count()).select_from(flow_limits)) == 0
