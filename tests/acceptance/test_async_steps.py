"""Async steps in real workers: side by side in one process, under each kind of pool, and through its death."""

from __future__ import annotations

import os
import signal

import pytest

from tests.acceptance.conftest import Town
from tests.support.waiting import until
from tests.support.workers import is_alive

LABELS = ["quick", "a", "b", "c", "d"]
HELD = LABELS[1:]


def all_began(town: Town) -> int:
    """Waits until all members are at work, and the quick one is recorded; gives the process that they are in."""

    def began() -> bool:
        counts = town.shop.effects.counts()
        [flow] = town.shop.flows.store.list_by_owner("default", None)
        steps = town.shop.flows.store.list_steps(flow.id)
        return all(counts[f"{label} began"] for label in LABELS) and len(steps) == 2

    until(began, "all members have begun", within_seconds=30)
    pids = {effect["pid"] for label in LABELS for effect in town.shop.effects.read(f"{label} began")}
    assert len(pids) == 1
    return int(pids.pop())


def test_a_killed_process_has_its_async_steps_done_again_and_the_recorded_one_not(town: Town) -> None:
    worker = town.worker("-c", "2")
    handle = town.shop.beside.start(LABELS)
    pid = all_began(town)
    assert pid in worker.children()
    os.kill(pid, signal.SIGKILL)
    until(lambda: not is_alive(pid), "the child is dead")
    town.shop.open_gate()
    assert handle.result(timeout=40) == LABELS
    counts = town.shop.effects.counts()
    assert (counts["before"], counts["after"]) == (1, 1)
    assert (counts["quick began"], counts["quick ended"]) == (1, 1)
    assert {label: (counts[f"{label} began"], counts[f"{label} ended"]) for label in HELD} == dict.fromkeys(
        HELD, (2, 1)
    )
    assert all(effect["pid"] != pid for label in HELD for effect in town.shop.effects.read(f"{label} ended"))


@pytest.mark.parametrize("pool", ["solo", "threads"])
def test_async_steps_are_side_by_side_in_one_process_for_all(town: Town, pool: str) -> None:
    town.worker("-P", pool)
    handle = town.shop.beside.start(LABELS)
    all_began(town)
    town.shop.open_gate()
    assert handle.result(timeout=40) == LABELS
    assert set(town.shop.effects.counts().values()) == {1}


def test_a_worker_that_is_told_to_stop_lets_async_steps_end(town: Town) -> None:
    worker = town.worker("-c", "1")
    handle = town.shop.beside.start(LABELS)
    all_began(town)
    worker.process.send_signal(signal.SIGTERM)
    until(lambda: "Warm shutdown" in worker.output, "the worker has heard", within_seconds=20)
    town.shop.open_gate()
    assert worker.process.wait(30) == 0
    town.worker("-c", "1")
    assert handle.result(timeout=40) == LABELS
    assert set(town.shop.effects.counts().values()) == {1}
