"""Waits as steps: a timer, or an external event. None of them holds a worker."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

from celery_flows.store import FlowStep, FlowStepStatus, InvalidData
from celery_flows.store.changes import StepWrite
from celery_flows.store.validation import MAX_NAME_CHARS
from celery_flows.store.waits import ExternalEventWait, TimerWait
from celery_flows.tasks.errors import HistoryMismatch, WaitTimedOut
from celery_flows.tasks.replay import Place, Replay

WAIT_TIMED_OUT = WaitTimedOut.__name__


def sleep(replay: Replay, until: Callable[[], datetime]) -> None:
    """Waits until a time that is asked for once, and recorded."""
    place = replay.place("sleep")
    known, driver = replay.find(place, waits=True), replay.driver
    if known is not None and known.status.is_terminal:
        replay.outcome(known, None)
        return
    replay.begin()
    at = until() if known is None else datetime.fromisoformat(known.args_json["at"])
    if known is None:
        driver.check_horizon(at)
    step = _wait_step(place, replay.taken_with(place, at=at.isoformat()), known)
    if driver.now() >= at:
        driver.record(_closed(step, FlowStepStatus.SUCCEEDED), current_step="sleep")
    else:
        replay.refuse_in_cleanup("sleep")
        replay.tell_once(lambda: driver.wait(TimerWait(at=at, run_id=place.run_id), step))


def name_of_wait(topic: str) -> str:
    """What the step is called that waits for an event of this topic: as much of it as a name may be long."""
    return f"wait_for {topic}"[:MAX_NAME_CHARS]


def wait_for(replay: Replay, name: str, topic: str, correlation_id: str, timeout: timedelta | None) -> Any:
    """Waits for an external event, and gives its payload.

    Raises:
        WaitTimedOut: it did not come in time.
    """
    place = replay.place(name)
    known = replay.find(place, waits=True)
    if known is not None:
        _check_is_same(replay, place, known, correlation_id)
    if known is None or not known.status.is_terminal:
        replay.begin()
        wait = _external_wait(replay, topic, correlation_id, timeout, place.run_id, known)
        told = wait.model_dump(mode="json", exclude={"kind", "run_id"})
        step = _wait_step(place, replay.taken_with(place, **told), known)
        replay.refuse_in_cleanup(name)
        known = replay.tell_once(lambda: replay.driver.wait_for_event(wait, step))
    if known.status is FlowStepStatus.FAILED and (known.error_json or {}).get("type") == WAIT_TIMED_OUT:
        raise WaitTimedOut(topic, correlation_id)
    return replay.outcome(known, None)


def _check_is_same(replay: Replay, place: Place, known: FlowStep, correlation_id: str) -> None:
    """Refuses a wait that history has with another correlation id: it would wait for what nobody sends, or has taken
    another's event for its own. A wait that was taken over from another flow may have had that one's id, and is over.
    """
    is_taken_over = replay.driver.flow.forked_from is not None and known.status.is_terminal
    if known.args_json.get("correlation_id", correlation_id) != correlation_id and not is_taken_over:
        found = f"{place.shown} with another correlation id"
        replay.driver.refuse_history(HistoryMismatch(known.task, found, place.position))


def after(replay: Replay, argument: str, duration: timedelta) -> datetime:
    """The time when this has passed.

    Raises:
        InvalidData: naming the argument: it is no timedelta, or time does not go so far.
    """
    if not isinstance(duration, timedelta):
        raise InvalidData(argument, "must be a timedelta")
    try:
        return replay.driver.now() + duration
    except OverflowError:
        raise InvalidData(argument, "goes past the year 9999") from None


def _external_wait(
    replay: Replay, topic: str, correlation_id: str, timeout: timedelta | None, run_id: str, known: FlowStep | None
) -> ExternalEventWait:
    if known is not None:
        timeout_at = known.args_json.get("timeout_at")
    else:
        timeout_at = None if timeout is None else after(replay, "timeout", timeout)
        if timeout_at is not None:
            replay.driver.check_horizon(timeout_at)
    return ExternalEventWait(topic=topic, correlation_id=correlation_id, timeout_at=timeout_at, run_id=run_id)


def _wait_step(place: Place, args: str | None, known: FlowStep | None) -> StepWrite:
    # A wait that is taken up again tells of the row that is there: same id, same position.
    same = {"position": place.position} if known is None else {"position": known.position, "id": known.id}
    return StepWrite(place.run_id, place.name, FlowStepStatus.RUNNING, args=args, **same)


def _closed(step: StepWrite, status: FlowStepStatus) -> StepWrite:
    return StepWrite(step.run_id, step.task, status, step.position, args=step.args, id=step.id)
