"""Async functions of one gather: they run at once, each is recorded as it ends, and nothing is told beside them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import sqlalchemy as sa

from celery_flows import AsyncRun, FlowCancelled, FlowFailed, FlowStatus, Retry, Run, StepFailed
from celery_flows.store.tables import flow_events
from celery_flows.tasks.testing.crash import Died, DyingStore
from tests.support.bench import Bench

MANY = 50


class Door:
    """Lets those who come through when enough are there."""

    def __init__(self, count: int) -> None:
        self._count, self.most = count, 0
        self._inside = 0
        self._full = asyncio.Event()

    async def pass_through(self) -> None:
        self._inside += 1
        self.most = max(self.most, self._inside)
        if self._inside >= self._count:
            self._full.set()
        await asyncio.wait_for(self._full.wait(), 10)
        self._inside -= 1


async def soon(value: int) -> int:
    await asyncio.sleep(0)
    return value


async def fails(text: str) -> int:
    await asyncio.sleep(0)
    raise LookupError(text)


async def forever() -> int:
    await asyncio.sleep(60)
    return 0


@pytest.mark.parametrize("kind", ["flow", "async flow"])
def test_async_members_are_all_inside_at_once(bench: Bench, kind: str) -> None:
    door = Door(MANY)

    async def enter(number: int) -> int:
        await door.pass_through()
        return number

    def members() -> list[Any]:
        return [partial(enter, number) for number in range(MANY)]

    @bench.flows.flow("plain")
    def plain(run: Run) -> list[int]:
        return run.gather(members())

    @bench.flows.flow("async")
    async def awaits(run: AsyncRun) -> list[int]:
        gathered: list[int] = await run.gather(members())
        return gathered

    assert bench.finish((plain if kind == "flow" else awaits).start()) == list(range(MANY))
    assert door.most == MANY


def test_no_more_run_than_may(bench: Bench) -> None:
    door = Door(3)

    async def enter(number: int) -> int:
        await door.pass_through()
        return number

    @bench.flows.flow("bounded")
    async def bounded(run: AsyncRun) -> list[int]:
        return await run.gather((partial(enter, number) for number in range(9)), limit=3)

    assert bench.finish(bounded.start()) == list(range(9))
    assert door.most == 3


def test_who_is_who_does_not_depend_on_who_is_first(bench: Bench) -> None:
    """Of the same name, and ending in the reverse order; a replay gives each its own result."""

    async def countdown(number: int) -> int:
        for _ in range(2 * (5 - number)):
            await asyncio.sleep(0)
        bench.effects.append(number)
        return number

    @bench.flows.flow("races")
    async def races(run: AsyncRun) -> list[int]:
        first = await run.gather(partial(countdown, number) for number in range(5))
        await run.sleep(timedelta(milliseconds=1))
        return first

    handle = races.start()
    assert bench.finish(handle) == [0, 1, 2, 3, 4]
    assert bench.effects == [4, 3, 2, 1, 0]
    steps = [step for step in bench.store.list_steps(handle.id) if step.task == "countdown"]
    assert {step.position: step.result_json for step in steps} == {n + 1: n for n in range(5)}


def test_plain_functions_come_first_then_async_ones_then_tasks(bench: Bench) -> None:
    @bench.task("remote")
    def remote() -> str:
        bench.effects.append("remote")
        return "remote"

    async def beside(text: str) -> str:
        bench.effects.append(text)
        return text

    def plain(text: str) -> str:
        bench.effects.append(text)
        return text

    @bench.flows.flow("mixed")
    async def mixed(run: AsyncRun) -> list[str]:
        return await run.gather([remote.s(), partial(beside, "b"), partial(plain, "c"), partial(beside, "d")])

    assert bench.finish(mixed.start()) == ["remote", "b", "c", "d"]
    assert bench.effects == ["c", "b", "d", "remote"]


def test_the_first_failure_in_order_is_raised_when_all_that_began_have_ended(bench: Bench) -> None:
    failed = asyncio.Event()

    async def fails_at_once() -> None:
        failed.set()
        raise LookupError("second")

    async def fails_later() -> None:
        await failed.wait()
        await asyncio.sleep(0.01)
        raise LookupError("first")

    async def begins_no_more() -> None:
        bench.effects.append("began")

    @bench.flows.flow("fails")
    async def flow(run: AsyncRun) -> str:
        try:
            await run.gather([fails_later, fails_at_once, begins_no_more], limit=2)
        except StepFailed as first:
            await run.sleep(timedelta(milliseconds=1))
            return first.message
        return ""

    handle = flow.start()
    assert bench.finish(handle) == "first"
    assert bench.effects == []
    assert {step.task for step in bench.store.list_steps(handle.id)} == {"fails_later", "fails_at_once", "sleep"}


def test_failures_are_collected(bench: Bench) -> None:
    @bench.flows.flow("collects")
    async def collects(run: AsyncRun) -> list[str]:
        members = [partial(soon, 1), partial(fails, "a"), partial(soon, 2), partial(fails, "b")]
        outcomes = await run.gather(members, return_exceptions=True, limit=2)
        await run.sleep(timedelta(milliseconds=1))
        return [each.message if isinstance(each, StepFailed) else str(each) for each in outcomes]

    assert bench.finish(collects.start()) == ["1", "a", "2", "b"]


def test_a_gather_of_async_functions_cleans_up_after_another_has_failed(bench: Bench) -> None:
    async def undo(text: str) -> None:
        bench.effects.append(text)

    @bench.flows.flow("fails")
    async def flow(run: AsyncRun) -> None:
        try:
            await run.gather([partial(fails, "a"), partial(soon, 1)])
        finally:
            await run.gather([partial(undo, "b"), partial(undo, "c")])

    with pytest.raises(FlowFailed, match="LookupError: a"):
        bench.finish(flow.start())
    assert sorted(bench.effects) == ["b", "c"]


# ---- trying again ---------------------------------------------------------------------------------------------------


def flaky(bench: Bench, name: str, failures: int = 1) -> Callable[[], Coroutine[Any, Any, str]]:
    async def tries() -> str:
        await asyncio.sleep(0)
        bench.effects.append(name)
        if bench.effects.count(name) <= failures:
            raise ConnectionError(name)
        return name

    tries.__name__ = name
    return tries


def test_a_member_is_tried_again_while_its_siblings_run(bench: Bench) -> None:
    again = asyncio.Event()

    async def waits_for_the_other() -> str:
        await asyncio.wait_for(again.wait(), 10)
        return "waited"

    async def tried_again() -> str:
        bench.effects.append("tried")
        if len(bench.effects) == 1:
            raise ConnectionError
        again.set()
        return "succeeded"

    retry = Retry(2, initial=timedelta(seconds=0.7), jitter=False)  # longer than a moment: alone it would park

    @bench.flows.flow("again")
    async def flow(run: AsyncRun) -> list[str]:
        return await run.options(retry=retry).gather([tried_again, waits_for_the_other])

    handle = flow.start()
    bench.drive(handle.id)
    assert handle.result(0) == ["succeeded", "waited"]
    assert bench.kinds(handle.id).count("started") == 1


def test_a_member_in_a_short_pause_stays_in_this_worker(bench: Bench) -> None:
    retry = Retry(3, initial=timedelta(milliseconds=5), jitter=False)

    @bench.flows.flow("again")
    async def flow(run: AsyncRun) -> list[str]:
        gathered: list[str] = await run.options(retry=retry).gather([flaky(bench, "a", 2), flaky(bench, "b")], limit=1)
        return gathered

    handle = flow.start()
    bench.drive(handle.id)
    assert handle.result(0) == ["a", "b"]


def test_the_flow_waits_for_long_pauses_without_a_worker_and_only_when_nobody_runs(bench: Bench) -> None:
    ended = asyncio.Event()

    async def takes_its_time() -> str:
        for _ in range(20):
            await asyncio.sleep(0)
        ended.set()
        return "slow"

    @bench.flows.flow("again")
    async def flow(run: AsyncRun) -> list[str]:
        retry = Retry(2, initial=timedelta(hours=1), jitter=False)
        members = [flaky(bench, "a"), takes_its_time, flaky(bench, "b")]
        gathered: list[str] = await run.options(retry=retry).gather(members)
        return gathered

    handle = flow.start()
    bench.drive(handle.id)
    assert ended.is_set()
    [row] = bench.rows(handle.id)
    assert (row.worker, handle.status()) == (None, FlowStatus.RUNNING)
    recorded = {step.task: step.status for step in bench.store.list_steps(handle.id)}
    assert recorded == {"a": "pending", "takes_its_time": "succeeded", "b": "pending"}
    assert bench.kinds(handle.id).count("step_retrying") == 2
    retries = bench.query(sa.select(flow_events.c.payload_json).where(flow_events.c.kind == "step_retrying"))
    earliest = min(each.payload_json["step"]["error_json"]["retry_at"] for each in retries)
    assert row.due_at.isoformat() == earliest


def test_a_failure_is_told_although_another_member_waits_to_be_tried_again(bench: Bench) -> None:
    patient = Retry(2, initial=timedelta(hours=1), jitter=False, unless=(LookupError,))

    @bench.flows.flow("fails")
    async def flow(run: AsyncRun) -> str:
        try:
            await run.options(retry=patient).gather([flaky(bench, "a"), partial(fails, "b")])
        except StepFailed as failed:
            return failed.message
        return ""

    handle = flow.start()
    bench.drive(handle.id)
    assert handle.result(0) == "b"


# ---- told, stopped, lost --------------------------------------------------------------------------------------------


def test_a_cancel_is_told_when_those_that_run_have_ended_and_no_other_begins(bench: Bench) -> None:
    async def cancels() -> str:
        bench.flows.handle(flow_ids[0]).cancel()
        return "asked"

    async def runs_on() -> str:
        for _ in range(20):
            await asyncio.sleep(0)
        bench.effects.append("ran on")
        return "ran on"

    async def begins_no_more() -> None:
        bench.effects.append("began")

    flow_ids: list[Any] = []

    @bench.flows.flow("told")
    async def told(run: AsyncRun) -> None:
        try:
            await run.gather([runs_on, cancels, begins_no_more], limit=2)
        except FlowCancelled:
            await run.step(bench.effects.append, "cleaned up")
            raise

    handle = told.start()
    flow_ids.append(handle.id)
    with pytest.raises(FlowCancelled):
        bench.finish(handle)
    assert bench.effects == ["ran on", "cleaned up"]
    assert {step.task for step in bench.store.list_steps(handle.id)} == {"cancels", "runs_on", "append"}


def test_a_worker_that_is_to_stop_lets_members_end_and_hands_the_others_on(bench: Bench) -> None:
    async def is_stopped(number: int) -> int:
        bench.effects.append(number)
        bench.runtime.stopping.set()
        await asyncio.sleep(0)
        return number

    @bench.flows.flow("stopped")
    async def stopped(run: AsyncRun) -> list[int]:
        return await run.gather((partial(is_stopped, number) for number in range(3)), limit=1)

    handle = stopped.start()
    bench.drive(handle.id)
    assert bench.effects == [0]
    [row] = bench.rows(handle.id)
    assert (row.worker, row.crash_count) == (None, 0)
    assert [step.result_json for step in bench.store.list_steps(handle.id)] == [0]


def test_who_lost_its_lease_ends_all_members_and_records_none(make_bench: Callable[..., Bench]) -> None:
    ours, other = make_bench(), make_bench()

    async def is_overtaken() -> str:
        assert ours.end_leases()
        other.flows.flow("overtaken")(overtaken_elsewhere)
        await asyncio.to_thread(other.drive, handle.id)
        return "too late"

    async def goes_on() -> None:
        try:
            await forever()
        finally:
            ours.effects.append("ended")

    async def overtaken_elsewhere(run: AsyncRun) -> str:
        return "by another"

    @ours.flows.flow("overtaken")
    async def overtaken(run: AsyncRun) -> str:
        await run.gather([goes_on, is_overtaken])
        return "by us"

    handle = overtaken.start()
    ours.drive(handle.id)
    assert handle.result(0) == "by another"
    assert ours.effects == ["ended"]
    assert ours.store.list_steps(handle.id) == []


def test_a_member_that_does_not_heed_its_end_records_nothing(bench: Bench) -> None:
    async def is_deaf() -> str:
        try:
            await forever()
        except asyncio.CancelledError:
            bench.effects.append("deaf")
        return "went on"

    async def leaves() -> None:
        await asyncio.sleep(0)
        raise SystemExit(3)

    @bench.flows.flow("leaves")
    async def flow(run: AsyncRun) -> None:
        await run.gather([is_deaf, leaves])

    handle = flow.start()
    with pytest.raises(SystemExit):
        bench.drive(handle.id)
    assert bench.effects == ["deaf"]
    assert bench.store.list_steps(handle.id) == []


def test_what_was_recorded_before_a_crash_does_not_run_again(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench()
    store = DyingStore(bench.store.engine)
    bench.runtime._store = store

    async def dies() -> str:
        bench.effects.append("dies")
        for _ in range(5):
            await asyncio.sleep(0)
        if bench.effects.count("dies") == 1:
            store.die()
        return "survived"

    async def note() -> str:
        await asyncio.sleep(0)
        bench.effects.append("noted")
        return "noted"

    @bench.flows.flow("dies")
    async def flow(run: AsyncRun) -> list[str]:
        return await run.gather([dies, note])

    handle = flow.start()
    with pytest.raises(Died):
        bench.drive(handle.id)
    store.dead = False
    [recorded] = bench.store.list_steps(handle.id)
    assert recorded.task == "note"
    bench.recover()
    assert handle.result(0) == ["survived", "noted"]
    assert bench.effects.count("dies") == 2
    assert bench.effects.count("noted") == 1
