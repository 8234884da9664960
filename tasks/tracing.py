"""OpenTelemetry: one trace a flow, from the application that starts it through all its runs, whoever makes them.

A flow keeps the context of the span that started it (``trace_json``); every run of its function, and every Celery step,
is a child of that, however many waits, workers and days lie between. What a run's own message was traced as, by
opentelemetry-instrumentation-celery or by whoever published it, is linked to. So is the span of a run that crashed,
which nobody ends: its id is left in the store while it runs.

No attribute has a payload, and no error's message: ids, names, numbers and types of errors only.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any
from uuid import UUID

from opentelemetry import context as contexts
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from celery_flows.store import FlowError, traces
from celery_flows.tasks.spans import Carrier, Span, Spans, Starting

if TYPE_CHECKING:
    from celery_flows.store.changes import Holder
    from celery_flows.store.dispatch import DriveClaim, StepClaim
    from celery_flows.tasks.runtime import Runtime

log = logging.getLogger("celery_flows.tracing")

PREFIX = "celery_flows."
_W3C = TraceContextTextMapPropagator()  # not the global one: that may carry baggage, which may be anything


class RealStarting(Starting):
    """The start of a flow, as a span."""

    def __init__(self, span: trace.Span) -> None:
        self._span, self.carrier = span, _carried(trace.set_span_in_context(span, Context()))

    def tell(self, flow_id: UUID) -> None:
        self._span.set_attribute(PREFIX + "flow_id", str(flow_id))


class RealSpan(Span):
    """What runs now, as a span."""

    def __init__(self, span: trace.Span) -> None:
        self._span = span

    def came_to(self, outcome: str, error: str | None = None) -> None:
        self._span.set_attribute(PREFIX + "outcome", outcome)
        if outcome in ("failed", "retried"):
            self._span.set_status(Status(StatusCode.ERROR, error))
        if error is not None:
            self._span.set_attribute("error.type", error)


class Tracing(Spans):
    """Makes spans by the tracer provider that the application has set, if it has set one."""

    def __init__(self) -> None:
        self._tracer = trace.get_tracer("celery_flows", version("celery-flows"))

    @contextmanager
    def starting(self, definition: str, *, origin: Carrier | None = None, apart: bool = False) -> Iterator[Starting]:
        here = _current_link()
        links = [link for link in (_link(origin), here if apart else None) if link is not None]
        with self._tracer.start_as_current_span(
            f"flow.start {definition}", Context() if apart else None, SpanKind.PRODUCER,
            {PREFIX + "definition": definition}, links, record_exception=False, set_status_on_exception=False,
        ) as span:  # fmt: skip
            yield RealStarting(span)

    @contextmanager
    def received(self, request: Any) -> Iterator[None]:
        if _current_link() is not None:  # of an instrumentation, which has seen to it
            yield
            return
        found = {name: value for name in _W3C.fields if isinstance(value := getattr(request, name, None), str)}
        token = contexts.attach(_W3C.extract(found, Context()))
        try:
            yield
        finally:
            contexts.detach(token)

    def carrier(self) -> Carrier | None:
        return _carried(None)

    @contextmanager
    def run(self, runtime: Runtime, claim: DriveClaim) -> Iterator[Span]:
        flow = claim.flow
        crashed = _find(runtime, claim.holder.run_id).crashed if claim.crash_count else None
        attributes = {
            "flow_id": str(flow.id), "definition": flow.controller_id, "version": flow.definition_version,
            "fence": claim.holder.fence, "crashes": claim.crash_count,
        }  # fmt: skip
        name = f"flow.run {flow.controller_id}"
        with self._under(runtime, name, claim.holder, flow.trace_json, crashed, attributes) as span:
            yield span

    @contextmanager
    def inline_step(self, names: Mapping[str, Any], code: str) -> Iterator[Span]:
        with self._tracer.start_as_current_span(
            f"flow.step {code}", None, SpanKind.INTERNAL, _attributes(names),
            record_exception=False, set_status_on_exception=False,
        ) as span:  # fmt: skip
            yield RealSpan(span)

    @contextmanager
    def celery_step(self, runtime: Runtime, claim: StepClaim, names: Mapping[str, Any]) -> Iterator[Span]:
        found = _find(runtime, claim.holder.run_id)
        attributes = {("definition" if key == "flow" else key): value for key, value in names.items()}
        name = f"flow.step {claim.task}"
        with self._under(runtime, name, claim.holder, found.flow, found.crashed, attributes) as span:
            yield span

    @contextmanager
    def publishing(self) -> Iterator[None]:
        token = contexts.attach(contexts.get_current())
        try:
            yield
        finally:
            contexts.detach(token)

    @contextmanager
    def _under(
        self, runtime: Runtime, name: str, holder: Holder, carrier: Carrier | None, crashed: str | None,
        attributes: Mapping[str, Any],
    ) -> Iterator[Span]:  # fmt: skip
        """A span below the flow's; without one, below what is current here."""
        parent = None if carrier is None else _W3C.extract(carrier, Context())
        links = [link for link in (_link_to_crashed(crashed),) if link is not None]
        if parent is not None and (here := _current_link()) is not None:
            links.append(here)
        with self._tracer.start_as_current_span(
            name, parent, SpanKind.CONSUMER, _attributes(attributes), links,
            record_exception=False, set_status_on_exception=False,
        ) as span:  # fmt: skip
            if span.is_recording():
                _leave(runtime, holder, span.get_span_context())
            yield RealSpan(span)


def _attributes(names: Mapping[str, Any]) -> dict[str, Any]:
    return {PREFIX + name: value for name, value in names.items()}


def _carried(context: Context | None) -> Carrier | None:
    """A span's context as text; None: there is none."""
    carrier: Carrier = {}
    _W3C.inject(carrier, context)
    return carrier or None


def _link(carrier: Carrier | None) -> Link | None:
    if carrier is None:
        return None
    found = trace.get_current_span(_W3C.extract(carrier, Context())).get_span_context()
    return Link(found) if found.is_valid else None


def _current_link() -> Link | None:
    here = trace.get_current_span().get_span_context()
    return Link(here) if here.is_valid else None


def _link_to_crashed(text: str | None) -> Link | None:
    if text is None:
        return None
    trace_id, _, span_id = text.partition("-")
    found = SpanContext(int(trace_id, 16), int(span_id, 16), is_remote=True, trace_flags=TraceFlags(1))
    return Link(found, {PREFIX + "crashed": True})


def _find(runtime: Runtime, run_id: str) -> traces.Trace:
    try:
        return runtime.store.run(traces.find_trace, run_id)
    except FlowError as error:  # work goes on without its trace
        log.warning("the trace of %s could not be read (%s)", run_id, type(error).__name__)
        return traces.Trace(None, None)


def _leave(runtime: Runtime, holder: Holder, span: SpanContext) -> None:
    try:
        runtime.store.run(traces.leave_span, holder, f"{span.trace_id:032x}-{span.span_id:016x}")
    except FlowError as error:
        log.warning("the span of %s could not be kept (%s)", holder.run_id, type(error).__name__)
