"""The watch over flows at work: what is bound for their log lines, timed, counted and traced. One place for all four.

Without metrics and tracing it binds names, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING

from celery_flows.store import InvalidData
from celery_flows.store.clock import boottime
from celery_flows.tasks import metrics
from celery_flows.tasks.bound import binding
from celery_flows.tasks.errors import StepFailed
from celery_flows.tasks.metrics import Meter
from celery_flows.tasks.spans import Span, Spans

if TYPE_CHECKING:
    from celery_flows.store.dispatch import StepClaim
    from celery_flows.tasks.claimed import Claimed
    from celery_flows.tasks.replay import Place
    from celery_flows.tasks.runtime import Runtime

OUTCOMES = ("succeeded", "failed", "retried", "cancelled")  # of an attempt; of one that was cut off there is none


class Attempt:
    """An attempt of a step; whoever makes it says what it came to."""

    def __init__(self, definition: str, step: str) -> None:
        self.labels = definition, step
        self.outcome: str | None = None  # one of OUTCOMES
        self.error: str | None = None  # the type of what it failed with

    def came_to(self, outcome: str, error: str | None = None) -> None:
        """Says how it went."""
        self.outcome, self.error = outcome, error


class Watch:
    """One per application. ``meter`` is put in its place before a worker's processes are forked."""

    def __init__(self, is_tracing: Callable[[], bool] = lambda: False) -> None:
        self.meter = Meter()
        self._is_tracing = is_tracing

    @cached_property
    def spans(self) -> Spans:
        """What makes spans.

        Raises:
            InvalidData: ``flow_tracing`` is on, and OpenTelemetry is not installed; or a setting is bad.
        """
        if not self._is_tracing():
            return Spans()
        try:
            from celery_flows.tasks.tracing import Tracing
        except ImportError:
            told = "is on, and OpenTelemetry is not installed: pip install 'celery-flows[tracing]'"
            raise InvalidData("flow_tracing", told) from None
        return Tracing()

    @contextmanager
    def run(self, driver: Claimed) -> Iterator[None]:
        """Around what a driver does under one claim."""
        claim, flow = driver.claim, driver.flow
        labels = (flow.controller_id,)
        if claim.began:
            self.meter.add(metrics.FLOWS_BEGUN, labels)
        began = boottime()
        with binding(flow=flow.controller_id, flow_id=str(flow.id)), self.spans.run(driver.runtime, claim) as span:
            driver.span = span
            try:
                yield
            finally:
                self.meter.observe(metrics.RUN_SECONDS, boottime() - began, labels)

    def ended(self, definition: str, status: str, span: Span | None = None, error: str | None = None) -> None:
        """A worker wrote the end of a flow."""
        self.meter.add(metrics.FLOWS_ENDED, (definition, status))
        if span is not None:
            span.came_to(status, error)

    @contextmanager
    def inline_step(self, driver: Claimed, place: Place, code: str, attempt: int) -> Iterator[Attempt]:
        """Around an attempt of a step in its driver's process. ``code`` is its function's name, by which it is counted:
        what a step is called may be made up as the flow goes."""
        names = {"step": place.name, "run_id": place.run_id, "attempt": attempt}
        made = Attempt(driver.flow.controller_id, code)
        told = {**names, "flow_id": str(driver.flow.id)}
        with binding(**names), self.spans.inline_step(told, code) as span, self._timed(made, span):
            yield made

    @contextmanager
    def celery_step(self, runtime: Runtime, claim: StepClaim) -> Iterator[Attempt]:
        """Around an attempt of a Celery step."""
        names = {
            "flow": claim.definition, "flow_id": str(claim.flow_id), "step": claim.task,
            "run_id": claim.holder.run_id, "attempt": claim.attempt,
        }  # fmt: skip
        made = Attempt(claim.definition, claim.task)
        with binding(**names), self.spans.celery_step(runtime, claim, names) as span, self._timed(made, span):
            yield made

    @contextmanager
    def _timed(self, made: Attempt, span: Span) -> Iterator[None]:
        began = boottime()
        try:
            yield
        except StepFailed as failed:
            made.came_to("failed", failed.type)
            raise
        finally:
            if made.outcome is not None:
                self.settled(made)
                self.meter.observe(metrics.STEP_SECONDS, boottime() - began, made.labels)
                span.came_to(made.outcome, made.error)

    def settled(self, made: Attempt) -> None:
        """Counts what an attempt came to; of one whose process was ended nobody knows how long it took."""
        assert made.outcome is not None
        self.meter.add(metrics.STEPS, (*made.labels, made.outcome))
