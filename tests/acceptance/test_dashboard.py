"""docs/grafana shows what a worker tells, all of it, and nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from celery_flows.tasks import metrics
from celery_flows.tasks.metrics import METRICS
from celery_flows.worker.tallies import Tallies
from tests.acceptance.conftest import MakeTown
from tests.support.brokers import Broker
from tests.support.scrape import ANY, PORT, Scraped, await_value, scrape
from tests.support.shop import Order
from tests.support.waiting import until

FILE = Path(__file__).parents[2] / "docs/grafana/celery-flows.json"
NOT_SHOWN: set[str] = set()  # metrics that are on no panel, and known not to be
BEFORE_LABELS = r"(celery_flows_\w+)\s*[{,]"


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(FILE.read_text())
    return found


def expressions() -> list[str]:
    shown = [target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", ())]
    asked = [each["query"]["query"] for each in dashboard()["templating"]["list"] if each["type"] == "query"]
    return shown + asked


def names(expression: str) -> set[str]:
    return set(re.findall(BEFORE_LABELS, expression))


@pytest.fixture(scope="module")
def everything() -> set[str]:
    """The samples of every metric that processes count."""
    from prometheus_client import CollectorRegistry, generate_latest

    tallies = Tallies()
    try:
        for metric in METRICS:
            labels = tuple("x" for _ in metric.labels)
            tallies.observe(metric, 1.0, labels) if metric.buckets else tallies.add(metric, labels)
        registry = CollectorRegistry()
        registry.register(tallies)
        return Scraped(generate_latest(registry).decode()).names
    finally:
        tallies.close()


def test_every_expression_names_a_metric_that_a_worker_tells_and_every_metric_is_shown(
    make_town: MakeTown, redis_server: Broker, everything: set[str]
) -> None:
    town = make_town(redis_server.url)
    town.environment[PORT] = ANY
    worker = town.worker()
    handle = town.shop.fulfil.start(Order(id="order-1"))
    limited = town.shop.limited.start(1)
    town.shop.delayed.start(3600.0)
    await_value(worker, 1, "open_flows", definition="shop/delayed", status="waiting")
    real = scrape(worker)
    handle.cancel()
    until(lambda: handle.status().is_terminal, "the order is cancelled")  # its history is looked at in the end
    until(lambda: limited.status().is_terminal, "the limited flow ends")
    told = real.names | everything
    shown = set().union(*map(names, expressions()))

    assert all(names(expression) for expression in expressions())
    assert shown - told - {"celery_flows_queued"} == set()  # nothing queues at a moment of our choosing
    families = {family for family in real.families if family.startswith("celery_flows_")}
    families |= {metrics.PREFIX + metric.name for metric in METRICS}
    unseen = {family for family in families if not any(name.startswith(family) for name in shown)}
    assert unseen == NOT_SHOWN


def test_expressions_select_by_labels_that_their_metrics_have() -> None:
    of = {metrics.PREFIX + metric.name: set(metric.labels) for metric in METRICS}
    of |= {
        "celery_flows_open_flows": {"definition", "status"}, "celery_flows_queued": {"definition"},
        "celery_flows_waiting": {"kind"}, "celery_flows_waiting_oldest_seconds": {"kind"},
        "celery_flows_held": {"kind"}, "celery_flows_heartbeat_age_seconds": {"chore"},
        "celery_flows_database_up": set(), "celery_flows_count_seconds": set(),
    }  # fmt: skip
    for expression in expressions():
        for name, selected in re.findall(r"(celery_flows_\w+)\{([^}]*)\}", expression):
            base = re.sub(r"_(total|bucket|sum|count)$", "", name)
            assert set(re.findall(r"(\w+)=", selected)) <= of[base] | {"job"}, expression
        for by in re.findall(r"by \(([^)]*)\)", expression):
            names_of = {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in names(expression)}
            assert {label.strip() for label in by.split(",")} <= set().union(*(of[n] for n in names_of)) | {"le"}


def test_panels_do_not_lie_over_each_other() -> None:
    places = [panel["gridPos"] for panel in dashboard()["panels"]]
    cells = [
        (x, y)
        for at in places
        for x in range(at["x"], at["x"] + at["w"])
        for y in range(at["y"], at["y"] + at["h"])
    ]  # fmt: skip
    assert len(cells) == len(set(cells))
    assert len({panel["id"] for panel in dashboard()["panels"]}) == len(places)
