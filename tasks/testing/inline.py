"""A flow function as a plain function: its steps are called where they stand, and nothing is stored."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any, TypeVar

from celery import Signature, Task

from celery_flows.store.clock import as_utc
from celery_flows.store.models import new_id
from celery_flows.store.validation import MAX_PAYLOAD_BYTES
from celery_flows.tasks.children import ChildFlow
from celery_flows.tasks.errors import StepFailed, WaitTimedOut
from celery_flows.tasks.members import AnyMember, member_name
from celery_flows.tasks.payloads import Codec, describe, read_back, result_codec
from celery_flows.tasks.registry import FlowDefinition
from celery_flows.tasks.run import Run, step_name
from celery_flows.tasks.testing.stuck import Stuck

In = TypeVar("In")
Out = TypeVar("Out")


class NotInline(AttributeError):
    """The flow function asked for something that needs a store."""


def run_inline(
    definition: FlowDefinition[In, Out],
    input: In | None = None,
    *,
    steps: Mapping[str, Callable[..., Any]] | None = None,
    events: Mapping[str, Any] | None = None,
) -> Out:
    """Calls the flow function once, its steps and child flows in place, and gives its result. Sleeps take no time.

    For the logic of a flow alone. What it cannot show: replay from the top, crashes, cancelling, retries, time, steps
    side by side. Input and results go through JSON as ever.

    Args:
        steps: functions to call in the place of steps and child flows of these names.
        events: payloads by topic, for ``wait_for``.

    Raises:
        Stuck: it waits, without a timeout, for an event that is not among ``events``.
        NotInline: it uses a part of :class:`Run` that needs a store.
        Exception: whatever the function raises.
    """
    arguments = [_through_json(definition.input, "input", input)] if definition.takes_input else []
    result: Out = definition.function(InlineRun(steps or {}, events or {}), *arguments)
    return _through_json(definition.output, "result", result)  # type: ignore[no-any-return]


class InlineRun(Run):
    """The run of a flow that is nowhere stored."""

    def __init__(self, steps: Mapping[str, Callable[..., Any]], events: Mapping[str, Any]) -> None:
        self._steps, self._events = steps, events
        self.flow_id = new_id()
        self.owner = "default"
        self.logger = logging.LoggerAdapter(logging.getLogger("celery_flows.run"), {"flow_id": str(self.flow_id)})

    def __getattr__(self, name: str) -> Any:
        raise NotInline(
            f"run_inline has no store (nor {name}): a flow can step, gather, run flows, sleep and wait_for in it; "
            "for anything else there is flow_app"
        )

    def step(self, work: Any, /, *args: Any, **kwargs: Any) -> Any:
        if isinstance(work, Signature):
            return self.gather([work])[0]
        if isinstance(work, Task):
            return self.gather([work.s(*args, **kwargs)])[0]
        return self._call(step_name(work), work, result_codec(work), args, kwargs)

    def gather(self, members: Iterable[AnyMember]) -> list[Any]:
        results: list[Any] = []
        failures: list[StepFailed] = []
        for member in members:
            try:
                results.append(self._member(member))
            except StepFailed as failure:
                failures.append(failure)
        if failures:
            raise failures[0]
        return results

    def flow(self, definition: FlowDefinition[In, Out], input: In | None = None, /) -> Out:
        return self.gather([definition.s(input)])[0]  # type: ignore[no-any-return]

    def sleep(self, duration: timedelta) -> None:
        """Takes no time."""

    def sleep_until(self, at: datetime) -> None:
        as_utc("at", at)

    def wait_for(self, topic: str, correlation_id: str, *, timeout: timedelta | None = None) -> Any:
        if topic in self._events:
            return self._events[topic]
        if timeout is not None:
            raise WaitTimedOut(topic, correlation_id)
        raise Stuck(f"the flow waits for the event {topic!r}: give run_inline its payload, events={{{topic!r}: …}}")

    def _member(self, member: AnyMember) -> Any:
        name = member_name(member)
        if isinstance(member, ChildFlow):
            return self._call(name, self._child, member.definition.output, (member,), {})
        task: Any = member.type
        return self._call(name, task, result_codec(task.run), tuple(member.args), dict(member.kwargs))

    def _child(self, child: ChildFlow[Any]) -> Any:
        return run_inline(child.definition, child.input, steps=self._steps, events=self._events)

    def _call(
        self, name: str, work: Callable[..., Any], codec: Codec, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if name in self._steps:
            work = self._steps[name]
            args = (args[0].input,) if args and isinstance(args[0], ChildFlow) else args
        try:
            return _through_json(codec, f"result of step {name}", work(*args, **kwargs))
        except Exception as error:
            raise StepFailed(name, **describe(error)) from error


def _through_json(codec: Codec, field: str, value: Any) -> Any:
    return codec.decode(field, read_back(codec.encode(field, value, MAX_PAYLOAD_BYTES)))
