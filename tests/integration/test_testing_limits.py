"""The test kit and limited flows: queues move by the test's clock, and a stuck one says so."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

import pytest
from celery import Celery

from celery_flows import FlowDefinition, Flows, Limit, Run
from celery_flows.testing import FlowApp, Stuck, open_flow_app, run_inline

MINUTE = timedelta(minutes=1)
_numbers = itertools.count(1)

Limited = Callable[[Limit], tuple[FlowApp, FlowDefinition[str, str]]]


@pytest.fixture
def limited(engine_database: str) -> Iterator[Limited]:
    """Makes an application with a limited flow, under test over each database."""
    with ExitStack() as opened:

        def make(limit: Limit) -> tuple[FlowApp, FlowDefinition[str, str]]:
            app = Celery(f"limited-{next(_numbers)}", set_as_current=False)
            flows = Flows(app)

            @app.task(name="charge", shared=False)
            def charge(order: str) -> str:
                return f"paid {order}"

            @flows.flow("fulfil", limit=limit)
            def fulfil(run: Run, order: str) -> str:
                run.sleep(MINUTE)
                return str(run.step(charge, order))

            return opened.enter_context(open_flow_app(app, engine_database)), fulfil

        yield make


def test_all_who_queue_end(limited: Limited) -> None:
    flow_app, fulfil = limited(Limit(1))
    handles = [fulfil.start(str(n)) for n in range(4)]
    assert [handle.result() for handle in handles] == [f"paid {n}" for n in range(4)]
    assert flow_app.ran == ["charge"] * 4


def test_a_crash_with_a_slot_is_gone_on_from(limited: Limited) -> None:
    flow_app, fulfil = limited(Limit(1))
    flow_app.crash.at("charge")
    handles = [fulfil.start(str(n)) for n in range(3)]
    assert [handle.result() for handle in handles] == [f"paid {n}" for n in range(3)]


def test_a_lost_message_of_the_next_one_holds_nobody_up_for_good(limited: Limited) -> None:
    flow_app, fulfil = limited(Limit(1))
    flow_app.messages.drop("fulfil", times=3)
    handles = [fulfil.start(str(n)) for n in range(3)]
    assert [handle.result() for handle in handles] == [f"paid {n}" for n in range(3)]


def test_a_rate_goes_by_the_tests_clock(limited: Limited) -> None:
    flow_app, fulfil = limited(Limit(2, every=timedelta(hours=1)))
    began = flow_app.clock.now()
    handles = [fulfil.start(str(n)) for n in range(4)]
    assert handles[3].result() == "paid 3"
    assert flow_app.clock.now() - began >= timedelta(hours=1)
    assert flow_app.clock.now() - began < timedelta(hours=1, minutes=5)


def test_who_queues_is_told_of_by_who_is_stuck(limited: Limited) -> None:
    _, fulfil = limited(Limit(1, per=str))
    first, second = fulfil.start("same"), fulfil.start("same")
    first.pause()
    second.pause()
    with pytest.raises(Stuck, match="is paused"):
        first.result()
    first.unpause()
    second.unpause()
    assert [first.result(), second.result()] == ["paid same"] * 2


def test_inline_there_is_no_limit(limited: Limited) -> None:
    def charge(order: str) -> Any:
        return f"paid {order}"

    _, fulfil = limited(Limit(1))
    assert run_inline(fulfil, "x", steps={"charge": charge}) == "paid x"
