"""A job is begun once, looked at until it ends, and stopped if it does not."""

from __future__ import annotations

from datetime import timedelta

import pytest

from celery_flows import FlowFailed
from celery_flows.testing import FlowApp, FlowClock, FlowCrash, When
from tests.scenarios.outside import Outside
from tests.scenarios.polling import export

LOOK = "look at begin sales"


def test_a_job_is_looked_at_each_minute(flow_app: FlowApp, flow_clock: FlowClock, world: Outside) -> None:
    world.answer("look", "running", "running", "ready")
    began = flow_clock.now()
    assert export.start("sales").result() == "fetch begin sales"
    assert world.asked == ["begin sales", LOOK, LOOK, LOOK, "fetch begin sales"]
    assert timedelta(minutes=2) <= flow_clock.now() - began < timedelta(minutes=2, seconds=1)


def test_a_look_that_fails_is_no_failure_of_the_job(flow_app: FlowApp, world: Outside) -> None:
    world.answer("look", "running", "ready")
    world.refuse("look", times=3)
    assert export.start("sales").result() == "fetch begin sales"
    assert world.asked.count(LOOK) == 5


def test_a_job_that_breaks_fails_the_flow(flow_app: FlowApp, world: Outside) -> None:
    world.answer("look", "running", "broken")
    with pytest.raises(FlowFailed, match="begin sales is broken") as failed:
        export.start("sales").result()
    assert failed.value.type == "ExportBroken"
    assert world.done[-1] == "abort begin sales"


def test_a_job_without_an_end_is_stopped(flow_app: FlowApp, flow_clock: FlowClock, world: Outside) -> None:
    world.answer("look", "running")
    began = flow_clock.now()
    with pytest.raises(FlowFailed) as failed:
        export.start("sales").result()
    assert failed.value.type == "FlowTimedOut"
    assert timedelta(hours=2) <= flow_clock.now() - began < timedelta(hours=2, minutes=1)
    assert world.asked.count(LOOK) == 120
    assert world.asked[-1] == "abort begin sales"


@pytest.mark.parametrize(("when", "times"), [("before", 1), ("during", 2), ("after", 1)])
def test_a_crash_begins_no_second_job(
    flow_app: FlowApp, flow_crash: FlowCrash, world: Outside, when: When, times: int
) -> None:
    world.answer("look", "running", "running", "running", "ready")
    flow_crash.at("begin_export", when=when)
    flow_crash.at("look", when="after")
    assert export.start("sales").result() == "fetch begin sales"
    assert world.asked.count("begin sales") == times
    assert world.done.count("begin sales") == 1
    assert world.asked.count(LOOK) == 4
