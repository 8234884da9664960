"""One trace a flow across real processes, one of which is killed; and beside Celery's own instrumentation."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.acceptance.conftest import MakeTown, Town
from tests.support.brokers import Broker
from tests.support.shop import JSON_LOG, Order
from tests.support.tracing import INSTRUMENTED, SPANS, Seen, kept_spans, read_spans, seen
from tests.support.waiting import until
from tests.support.workers import Worker

application = trace.get_tracer("application")


@pytest.fixture
def exporter() -> Iterator[InMemorySpanExporter]:
    """Of this process, which is the application."""
    with kept_spans() as exporter:
        yield exporter


@pytest.fixture
def traced(make_town: MakeTown, redis_server: Broker, exporter: InMemorySpanExporter) -> Town:
    town = make_town(redis_server.url)
    town.shop.app.conf.flow_tracing = True
    return town


def start_worker(town: Town, *options: str, instrumented: bool = False) -> Worker:
    town.environment |= {SPANS: str(spans_of(town)), "FLOW_TRACING": "1"}
    town.environment |= {INSTRUMENTED: "yes"} if instrumented else {}
    return town.worker(*options)


def spans_of(town: Town) -> Path:
    return town.directory / "spans.jsonl"


def all_spans(town: Town, exporter: InMemorySpanExporter) -> list[Seen]:
    return [seen(span) for span in exporter.get_finished_spans()] + read_spans(spans_of(town))


def of_flow(spans: list[Seen], flow_id: Any) -> list[Seen]:
    return [span for span in spans if span.attributes.get("celery_flows.flow_id") == str(flow_id)]


def ended(town: Town, flow_id: Any) -> None:
    """The last run's span is written after its result can be seen."""

    def is_told() -> bool:
        found = of_flow(read_spans(spans_of(town)), flow_id)
        return any(span.attributes.get("celery_flows.outcome") == "finished" for span in found)

    until(is_told, "the last run's span is written", within_seconds=20)


def test_a_killed_worker_leaves_one_trace_whose_next_run_links_to_the_lost_one(
    traced: Town, exporter: InMemorySpanExporter
) -> None:
    worker = start_worker(traced, "-c", "1")
    with application.start_as_current_span("request") as request:
        handle = traced.shop.held_inline.start("held")
        trace_id = f"0x{request.get_span_context().trace_id:032x}"
    until(lambda: traced.shop.effects.read("held began"), "a step runs", within_seconds=30)
    (victim,) = worker.children()
    os.kill(victim, signal.SIGKILL)
    until(lambda: len(traced.shop.effects.read("held began")) == 2, "the step runs again", within_seconds=60)
    traced.shop.open_gate()
    handle.result(60)
    ended(traced, handle.id)

    spans = of_flow(all_spans(traced, exporter), handle.id)
    assert {span.trace for span in spans} == {trace_id}
    (start,) = [span for span in spans if span.name.startswith("flow.start")]
    (last,) = [span for span in spans if span.name.startswith("flow.run")]  # the killed one never told
    assert last.parent == start.id
    (before,) = [span for span in spans if span.name == "flow.step note" and span.parent != last.id]
    assert last.links == [before.parent]
    assert last.attributes["celery_flows.crashes"] == 1


@pytest.mark.parametrize("instrumented", [False, True], ids=["alone", "beside Celery's instrumentation"])
@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_waits_and_celery_steps_of_other_processes_are_in_the_trace(
    traced: Town, exporter: InMemorySpanExporter, pool: str, instrumented: bool
) -> None:
    start_worker(traced, "--pool", pool, instrumented=instrumented)
    with application.start_as_current_span("request") as request:
        handle = traced.shop.fulfil.start(Order(id="order-1"))
        trace_id = f"0x{request.get_span_context().trace_id:032x}"
    traced.shop.flows.emit("approval", "order-1", {"by": "Ada"})
    handle.result(60)
    ended(traced, handle.id)

    spans = all_spans(traced, exporter)
    mine = of_flow(spans, handle.id)
    assert {span.trace for span in mine} == {trace_id}
    assert {"flow.step shop.charge", "flow.step shop.label", "flow.step reserve"} <= {span.name for span in mine}
    (start,) = [span for span in mine if span.name.startswith("flow.start")]
    celery_steps = [span for span in mine if span.name.startswith("flow.step shop.")]
    assert {span.parent for span in celery_steps} == {start.id}
    known = {span.id for span in spans}
    assert [span.name for span in mine if span.parent not in known] == []
    run_ids = [
        (span.attributes["celery_flows.run_id"], span.attributes["celery_flows.attempt"]) for span in celery_steps
    ]
    assert len(run_ids) == len(set(run_ids))  # none is doubled
    if instrumented:
        messages = {span.id for span in spans if span.name.startswith("run/flows.")}
        assert messages & {link for span in mine for link in span.links}


def test_a_workers_log_as_json_says_which_flow_and_step_each_line_is_of(
    make_town: MakeTown, redis_server: Broker
) -> None:
    town = make_town(redis_server.url)
    town.environment[JSON_LOG] = "yes"
    worker = town.worker()
    handle = town.shop.private.start("hunter2")
    town.shop.flows.emit("letter", "private", "hunter2")
    until(lambda: f"flow {handle.id} of" in worker.output, "it is logged that the flow failed", within_seconds=30)

    lines = [json.loads(line) for line in worker.output.splitlines() if line.startswith("{")]
    (failed,) = [line for line in lines if line["event"].startswith(f"flow {handle.id} of")]
    assert failed.items() >= {"flow": "shop/private", "flow_id": str(handle.id), "level": "warning"}.items()
    (refused,) = [line for line in lines if line["event"].startswith("step shop.refuse of")]
    assert (refused["step"], refused["flow_id"], refused["attempt"]) == ("shop.refuse", str(handle.id), 2)
    assert [line for line in lines if " ready." in line["event"] and "flow_id" in line] == []
    assert "hunter2" not in worker.output
