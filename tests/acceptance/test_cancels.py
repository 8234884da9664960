"""A cancel reaches what runs: steps that would sleep for minutes are left at once, with real workers and brokers; and
nothing else is ever struck."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import sqlalchemy as sa

from celery_flows import FlowCancelled, FlowFailed, FlowHandle, FlowStatus
from celery_flows.store import FlowStepStatus
from celery_flows.store.clock import boottime
from tests.acceptance.conftest import MakeTown, Town
from tests.support.brokers import Broker
from tests.support.waiting import until
from tests.support.workers import is_alive

REACHED_SECONDS = 8.0  # at the most from the cancel to the end, on a busy machine; about 2 s are usual
HEED_SECONDS = 10.0


def asleep(town: Town, kind: str, sleepers: int = 1) -> FlowHandle[None]:
    """A flow in the midst of so many steps that would last for minutes; its cleanup does not wait at the gate."""
    town.shop.open_gate()
    handle = town.shop.asleep.start(kind)
    until(lambda: town.shop.effects.counts()[f"{kind} dozes"] == sleepers, "it sleeps", within_seconds=20)
    return handle


def cancelled(handle: FlowHandle[None], within_seconds: float = REACHED_SECONDS) -> float:
    """Cancels it; gives the seconds until it has ended."""
    asked_at = boottime()
    handle.cancel()
    with pytest.raises(FlowCancelled):
        handle.result(timeout=within_seconds)
    seconds = boottime() - asked_at
    print(f"cancelled after {seconds:.2f} s")  # noqa: T201  # shown by pytest -s
    return seconds


def dozing(town: Town, kind: str) -> list[int]:
    """The processes that have slept."""
    return [effect["pid"] for effect in town.shop.effects.read(f"{kind} dozes")]


def steps(town: Town, handle: FlowHandle[Any]) -> dict[str, FlowStepStatus]:
    return {step.task: step.status for step in town.shop.flows.store.list_steps(handle.id)}


def assert_told_once_and_cleaned_up(town: Town, kind: str, told: str = "FlowCancelled") -> None:
    counts = town.shop.effects.counts()
    assert counts[f"{kind}: {told}"] == 1
    assert counts[f"{kind} cleanup ended"] == counts[f"{kind} cleanup elsewhere ended"] == 1


def crashes(town: Town, handle: FlowHandle[Any]) -> list[str]:
    events = town.shop.flows.store.list_events(handle.id, None)
    return [event.kind for event in events if event.kind in ("reclaimed", "step_retrying", "step_failed")]


@pytest.mark.parametrize(
    ("kind", "sleepers"), [("inline", 1), ("celery", 1), ("transaction", 1), ("gather", 2), ("gather inline", 1)]
)
def test_a_cancel_reaches_a_running_step(town: Town, kind: str, sleepers: int) -> None:
    town.worker("-c", "2")
    handle = asleep(town, kind, sleepers)
    cancelled(handle)
    assert_told_once_and_cleaned_up(town, kind)
    assert town.shop.effects.counts()[f"{kind} is woken"] == sleepers
    assert town.shop.effects.counts()[f"{kind} dozes"] == sleepers
    assert crashes(town, handle) == []
    assert all(is_alive(pid) for pid in dozing(town, kind))
    known = steps(town, handle)
    if kind in ("celery", "gather"):
        assert known["shop.doze"] is FlowStepStatus.CANCELLED
    else:
        assert "doze" not in known
        assert "doze_in" not in known
    with town.shop.flows.store.engine.connect() as connection:
        assert not sa.inspect(connection).has_table("dozed")


def test_a_cancel_reaches_a_step_that_waits_for_the_database(make_town: MakeTown, redis_server: Broker) -> None:
    town = make_town(redis_server.url)
    town.worker("-c", "1")
    cancelled(asleep(town, "database"))
    assert_told_once_and_cleaned_up(town, "database")


def test_a_cancel_of_a_parent_reaches_its_childs_running_step(make_town: MakeTown, redis_server: Broker) -> None:
    town = make_town(redis_server.url)
    town.worker("-c", "2")
    town.shop.open_gate()
    handle = town.shop.asleep.start("child")
    until(lambda: town.shop.effects.read("celery dozes"), "the child sleeps", within_seconds=20)
    cancelled(handle)
    for kind in ("celery", "child"):
        assert_told_once_and_cleaned_up(town, kind)


@pytest.mark.parametrize("kind", ["log inline", "log elsewhere"])
def test_a_step_that_does_not_heed_a_cancel_is_ended_with_its_process(town: Town, kind: str) -> None:
    worker = town.worker("-c", "2")
    handle = asleep(town, kind)
    [pid] = dozing(town, kind)
    seconds = cancelled(handle, HEED_SECONDS + REACHED_SECONDS)
    assert seconds > HEED_SECONDS
    assert not is_alive(pid)
    assert f"process {pid} is ended" in worker.output
    assert_told_once_and_cleaned_up(town, kind)
    assert crashes(town, handle) == []
    if kind == "log elsewhere":
        assert steps(town, handle)["shop.sleep_like_a_log"] is FlowStepStatus.CANCELLED
    again = town.shop.asleep.start("nothing")  # a new process has taken the place of the one that was ended
    again.result(timeout=20)


@pytest.mark.parametrize("kind", ["inline", "celery"])
def test_a_deadline_reaches_a_running_step(make_town: MakeTown, redis_server: Broker, kind: str) -> None:
    town = make_town(redis_server.url)
    town.worker("-c", "2")
    town.shop.open_gate()
    handle = town.shop.asleep_for_a_while.start(kind)
    began = boottime()
    with pytest.raises(FlowFailed) as failed:
        handle.result(timeout=20)
    assert failed.value.type == "FlowTimedOut"
    assert 2.5 < boottime() - began < 3 + REACHED_SECONDS
    assert_told_once_and_cleaned_up(town, kind, "FlowTimedOut")
    assert town.shop.effects.counts()[f"{kind} is woken"] == 1


# ---- what is never struck -------------------------------------------------------------------------------------------


def test_a_plain_task_beside_a_cancelled_flow_runs_to_its_end(make_town: MakeTown, redis_server: Broker) -> None:
    """It runs while one flow is interrupted and the process of another ended, and in a process that was interrupted."""
    town = make_town(redis_server.url)
    town.worker("-c", "3")
    handles = [town.shop.asleep.start(kind) for kind in ("inline", "log inline")]
    effects = town.shop.effects
    until(lambda: effects.read("inline dozes") and effects.read("log inline dozes"), "both sleep", within_seconds=20)
    town.shop.app.send_task("shop.hold", ("plain",), ignore_result=True)
    until(lambda: effects.read("plain began"), "the plain task runs", within_seconds=20)
    [ended] = dozing(town, "log inline")
    for handle in handles:
        handle.cancel()
    until(lambda: not is_alive(ended), "the process that did not heed it is ended", within_seconds=20)
    assert not effects.read("plain ended")
    town.shop.open_gate()
    for handle in handles:
        with pytest.raises(FlowCancelled):
            handle.result(timeout=20)
    until(lambda: effects.read("plain ended"), "the plain task ends")
    assert [effect["pid"] for effect in effects.read("plain began")] == [
        effect["pid"] for effect in effects.read("plain ended")
    ]
    assert effects.counts()["plain began"] == 1


def test_a_process_that_was_interrupted_serves_on_and_what_it_does_then_is_left_in_peace(
    make_town: MakeTown, redis_server: Broker
) -> None:
    """One process: the cleanup of the cancelled flow runs in it for longer than an unheeded interrupt would be borne,
    and then a plain task does."""
    town = make_town(redis_server.url)
    town.worker("-c", "1")
    effects = town.shop.effects
    handle = town.shop.asleep.start("inline")
    until(lambda: effects.read("inline dozes"), "it sleeps", within_seconds=20)
    handle.cancel()
    town.shop.app.send_task("shop.hold", ("plain",), ignore_result=True)
    [cleanup] = until(lambda: effects.read("inline cleanup began"), "it cleans up", within_seconds=20)
    until(lambda: boottime() > cleanup["at"] + HEED_SECONDS + 3, "an interrupt would be past", within_seconds=20)
    town.shop.open_gate()
    with pytest.raises(FlowCancelled):
        handle.result(timeout=20)
    until(lambda: effects.read("plain ended"), "the plain task ends", within_seconds=20)
    assert {effect["pid"] for effect in effects.read()} == set(dozing(town, "inline"))
    counts = effects.counts()
    assert counts["plain began"] == counts["inline cleanup began"] == counts["inline cleanup elsewhere began"] == 1


@pytest.mark.parametrize("kind", ["inline", "celery"])
def test_a_process_killed_between_cancel_and_interrupt_loses_nothing(town: Town, kind: str) -> None:
    town.worker("-c", "2")
    handle = asleep(town, kind)
    [pid] = dozing(town, kind)
    os.kill(pid, signal.SIGSTOP)  # so that it cannot be interrupted before it dies
    handle.cancel()
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(FlowCancelled):
        handle.result(timeout=20)
    assert not is_alive(pid)
    assert not town.shop.effects.read(f"{kind} is woken")
    assert town.shop.effects.counts()[f"{kind} dozes"] == 1
    assert_told_once_and_cleaned_up(town, kind)


# ---- the other pools ------------------------------------------------------------------------------------------------


def test_solo_is_interrupted_like_a_process(make_town: MakeTown, redis_server: Broker) -> None:
    town = make_town(redis_server.url)
    worker = town.worker("-P", "solo")
    cancelled(asleep(town, "inline"))
    assert_told_once_and_cleaned_up(town, "inline")
    assert worker.process.poll() is None


def test_under_threads_a_cancel_waits_for_the_steps_end(make_town: MakeTown, redis_server: Broker) -> None:
    town = make_town(redis_server.url)
    town.worker("-P", "threads")
    handle = town.shop.held_inline.start("thread")
    until(lambda: town.shop.effects.read("thread began"), "it runs", within_seconds=20)
    asked_at = boottime()
    handle.cancel()
    until(lambda: boottime() > asked_at + 4, "processes would have been interrupted")
    assert handle.status() is FlowStatus.RUNNING
    town.shop.open_gate()
    with pytest.raises(FlowCancelled):
        handle.result(timeout=10)
    assert town.shop.effects.counts()["thread ended"] == 1
