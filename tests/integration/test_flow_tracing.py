"""One trace a flow, from whoever starts it through all its runs; and nothing of what a flow is told is in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa
from opentelemetry import trace
from opentelemetry.instrumentation.celery import CeleryInstrumentor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from celery_flows import AsyncRun, FlowHandle, Retry, Run, StepFailed
from celery_flows.store.tables import flow_heartbeats
from celery_flows.tasks import slots
from tests.integration.conftest import MakeBench
from tests.support.bench import PAST, Bench
from tests.support.tracing import Seen, kept_spans, seen
from tests.support.waiting import until

application = trace.get_tracer("application")


@pytest.fixture
def exporter() -> Iterator[InMemorySpanExporter]:
    with kept_spans() as exporter:
        yield exporter


Spans = Callable[..., list[Seen]]


@pytest.fixture
def spans(exporter: InMemorySpanExporter) -> Spans:
    """The spans that have ended, in that order; of one flow, or of a name's beginning."""

    def ended(name: str = "", flow_id: UUID | None = None) -> list[Seen]:
        found = [seen(span) for span in exporter.get_finished_spans()]
        found = [span for span in found if span.name.startswith(name)]
        return [span for span in found if flow_id in (None, _flow_of(span))]

    return ended


def _flow_of(span: Seen) -> UUID | None:
    text = span.attributes.get("celery_flows.flow_id")
    return None if text is None else UUID(text)


@pytest.fixture
def traced(make_bench: MakeBench, exporter: InMemorySpanExporter) -> Bench:
    return make_bench(tracing=True)


def a_flow(bench: Bench, rests: timedelta = timedelta(milliseconds=50)) -> Any:
    @bench.task("charge")
    def charge(cents: int) -> str:
        with application.start_as_current_span("charging"):
            return f"paid {cents}"

    @bench.flows.flow("order")
    def order(run: Run, cents: int) -> str:
        run.step(bench.effects.append, "reserved")
        paid = run.step(charge, cents)
        run.sleep(rests)
        run.step(bench.effects.append, "sent")
        return paid

    return order


def test_a_flow_is_one_trace_from_the_span_that_started_it(traced: Bench, spans: Spans) -> None:
    flow = a_flow(traced)
    with application.start_as_current_span("request") as request:
        handle = flow.start(7)
        began = request.get_span_context()
    assert traced.finish(handle) == "paid 7"

    assert {span.trace for span in spans()} == {f"0x{began.trace_id:032x}"}
    (start,) = spans("flow.start order")
    assert start.parent == f"0x{began.span_id:016x}"
    runs, step = spans("flow.run order"), spans("flow.step charge")[0]
    assert len(runs) == 3  # until the Celery step, until the sleep, to the end
    assert {run.parent for run in runs} == {step.parent} == {start.id}
    assert [span.parent for span in spans("flow.step append")] == [runs[0].id, runs[2].id]
    assert spans("charging")[0].parent == step.id
    assert {_flow_of(span) for span in [start, *runs, step]} == {handle.id}
    assert runs[-1].attributes["celery_flows.outcome"] == "finished"
    assert step.attributes["celery_flows.attempt"] == 1


def test_a_flow_that_nothing_started_has_a_trace_of_its_own(traced: Bench, spans: Spans) -> None:
    flow = a_flow(traced)
    first, second = flow.start(1), flow.start(2)
    traced.work()

    of_first = {span.trace for span in spans(flow_id=first.id)}
    of_second = {span.trace for span in spans(flow_id=second.id)}
    assert len(of_first) == len(of_second) == 1
    assert of_first != of_second


def test_a_run_after_a_crash_links_to_the_one_that_crashed(
    make_bench: MakeBench, exporter: InMemorySpanExporter, spans: Spans
) -> None:
    bench = make_bench(tracing=True)

    def die() -> None:
        bench.effects.append("tried")
        if len(bench.effects) == 1:
            raise Killed

    @bench.task("die elsewhere")
    def die_elsewhere() -> None:
        bench.effects.append("tried elsewhere")
        if bench.effects.count("tried elsewhere") == 1:
            raise Killed

    @bench.flows.flow("dies")
    def dies(run: Run) -> None:
        run.step(die)
        run.step(die_elsewhere)

    handle = dies.start()
    for _ in range(2):
        with suppress(Killed):
            bench.work()
        bench.end_leases()
        bench.sweep()
    bench.finish(handle)

    crashed, after = spans("flow.run dies")[:2]
    assert after.links == [crashed.id]
    assert after.attributes["celery_flows.crashes"] == 1
    crashed, after = spans("flow.step die elsewhere")
    assert after.links == [crashed.id]
    assert [run.links for run in spans("flow.run dies")[2:]] == [[]] * len(spans("flow.run dies")[2:])


class Killed(BaseException):
    """Ends a worker, as far as this process can show it: it tells nobody."""


def test_retries_are_spans_with_the_type_of_what_they_failed_with(traced: Bench, spans: Spans) -> None:
    def stumble() -> str:
        traced.effects.append("tried")
        if len(traced.effects) < 3:
            raise LookupError("with secrets")
        return "up"

    @traced.flows.flow("retries")
    def retries(run: Run) -> str:
        return run.options(retry=Retry(3, initial=timedelta(milliseconds=1))).step(stumble)

    handle = retries.start()
    traced.finish(handle)
    attempts = spans("flow.step stumble")
    assert [span.attributes["celery_flows.attempt"] for span in attempts] == [1, 2, 3]
    assert [span.attributes["celery_flows.outcome"] for span in attempts] == ["retried", "retried", "succeeded"]
    assert [span.attributes.get("error.type") for span in attempts] == ["LookupError", "LookupError", None]
    assert [span.status for span in attempts] == ["ERROR", "ERROR", "UNSET"]


def test_a_child_flow_is_in_its_parents_trace_below_the_run_that_asked_for_it(traced: Bench, spans: Spans) -> None:
    @traced.flows.flow("child")
    def child(run: Run) -> str:
        return "done"

    @traced.flows.flow("parent")
    def parent(run: Run) -> str:
        return run.flow(child)

    traced.finish(parent.start())
    assert len({span.trace for span in spans()}) == 1
    assert [span.parent for span in spans("flow.run child")] == [spans("flow.run parent")[0].id]


def test_a_flow_that_goes_on_as_another_begins_a_trace_that_links_back(traced: Bench, spans: Spans) -> None:
    @traced.flows.flow("counts")
    def counts(run: Run, number: int) -> int:
        if number < 2:
            run.restart_as(number + 1)
        return number

    handle = counts.start(1)
    traced.work()
    assert handle.result(0) == 2
    first, second = spans("flow.run counts")
    assert first.trace != second.trace
    (again,) = [span for span in spans("flow.start counts") if span.trace == second.trace]
    assert again.links == [first.id]


def test_a_fork_and_a_retry_link_to_the_trace_they_go_back_to(traced: Bench, spans: Spans) -> None:
    @traced.flows.flow("fails")
    def fails(run: Run) -> None:
        run.step(traced.effects.append, "once")
        raise LookupError

    handle = fails.start()
    traced.work()
    retried, forked = handle.retry(), handle.fork(from_step="append")
    traced.work()
    origin = spans("flow.start", handle.id)[0]
    for new in (retried, forked):
        (start,) = spans("flow.start", new.id)
        assert start.links == [origin.id]
        assert spans("flow.run", new.id)[0].trace == start.trace != origin.trace


def test_many_flows_that_are_started_together_are_in_the_trace_of_who_starts_them(traced: Bench, spans: Spans) -> None:
    flow = a_flow(traced)
    with application.start_as_current_span("request"):
        handles = flow.start_many([1, 2, 3])
    traced.work()
    (start,) = spans("flow.start")
    assert {_flow_of(run) for run in spans("flow.run") if run.parent == start.id} == {each.id for each in handles}


def test_a_flow_by_the_clock_is_a_trace_a_slot(traced: Bench, spans: Spans) -> None:
    @traced.flows.flow("rings", schedule=3600.0)
    def rings(run: Run) -> None: ...

    slots.try_to_start(traced.flows.runtime, rings)  # from now on
    with traced.store.engine.begin() as connection:
        connection.execute(
            sa.update(flow_heartbeats)
            .values(report={"slot": PAST.isoformat(), "flow_id": None})
            .where(flow_heartbeats.c.name == "schedule rings")
        )
    slots.try_to_start(traced.flows.runtime, rings)
    traced.work()
    (run,) = spans("flow.run rings")
    assert run.parent in {start.id for start in spans("flow.start rings") if start.trace == run.trace}


def test_a_start_by_message_goes_on_with_the_messages_trace(traced: Bench, spans: Spans) -> None:
    flow = a_flow(traced)
    task = traced.app.tasks["flows.start"]
    parent = "00-" + "ab" * 16 + "-" + "cd" * 8 + "-01"
    task.push_request(id="message-1", traceparent=parent)
    try:
        flow_id = UUID(task.run(name="order", input=3))
    finally:
        task.pop_request()
    traced.work()
    assert flow.name == "order"
    assert {span.trace for span in spans(flow_id=flow_id)} == {"0x" + "ab" * 16}


def test_async_flows_and_steps_side_by_side_are_below_their_run(traced: Bench, spans: Spans) -> None:
    async def fetch(number: int) -> int:
        with application.start_as_current_span(f"inside {number}"):
            return number

    @traced.flows.flow("async")
    async def together(run: AsyncRun) -> list[int]:
        from functools import partial

        return await run.gather([partial(fetch, number) for number in range(3)])

    assert traced.finish(together.start()) == [0, 1, 2]
    (run,) = spans("flow.run")
    steps = spans("flow.step fetch")
    assert [step.parent for step in steps] == [run.id] * 3
    assert {span.parent for span in spans("inside")} == {step.id for step in steps}
    assert len({span.parent for span in spans("inside")}) == 3
    assert not trace.get_current_span().get_span_context().is_valid


def test_no_span_holds_what_a_flow_was_told(traced: Bench, spans: Spans, exporter: InMemorySpanExporter) -> None:
    secret = "hunter2"

    @traced.task("echo")
    def echo(text: str) -> str:
        return text

    @traced.task("refuse")
    def refuse(text: str) -> str:
        raise LookupError(text)

    def refuse_here(text: str) -> str:
        raise LookupError(text)

    @traced.flows.flow("private")
    def private(run: Run, text: str) -> str:
        run.update(told=text)
        for step in (refuse, refuse_here):
            with suppress(StepFailed):
                run.step(step, text)
        letter = run.wait_for("letter", "private")
        raise LookupError(run.step(echo, letter))

    handle = private.start(secret)
    traced.flows.emit("letter", "private", secret)
    traced.work()
    assert handle.status() == "failed"
    told = "".join(span.to_json() for span in exporter.get_finished_spans())
    assert told.count("flow.step") >= 3
    assert secret not in told


def test_what_is_not_sampled_costs_no_write(make_bench: MakeBench, exporter: InMemorySpanExporter) -> None:
    bench = make_bench(tracing=True)
    flow = a_flow(bench, rests=timedelta(hours=1))  # so that its row is there to be looked at
    unsampled = trace.NonRecordingSpan(trace.SpanContext(1, 1, is_remote=True, trace_flags=trace.TraceFlags(0)))
    with trace.use_span(unsampled):
        handle = flow.start(1)
    bench.work()
    assert exporter.get_finished_spans() == ()
    assert {row.run_span for row in bench.rows(handle.id)} == {None}


def test_without_the_setting_nothing_is_traced_or_kept(bench: Bench, spans: Spans) -> None:
    flow = a_flow(bench)
    with application.start_as_current_span("request"):
        handle = flow.start(1)
    bench.work()
    assert [span.name for span in spans()] == ["request", "charging"]
    flow_row = bench.store.get(handle.id)
    assert flow_row is not None
    assert flow_row.trace_json is None


@pytest.fixture
def instrumented() -> Iterator[None]:
    CeleryInstrumentor().instrument()  # type: ignore[no-untyped-call]
    yield
    CeleryInstrumentor().uninstrument()  # type: ignore[no-untyped-call]


def test_beside_the_instrumentation_of_celery_no_parent_is_lost_or_doubled(
    traced: Bench, spans: Spans, instrumented: None
) -> None:
    """Which makes a span of each message, and of each task that Celery runs."""
    flow = a_flow(traced)
    with application.start_as_current_span("request"):
        handle: FlowHandle[str] = flow.start(7)
    drive = traced.app.tasks["flows.drive"]

    def ended() -> bool:
        for kind, run_id in traced.claimable():
            if kind == "drive":
                with application.start_as_current_span("run/flows.drive"):  # as the instrumentation does in a worker
                    drive.run(flow_id=run_id)
            else:
                traced.run_step(run_id)
        return handle.status().is_terminal

    until(ended, "the flow ends")
    mine = spans(flow_id=handle.id)
    known = {span.id for span in spans()}
    assert [span.name for span in spans() if span.parent is not None and span.parent not in known] == []
    assert len({span.trace for span in mine}) == 1
    carried = [run.links for run in spans("flow.run order")]
    messages = [span.id for span in spans("run/flows.drive")]
    assert [link for links in carried for link in links if link in messages]
    assert not trace.get_current_span().get_span_context().is_valid
