"""Who parks a flow that was called since his claim goes on with it: it must not lie there until a sweep comes."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest

from celery_flows import Retry, Run
from celery_flows.store import operations as op
from tests.integration.conftest import MakeBench
from tests.support.bench import Bench

HOUR = timedelta(hours=1)


def gathers(bench: Bench, run: Run, call: Callable[[], None]) -> None:
    call()
    run.gather([bench.app.tasks["square"].s(n) for n in (1, 2)])


def retries(bench: Bench, run: Run, call: Callable[[], None]) -> None:
    def fails() -> None:
        call()
        raise RuntimeError("not yet")

    run.options(retry=Retry(2, initial=HOUR)).step(fails)


def sleeps(bench: Bench, run: Run, call: Callable[[], None]) -> None:
    call()
    run.sleep(HOUR)


def squares(bench: Bench) -> Any:
    @bench.task("square")
    def square(n: int) -> int:
        return n * n

    return square


@pytest.mark.parametrize("parks", [gathers, retries, sleeps])
def test_a_call_while_the_driver_parks_is_not_left_to_the_sweep(bench: Bench, parks: Any) -> None:
    squares(bench)
    calls: list[UUID] = []

    @bench.flows.flow("parks")
    def flow(run: Run) -> None:
        def call() -> None:
            if not calls:
                calls.append(run.flow_id)
                bench.flows.manager.unpause(run.flow_id)

        parks(bench, run, call)

    handle = flow.start()
    bench.drive(handle.id)
    assert calls == [handle.id]
    assert ("drive", str(handle.id)) not in bench.claimable()
    kinds = bench.kinds(handle.id)
    assert (kinds.count("started"), kinds.count("resumed")) == (1, 1)


def test_a_member_that_ends_while_the_next_are_scheduled_does_not_wait_for_the_sweep(bench: Bench) -> None:
    square = squares(bench)
    ends_meanwhile: list[str] = []

    @bench.flows.flow("window")
    def window(run: Run) -> int:
        while ends_meanwhile:
            bench.run_step(ends_meanwhile.pop(), goes_on=False)
        return sum(run.gather([square.s(n) for n in range(4)], limit=2))

    handle = window.start()
    bench.drive(handle.id)
    first, second = [run_id for kind, run_id in bench.claimable() if kind == "step"]
    bench.run_step(first, goes_on=False)
    ends_meanwhile.append(second)
    bench.drive(handle.id)
    assert ("drive", str(handle.id)) not in bench.claimable()
    assert len([kind for kind, _ in bench.claimable()]) == 2  # the other two are out
    assert bench.finish(handle) == 14


def test_a_call_is_not_lost_with_the_reply_to_the_write_that_parks(make_bench: MakeBench) -> None:
    bench = make_bench()
    square = squares(bench)
    calls: list[UUID] = []

    @bench.flows.flow("gathers")
    def flow(run: Run) -> None:
        if not calls:
            calls.append(run.flow_id)
            bench.flows.manager.unpause(run.flow_id)
        run.gather([square.s(n) for n in (1, 2)])

    handle = flow.start()
    found: list[op.Written | None] = []
    perform = bench.store._perform

    def loses_the_reply(step: Any) -> Any:
        answer = perform(step)
        is_parked = getattr(step, "operation", None) is op.change_flow and step.args[0].members
        if is_parked and not found:
            found.append(bench.store.run(op.find_change, step.args[0]))
        return answer

    bench.store._perform = loses_the_reply  # type: ignore[method-assign]
    bench.drive(handle.id)
    assert found[0] is not None
    assert found[0].is_due
