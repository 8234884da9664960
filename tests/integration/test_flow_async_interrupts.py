"""A cancel that reaches async bodies: their tasks are cancelled, each where it awaits, and the flow is told."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import pytest

from celery_flows import AsyncRun, FlowCancelled, FlowHandle, Run
from celery_flows.store import FlowStepStatus
from celery_flows.tasks.interrupts import SIGNAL
from tests.support.bench import Bench

FOREVER = 60.0


@pytest.fixture(autouse=True)
def listening(bench: Bench) -> Iterator[None]:
    """This process can be interrupted, as one of a worker's pool can."""
    before = signal.getsignal(SIGNAL)
    bench.runtime.interrupts.share()
    bench.runtime.interrupts.listen()
    yield
    assert bench.runtime.interrupts.running(os.getpid()) is None
    signal.signal(SIGNAL, before)


class Bodies:
    """Async functions that cancel their flow, have their process struck, and are not done for long."""

    def __init__(self, bench: Bench, *, cancels: bool = True, swallows: bool = False) -> None:
        self._bench, self._cancels, self._swallows = bench, cancels, swallows
        self.began: list[str] = []
        self.ended: list[str] = []

    async def body(self, flow_id: str, name: str, of: int = 1) -> str:
        self.began.append(name)
        try:
            if len(self.began) == of:
                if self._cancels:
                    self._bench.flows.handle(flow_id).cancel()
                assert self._bench.runtime.interrupts.running(os.getpid()) is not None
                os.kill(os.getpid(), SIGNAL)
            if len(self.began) <= of:
                if self._swallows:
                    with suppress(asyncio.CancelledError):
                        await asyncio.sleep(FOREVER)
                    return name
                await asyncio.sleep(FOREVER)
        finally:
            self.ended.append(name)
        return name


def is_cancelled(handle: FlowHandle[Any]) -> None:
    with pytest.raises(FlowCancelled):
        handle.result(0)


@pytest.mark.parametrize("is_async", [True, False])
def test_an_async_step_is_interrupted_and_its_flow_told(bench: Bench, is_async: bool) -> None:
    bodies = Bodies(bench)

    @bench.flows.flow("plain")
    def plain(run: Run) -> None:
        try:
            run.step(bodies.body, str(run.flow_id), "a")
        except FlowCancelled:
            run.step(bodies.body, str(run.flow_id), "cleanup", 0)
            raise

    @bench.flows.flow("async")
    async def coroutine(run: AsyncRun) -> None:
        try:
            await run.step(bodies.body, str(run.flow_id), "a")
        except FlowCancelled:
            await run.step(bodies.body, str(run.flow_id), "cleanup", 0)
            raise

    handle = (coroutine if is_async else plain).start()
    bench.work()
    is_cancelled(handle)
    assert bodies.ended == bodies.began == ["a", "cleanup"]


@pytest.mark.parametrize("is_async", [True, False])
def test_all_members_beside_each_other_are_interrupted(bench: Bench, is_async: bool) -> None:
    bodies = Bodies(bench)

    def members(flow_id: Any) -> list[Any]:
        return [partial(bodies.body, str(flow_id), name, 3) for name in "abc"]

    @bench.flows.flow("plain")
    def plain(run: Run) -> list[str]:
        return run.gather(members(run.flow_id))

    @bench.flows.flow("async")
    async def coroutine(run: AsyncRun) -> list[str]:
        return [str(name) for name in await run.gather(members(run.flow_id))]

    handle = (coroutine if is_async else plain).start()
    bench.work()
    is_cancelled(handle)
    assert sorted(bodies.ended) == ["a", "b", "c"]


def test_an_async_celery_step_is_interrupted(bench: Bench) -> None:
    bodies = Bodies(bench)

    @bench.task("member")
    async def member(flow_id: str) -> str:
        return await bodies.body(flow_id, "member")

    @bench.flows.flow("flow")
    def flow(run: Run) -> Any:
        return run.step(member, str(run.flow_id))

    handle = flow.start()
    bench.work()
    is_cancelled(handle)
    [step] = bench.store.list_steps(handle.id)
    assert (bodies.ended, step.status) == (["member"], FlowStepStatus.CANCELLED)


@pytest.mark.parametrize(("swallows", "ended"), [(False, ["a", "a", "b"]), (True, ["a", "b"])])
def test_an_interrupt_by_mistake_costs_an_attempt_at_most(bench: Bench, swallows: bool, ended: list[str]) -> None:
    """It is made again; a result in spite of the interrupt is recorded, for its effect is there. What follows is not
    taken for cancelled."""
    bodies = Bodies(bench, cancels=False, swallows=swallows)

    @bench.flows.flow("flow")
    async def flow(run: AsyncRun) -> str:
        first = await run.step(bodies.body, str(run.flow_id), "a")
        return first + await run.step(bodies.body, str(run.flow_id), "b")

    handle = flow.start()
    bench.work()
    assert handle.result(0) == "ab"
    assert bodies.ended == ended
