"""Spans, kept where a test can look at them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from opentelemetry import trace
from opentelemetry.instrumentation.celery import CeleryInstrumentor
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

SPANS = "SHOP_SPANS"  # where a process writes its spans
INSTRUMENTED = "SHOP_INSTRUMENTED"  # there at all: opentelemetry-instrumentation-celery traces its messages


@dataclass(frozen=True)
class Seen:
    """A span that has ended."""

    name: str
    trace: str
    id: str
    parent: str | None
    attributes: dict[str, Any]
    links: list[str] = field(default_factory=list)
    status: str = "UNSET"

    @classmethod
    def of(cls, told: dict[str, Any]) -> Seen:
        return cls(
            told["name"], told["context"]["trace_id"], told["context"]["span_id"], told["parent_id"],
            told["attributes"], [link["context"]["span_id"] for link in told["links"]],
            told["status"]["status_code"],
        )  # fmt: skip


def seen(span: ReadableSpan) -> Seen:
    return Seen.of(json.loads(span.to_json()))


@cache
def provider() -> TracerProvider:
    """The process's own, which can be set only once."""
    made = TracerProvider()
    trace.set_tracer_provider(made)
    return made


@contextmanager
def kept_spans() -> Iterator[InMemorySpanExporter]:
    """Where this process's spans go meanwhile."""
    exporter = InMemorySpanExporter()
    processor = SimpleSpanProcessor(exporter)
    provider().add_span_processor(processor)
    try:
        yield exporter
    finally:
        exporter.shutdown()


def write_spans(path: str, *, instrumented: bool) -> None:
    """Has this process, and those that it forks, write each span into a file of its own as it ends."""

    class Lines(SpanExporter):
        def export(self, spans: Any) -> Any:
            with Path(path).open("a") as file:  # one write a span, appended: processes do not mix
                return ConsoleSpanExporter(out=file, formatter=lambda span: span.to_json(indent=None) + "\n").export(
                    spans
                )

    provider().add_span_processor(SimpleSpanProcessor(Lines()))
    if instrumented:
        CeleryInstrumentor().instrument()  # type: ignore[no-untyped-call]


def read_spans(path: Path) -> list[Seen]:
    """What has been written until now."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [Seen.of(json.loads(line)) for line in lines]
