"""Something is due every minute, and takes longer than that. After the overlap policies of Temporal's schedules."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest
from celery import Celery

from celery_flows import FlowDefinition, Flows, Run
from celery_flows.testing import FlowApp, FlowClock

app = Celery("cron_overlap")
app.conf.update(task_default_queue="cron-overlap")
flows = Flows(app)

MINUTE = timedelta(minutes=1)
TAKES = timedelta(seconds=150)  # two slots and a half


# ---- the flows ----


def import_rates(run: Run, slot: datetime) -> None:
    run.sleep(TAKES)


@flows.flow("rates/allow", schedule=MINUTE)
def allow(run: Run, slot: datetime) -> None:
    import_rates(run, slot)


@flows.flow("rates/skip", schedule=MINUTE, overlap="skip")
def skip(run: Run, slot: datetime) -> None:
    import_rates(run, slot)


@flows.flow("rates/buffer one", schedule=MINUTE, overlap="wait")
def buffer_one(run: Run, slot: datetime) -> None:
    import_rates(run, slot)


@flows.flow("rates/buffer all", schedule=MINUTE, overlap="wait", catch_up="all")
def buffer_all(run: Run, slot: datetime) -> None:
    import_rates(run, slot)


# ---- their tests ----


@pytest.mark.parametrize(
    ("definition", "minutes"),
    [
        pytest.param(allow, [0, 1, 2, 3, 4, 5], id="allow"),
        pytest.param(skip, [0, 3], id="skip"),
        pytest.param(buffer_one, [0, 2, 5], id="buffer one"),
        pytest.param(buffer_all, [0, 1, 2], id="buffer all"),
    ],
)
def test_each_policy_begins_these_within_six_minutes(
    flow_app: FlowApp, flow_clock: FlowClock, definition: FlowDefinition[datetime, None], minutes: list[int]
) -> None:
    first = flow_clock.now().replace(second=0, microsecond=0) + MINUTE
    flow_clock.advance_to(first)
    for _ in range(35):
        flow_clock.advance(seconds=10)  # as often does beat's sweep look
        app.tasks["flows.look"].apply(kwargs={"name": definition.name}, throw=True)
        flow_app.run()
    begun = flows.search(definition=definition.name)[::-1]
    assert [(datetime.fromisoformat(str(flow.input_json)) - first) // MINUTE for flow in begun] == minutes
