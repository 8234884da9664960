"""docs/observability.md does what it says: its code is run, and it names every metric."""

from __future__ import annotations

import json
import sys

from celery_flows.tasks.metrics import METRICS
from tests.support.commandline import ROOT, Project
from tests.support.observability_page import PAGE


def test_its_blocks_trace_a_flow_and_say_whose_lines_are_whose(database_url: str) -> None:
    ran = Project(ROOT, {}).run(sys.executable, "-W", "error", "-m", "tests.support.observability_page", database_url)

    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == {
        "spans": ["flow.run shop/order", "flow.start shop/order", "flow.step charge"],
        "traces": 1,
        "filter": "WARNING [shop/order FLOW_ID charge] charged",
        "processor": ["charged", "charge", True],
        "json": "hello",
    }


def test_it_names_every_metric() -> None:
    page = PAGE.read_text()

    assert [each.name for each in METRICS if f"`{each.name}{'' if each.buckets else '_total'}`" not in page] == []
