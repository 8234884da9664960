"""Spans of flows and steps, as they are where nobody traces: none. :mod:`tracing` makes real ones."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any
from uuid import UUID

if TYPE_CHECKING:
    from celery_flows.store.dispatch import DriveClaim, StepClaim
    from celery_flows.tasks.runtime import Runtime

Carrier = dict[str, str]  # W3C trace context: traceparent, tracestate


def trace_id(carrier: Carrier | None) -> str | None:
    """The id that a trace is looked up by; None: there is none."""
    _, _, rest = (carrier or {}).get("traceparent", "").partition("-")
    return rest.partition("-")[0] or None


class Starting:
    """The start of a flow, or of many; ``carrier`` is stored with them, for their runs to be children of."""

    carrier: Carrier | None = None

    def tell(self, flow_id: UUID) -> None:
        """Says which flow it is."""


class Span:
    """What runs now."""

    def came_to(self, outcome: str, error: str | None = None) -> None:
        """Says how it went; ``error`` is the type of what it failed with."""


_STARTING, _SPAN = Starting(), Span()


class Spans:
    """Traces nothing."""

    def starting(
        self, definition: str, *, origin: Carrier | None = None, apart: bool = False
    ) -> AbstractContextManager[Starting]:
        """Around the start of a flow. ``origin``: the trace of a flow that it goes back to; ``apart``: it gets a trace
        of its own, which links to this one."""
        return nullcontext(_STARTING)

    def received(self, request: Any) -> AbstractContextManager[object]:
        """Around what a Celery request asks for: in the trace that its message came with, if none is current here."""
        return nullcontext()

    def carrier(self) -> Carrier | None:
        """The trace context here, for a child flow."""
        return None

    def run(self, runtime: Runtime, claim: DriveClaim) -> AbstractContextManager[Span]:
        """Around what a driver does under one claim."""
        return nullcontext(_SPAN)

    def inline_step(self, names: Mapping[str, Any], code: str) -> AbstractContextManager[Span]:
        """Around an attempt of a step that runs in its driver's process."""
        return nullcontext(_SPAN)

    def celery_step(self, runtime: Runtime, claim: StepClaim, names: Mapping[str, Any]) -> AbstractContextManager[Span]:
        """Around an attempt of a Celery step."""
        return nullcontext(_SPAN)

    def publishing(self) -> AbstractContextManager[object]:
        """Around the sending of messages: whatever a sender's instrumentation leaves current is current no more."""
        return nullcontext()
