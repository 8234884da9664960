"""What takes two hours and a half, and is due every hour: left out, waiting, or side by side."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from celery_flows import FlowDefinition
from celery_flows.testing import FlowApp, FlowCrash
from tests.scenarios.cron_overlap import allows, skips, waits, waits_once
from tests.scenarios.outside import Outside

MIDNIGHT = datetime(2099, 1, 1, tzinfo=UTC)


def pass_hours(flow_app: FlowApp, definition: FlowDefinition[Any, Any], hours: int) -> None:
    """Only this one's schedule is played, from midnight on, up to a moment before the slot after so many hours."""
    flow_app.beat.only(definition.name)
    flow_app.clock.move_to(MIDNIGHT)
    flow_app.clock.advance_to(MIDNIGHT + timedelta(hours=hours, seconds=-1))


def counted(world: Outside) -> list[str]:
    return [what.removeprefix("count ") for what in world.done if what.startswith("count ")]


def test_skip_leaves_out_what_is_due_meanwhile(flow_app: FlowApp, world: Outside) -> None:
    pass_hours(flow_app, skips, 8)
    assert counted(world) == ["00:00", "03:00", "06:00"]
    assert world.asked == [
        "count 00:00", "counted 00:00", "count 03:00", "counted 03:00", "count 06:00",
    ]  # fmt: skip


def test_wait_has_each_begin_when_the_one_before_has_ended(flow_app: FlowApp, world: Outside) -> None:
    pass_hours(flow_app, waits, 9)
    assert world.asked == [
        "count 00:00", "counted 00:00", "count 01:00", "counted 01:00", "count 02:00", "counted 02:00", "count 03:00",
    ]  # fmt: skip


def test_wait_has_only_the_last_begin_if_only_the_last_is_made_up_for(flow_app: FlowApp, world: Outside) -> None:
    pass_hours(flow_app, waits_once, 9)
    assert counted(world) == ["00:00", "02:00", "05:00", "07:00"]


def test_allow_has_them_side_by_side(flow_app: FlowApp, world: Outside) -> None:
    pass_hours(flow_app, allows, 5)
    assert counted(world) == ["00:00", "01:00", "02:00", "03:00", "04:00"]
    assert world.asked.index("counted 00:00") > world.asked.index("count 02:00")


@pytest.mark.parametrize("definition", [skips, waits, waits_once, allows])
def test_a_crash_counts_nothing_twice(
    flow_app: FlowApp, flow_crash: FlowCrash, world: Outside, definition: FlowDefinition[Any, Any]
) -> None:
    flow_crash.at("count", when="after")
    flow_crash.at("tell", when="during")
    pass_hours(flow_app, definition, 4)
    begun = [what for what in world.asked if what.startswith("count ")]
    assert len(begun) == len(set(begun))
    assert world.asked.count("count 00:00") == 1
    assert world.asked.count("counted 00:00") == 2
    assert world.done.count("counted 00:00") == 1
