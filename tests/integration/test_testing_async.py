"""The test kit with async flows: crashes in their steps, the clock, and the logic alone."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from celery_flows import AsyncRun, Flows, Retry, Run, StepTimedOut
from celery_flows.testing import FlowApp, open_flow_app, run_inline

_numbers = itertools.count(1)


class Shop:
    """An application with async flows."""

    def __init__(self) -> None:
        self.app = Celery(f"async shop {next(_numbers)}", broker="memory://", set_as_current=False)
        self.flows = Flows(self.app)
        self.failures = 0

        async def fetch(number: int) -> int:
            await asyncio.sleep(0)
            if number == 1 and self.failures:
                self.failures -= 1
                raise ConnectionError
            return number

        async def note(text: str) -> str:
            await asyncio.sleep(0)
            return text

        @self.app.task(name="ship", shared=False)
        async def ship(number: int) -> str:
            return f"shipped {await fetch(number)}"

        self.task: Any = ship

        @self.flows.flow("child")
        async def child(run: AsyncRun, number: int) -> int:
            return await run.step(fetch, number)

        @self.flows.flow("fulfil")
        async def fulfil(run: AsyncRun) -> list[Any]:
            retry = Retry(2, initial=timedelta(hours=1), maximum=timedelta(hours=1), jitter=False)
            fetched = await run.options(retry=retry).gather(partial(fetch, number) for number in range(3))
            await run.sleep(timedelta(days=30))
            return [*fetched, await run.step(note, "done"), await run.step(self.task, 4), await run.flow(child, 5)]

        @self.flows.flow("plain")
        def plain(run: Run) -> int:
            return run.step(fetch, 7) + run.flow(child, 1)

        self.fulfil, self.plain = fulfil, plain


DONE = [0, 1, 2, "done", "shipped 4", 5]


@pytest.fixture
def shop() -> Shop:
    return Shop()


@pytest.fixture
def flow_app(shop: Shop, tmp_path: Path) -> Iterator[FlowApp]:
    with open_flow_app(shop.app, f"sqlite:///{tmp_path}/flows.sqlite") as opened:
        yield opened
        opened.check_struck()


def test_a_month_and_an_hour_pass_at_once(shop: Shop, flow_app: FlowApp) -> None:
    shop.failures = 1
    began = flow_app.clock.now()
    assert shop.fulfil.start().result() == DONE
    assert flow_app.clock.now() - began > timedelta(days=30, hours=1)
    assert flow_app.ran.count("fetch") == 5


@pytest.mark.parametrize(("when", "times"), [("before", 4), ("during", 7), ("after", 6)])
def test_crashes_strike_members_of_a_gather(shop: Shop, flow_app: FlowApp, when: Any, times: int) -> None:
    flow_app.crash.at("fetch", when=when)
    assert shop.fulfil.start().result() == DONE
    assert flow_app.ran.count("fetch") == times
    assert flow_app.ran.count("note") == 1


def test_a_member_that_kills_each_worker_is_given_up(shop: Shop, flow_app: FlowApp) -> None:
    flow_app.crash.at("note", times=2)
    assert shop.fulfil.start().result() == DONE
    assert flow_app.ran.count("note") == 3


def test_an_async_step_may_take_long_by_the_tests_clock(shop: Shop, flow_app: FlowApp) -> None:
    async def slow() -> None:
        flow_app.clock.advance(seconds=5)

    @shop.flows.flow("slow")
    async def flow(run: AsyncRun) -> str:
        try:
            await run.options(timeout=timedelta(seconds=1)).step(slow)
        except StepTimedOut as late:
            return late.message
        return ""

    assert flow.start().result() == "took longer than 1 s"


def test_the_logic_alone(shop: Shop) -> None:
    async def ship(number: int) -> str:
        await asyncio.sleep(0)
        return f"stood in for {number}"

    assert run_inline(shop.fulfil) == DONE
    assert run_inline(shop.plain) == 8
    assert run_inline(shop.fulfil, steps={"ship": ship, "child": abs}) == [*DONE[:4], "stood in for 4", 5]
    shop.failures = 1
    assert run_inline(shop.fulfil) == DONE


def test_an_async_test_asks_in_a_thread(shop: Shop, flow_app: FlowApp) -> None:
    async def story() -> Any:
        return await asyncio.to_thread(shop.fulfil.start().result)

    assert asyncio.run(story()) == DONE
