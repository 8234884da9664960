"""The example of a nightly report: a flow for each night, and for those that were missed."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa

from celery_flows import Flows
from celery_flows.store.tables import flows as table
from celery_flows.testing import FlowApp, FlowClock, FlowCrash
from examples.nightly_report.app import app, flows, nightly

MARCH_28 = datetime(2099, 3, 28, 1, 0, tzinfo=UTC)  # two in the morning in Berlin, a day before clocks are set forward


@pytest.fixture
def flow_celery_app() -> Flows:
    return flows


def look(flow_app: FlowApp, *, slots: int) -> list[str]:
    """What a worker does with beat's message; gives all reports so far, by slot."""
    app.tasks["flows.look"].apply(kwargs={"name": nightly.name}, throw=True)
    flow_app.run()
    with flow_app.store.engine.connect() as connection:
        rows = connection.execute(
            sa.select(table.c.idempotency_key, table.c.result_json).order_by(table.c.idempotency_key)
        ).all()
    assert len(rows) == slots
    return [f"{key}: {result}" for key, result in rows]


@pytest.fixture(autouse=True)
def began(flow_app: FlowApp, flow_clock: FlowClock) -> None:
    """A first look, before the first slot: a schedule that is new makes up for nothing."""
    flow_clock.move_to(MARCH_28)
    assert look(flow_app, slots=0) == []


def test_each_night_has_a_report_of_its_day_whatever_the_clocks_do(flow_app: FlowApp, flow_clock: FlowClock) -> None:
    flow_clock.advance(hours=1)
    [first] = look(flow_app, slots=1)
    assert first == "slot 2099-03-28T02:00:00+00:00: report of 2099-03-27: 1481"
    flow_clock.advance(hours=23)
    assert look(flow_app, slots=2) == [first, "slot 2099-03-29T01:00:00+00:00: report of 2099-03-28: 1484"]
    assert flow_app.ran.count("publish") == 2


def test_a_night_has_one_report_however_many_look(flow_app: FlowApp, flow_clock: FlowClock) -> None:
    flow_clock.advance(hours=1)
    assert [len(look(flow_app, slots=1)) for _ in range(3)] == [1, 1, 1]
    assert flow_app.ran.count("publish") == 1


def test_nights_that_were_missed_are_made_up_for_one_after_the_other(flow_app: FlowApp, flow_clock: FlowClock) -> None:
    flow_clock.move_to(MARCH_28 + timedelta(days=3))  # no beat, no worker
    for night in range(1, 4):
        reports = look(flow_app, slots=night)
    assert [report.partition(": ")[2] for report in reports] == [
        "report of 2099-03-27: 1481", "report of 2099-03-28: 1484", "report of 2099-03-29: 1487",
    ]  # fmt: skip


def test_a_crash_while_it_is_published_costs_no_second_query(
    flow_app: FlowApp, flow_clock: FlowClock, flow_crash: FlowCrash
) -> None:
    flow_crash.at("publish", when="during")
    flow_clock.advance(hours=1)
    look(flow_app, slots=1)
    flow_clock.advance(hours=1)
    assert look(flow_app, slots=1)[0].endswith("report of 2099-03-27: 1481")
    assert (flow_app.ran.count("publish"), flow_app.ran.count("examples.nightly_report.app.sales_of")) == (2, 3)
