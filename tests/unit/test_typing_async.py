"""What type checkers make of async flows: mypy reads this file; what it says is run, too."""

from __future__ import annotations

from functools import partial
from typing import assert_type

from celery import Celery

from celery_flows import AsyncRun, Decision, First, FlowDefinition, Flows, Run, StepFailed

flows = Flows(Celery("typing", broker="memory://", set_as_current=False))


async def fetch(url: str, *, depth: int = 1) -> int:
    return len(url) * depth


def parse(page: int) -> str:
    return str(page)


@flows.flow("typing/async")
async def crawl(run: AsyncRun, url: str) -> list[int]:
    assert_type(await run.step(fetch, url, depth=2), int)
    assert_type(await run.step(parse, 3), str)
    assert_type(await run.options(name="other").step(fetch, url), int)
    assert_type(await run.gather([partial(fetch, url), partial(fetch, url)]), list[int])
    assert_type(await run.gather([partial(parse, 1)]), list[str])
    assert_type(await run.gather([partial(fetch, url)], return_exceptions=True), list[int | StepFailed])
    assert_type(await run.flow(count, url), int)
    assert_type(await run.first([count.s(url)]), First[int, int])
    assert_type(await run.first(one=count.s(url), other=count.s(url)), First[str, int])
    run.on_failure(fetch, url)
    await run.step(fetch, 3)  # type: ignore[call-overload]
    return [1]


@flows.flow("typing/async without input")
async def nothing(run: AsyncRun) -> str:
    return ""


@flows.flow("typing/plain")
def count(run: Run, url: str) -> int:
    assert_type(run.step(fetch, url, depth=2), int)
    assert_type(run.gather([partial(fetch, url)]), list[int])
    assert_type(run.gather([partial(parse, 1)]), list[str])
    assert_type(run.first([count.s(url)]), First[int, int])
    assert_type(run.first(one=count.s(url), other=count.s(url)), First[str, int])
    assert_type(run.first(one=count.s(url), boss=Decision("boss")).which, str)
    run.first([count.s(url)], one=count.s(url))  # type: ignore[call-overload]
    run.step(fetch, 3)  # type: ignore[call-overload]
    return 1


def test_the_result_of_an_async_flow_is_no_coroutine() -> None:
    assert_type(crawl, FlowDefinition[str, list[int]])
    assert_type(nothing, FlowDefinition[None, str])
    assert_type(count, FlowDefinition[str, int])
    assert crawl.output.decode("result", ["7"]) == [7]
