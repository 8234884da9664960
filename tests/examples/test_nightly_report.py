"""The example of a nightly report: a flow for each night, and for those that were missed."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from celery_flows import Flows
from celery_flows.testing import FlowApp, FlowClock, FlowCrash
from examples.nightly_report.app import flows, nightly

MARCH_28 = datetime(2099, 3, 28, 1, 0, tzinfo=UTC)  # two in the morning in Berlin, a day before clocks are set forward


@pytest.fixture
def flow_celery_app() -> Flows:
    return flows


@pytest.fixture(autouse=True)
def began(flow_app: FlowApp, flow_clock: FlowClock) -> None:
    """The schedule is known since before the first slot: one that is new makes up for nothing."""
    flow_clock.move_to(MARCH_28)
    flow_app.run()
    assert reports() == []


def reports() -> list[str]:
    """All reports so far, by slot."""
    found = flows.search(definition=nightly.name)
    return sorted(f"{flow.idempotency_key}: {flow.result_json}" for flow in found)


def test_each_night_has_a_report_of_its_day_whatever_the_clocks_do(flow_app: FlowApp, flow_clock: FlowClock) -> None:
    flow_clock.advance(hours=1)
    first = "slot 2099-03-28T02:00:00+00:00: report of 2099-03-27: 1481"
    assert reports() == [first]
    flow_clock.advance(hours=23)
    assert reports() == [first, "slot 2099-03-29T01:00:00+00:00: report of 2099-03-28: 1484"]
    assert flow_app.ran.count("publish") == 2


def test_a_month_has_a_report_of_each_day(flow_clock: FlowClock) -> None:
    flow_clock.advance(days=29.5)
    days = [(MARCH_28 + timedelta(days=number - 1)).date() for number in range(30)]
    assert [report.split()[-2] for report in reports()] == [f"{day}:" for day in days]


def test_nights_that_were_missed_are_made_up_for_one_after_the_other(flow_app: FlowApp, flow_clock: FlowClock) -> None:
    flow_clock.move_to(MARCH_28 + timedelta(days=2.5))  # no beat, no worker
    flow_app.run()
    assert [report.partition(": ")[2] for report in reports()] == [
        "report of 2099-03-27: 1481", "report of 2099-03-28: 1484", "report of 2099-03-29: 1487",
    ]  # fmt: skip
    third, second, first = flows.search()
    assert first.updated_at < second.created_at
    assert second.updated_at < third.created_at


def test_a_crash_while_it_is_published_costs_no_second_query(
    flow_app: FlowApp, flow_clock: FlowClock, flow_crash: FlowCrash
) -> None:
    flow_crash.at("publish", when="during")
    flow_clock.advance(hours=2)
    assert [report.partition(": ")[2] for report in reports()] == ["report of 2099-03-27: 1481"]
    assert (flow_app.ran.count("publish"), flow_app.ran.count("examples.nightly_report.app.sales_of")) == (2, 3)
