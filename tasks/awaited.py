"""What a gather may wait for besides work: an external event, a decision, a time. Each is a small flow of its own, a
child of the one that waits, so any number of them can be waited for beside Celery tasks and other flows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, TypeAlias
from uuid import UUID, uuid5

from celery_flows.store import FlowNotFound, FlowStatus
from celery_flows.store.clock import as_utc
from celery_flows.store.validation import check_name
from celery_flows.tasks.approval import Approval, approval_key, check_approval
from celery_flows.tasks.children import ChildFlow
from celery_flows.tasks.emit import emit
from celery_flows.tasks.options import check_duration
from celery_flows.tasks.payloads import ANY, Codec, codec_for

if TYPE_CHECKING:
    from celery_flows.tasks.driver import Driver
    from celery_flows.tasks.runtime import Runtime

EVENT, TIMER = "flows.event", "flows.timer"  # the definitions of these flows


@dataclass(frozen=True, slots=True)
class Event:
    """An external event, as ``run.wait_for(topic, correlation_id)`` waits for; its payload is the result.

    Raises:
        InvalidData: topic or correlation id is empty or too long.
    """

    topic: str
    correlation_id: str

    def __post_init__(self) -> None:
        check_name("topic", self.topic)
        check_name("correlation_id", self.correlation_id)


@dataclass(frozen=True, slots=True)
class Decision:
    """What somebody decides, as ``run.approval(name)`` asks for; the result is an :class:`Approval`.

    Raises:
        InvalidData: the name is empty or too long.
    """

    name: str

    def __post_init__(self) -> None:
        check_approval(self.name)


@dataclass(frozen=True, slots=True)
class Timer:
    """A time: so long after it is first come to, or an aware datetime. Its result is None.

    Raises:
        InvalidData: it is neither.
    """

    until: timedelta | datetime

    def __post_init__(self) -> None:
        if isinstance(self.until, datetime):
            as_utc("timer", self.until)
        else:
            check_duration("timer", self.until)


Awaited: TypeAlias = Event | Decision | Timer


def awaited_name(awaited: Awaited) -> str:
    """The name it goes by as a step, which is its flow's."""
    return TIMER if isinstance(awaited, Timer) else EVENT


def awaited_codec(awaited: Awaited) -> Codec:
    """How its result is read back."""
    return codec_for(Approval) if isinstance(awaited, Decision) else ANY


def awaiting(driver: Driver, awaited: Awaited) -> ChildFlow[Any]:
    """The flow that waits for it.

    Raises:
        InvalidData: the timer is past ``flow_timer_horizon_days``.
    """
    registry = driver.runtime.registry
    if isinstance(awaited, Timer):
        at = awaited.until if isinstance(awaited.until, datetime) else driver.now() + awaited.until
        driver.check_horizon(at)
        return ChildFlow(registry.require(TIMER), at)
    topic, correlation_id = (
        approval_key(driver.flow.id, awaited.name)
        if isinstance(awaited, Decision)
        else (awaited.topic, awaited.correlation_id)
    )
    return ChildFlow(registry.require(EVENT), {"topic": topic, "correlation_id": correlation_id})


def give_back(runtime: Runtime, flow_ids: Iterable[UUID]) -> None:
    """Emits anew the events that these flows have waited for, and got, in vain; the same again changes nothing. Flows
    that are yet to be cancelled do so themselves."""
    for flow_id in flow_ids:
        try:
            flow = runtime.manager.get(flow_id)
        except FlowNotFound:
            continue
        if flow.controller_id == EVENT and flow.status is FlowStatus.FINISHED:
            emit_again(runtime, flow_id, flow.input_json, flow.result_json)


def emit_again(runtime: Runtime, flow_id: UUID, wanted: dict[str, str], payload: Any) -> None:
    """Emits the event that this flow got; once, however often it is called."""
    emit(runtime, wanted["topic"], wanted["correlation_id"], payload, None, event_id=uuid5(flow_id, "given back"))
