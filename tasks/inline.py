"""Inline steps: functions that run in the driver's process, attempt by attempt, and are recorded."""

from __future__ import annotations

import json
from asyncio import CancelledError
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from celery_flows.store import FlowStep, FlowStepStatus
from celery_flows.store.changes import StepWrite
from celery_flows.store.models import new_id
from celery_flows.store.validation import check_name
from celery_flows.tasks.errors import StepTimedOut
from celery_flows.tasks.failures import failure_of, of_attempt
from celery_flows.tasks.interrupts import Interrupted
from celery_flows.tasks.loop import call, is_async, is_cancelled
from celery_flows.tasks.options import StepOptions, options_of
from celery_flows.tasks.payloads import read_back, result_codec
from celery_flows.tasks.replay import Place, Replay, Suspended
from celery_flows.tasks.retry import NEVER
from celery_flows.tasks.timeout import TimeIsUp

if TYPE_CHECKING:
    from celery_flows.tasks.driver import Driver

RETRY_AT = "retry_at"  # in the error of the last attempt: when the next one may begin


def run_inline(
    replay: Replay, options: StepOptions, work: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Runs a function as a step, or reads back what it came to.

    Raises:
        StepFailed: it failed for good.
    """
    return InlineStep(replay, options, work, args, kwargs).result()


class InlineStep:
    """A function as a step, whose place in its flow is taken."""

    def __init__(
        self,
        replay: Replay,
        options: StepOptions,
        work: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self._replay, self._driver = replay, replay.driver
        self._options = options.over(options_of(work)).over(replay.driver.defaults)
        self._work, self._args, self._kwargs = work, args, kwargs
        self._codec = result_codec(work)
        self.is_async = is_async(work)
        self.place = replay.place(self._options.name or step_name(work), self._options.key)
        self._what = f"result of step {self.place.name}"

    def result(self) -> Any:
        """Runs it until it is recorded, or reads back what it came to.

        Raises:
            StepFailed: it failed for good.
        """
        known = self.known()
        if known is not None and known.status.is_terminal:
            return self.outcome(known)
        attempts = self.attempts(known)
        return self.read(attempts.until_done(attempts.recording(self.body)))

    def known(self) -> FlowStep | None:
        """What history has of it."""
        return self._replay.find(self.place)

    def outcome(self, known: FlowStep) -> Any:
        """What a closed one came to: its result, or what it raised."""
        return self._replay.outcome(known, self._codec)

    def read(self, result: str) -> Any:
        """The result, as it was recorded."""
        return self._codec.decode(self._what, read_back(result))

    def attempts(self, known: FlowStep | None) -> Attempts:
        """Those that are left."""
        return Attempts(self._replay, self.place, self._options, known, code_name(self._work))

    def body(self) -> str:
        """Calls the function; its result as JSON text."""
        with self._replay.inside(self.place.name, self._work):
            bounds = self._options.seconds, self._replay.interruptible()
            value = call(self._driver.loop, self._work, self._args, self._kwargs, *bounds)
        return self._codec.encode(self._what, value, self._driver.max_payload_bytes)


@dataclass(frozen=True, slots=True)
class Again:
    """An attempt failed, which ``step`` is to tell, and the next may begin ``pause`` seconds later."""

    step: StepWrite
    pause: float


class Attempts:
    """The attempts of one inline step under this claim."""

    def __init__(self, replay: Replay, place: Place, options: StepOptions, known: FlowStep | None, code: str) -> None:
        self._replay, self._place, self._known, self._code = replay, place, known, code
        self._driver: Driver = replay.driver
        self._rule = NEVER if options.retry is None else options.retry.rule()
        self._timeout = options.seconds
        self._id = new_id() if known is None else known.id
        self._args = replay.taken_with(place) if known is None else known.args_json and json.dumps(known.args_json)
        self.attempt = 1 if known is None else known.attempt

    def recording(self, body: Callable[[], str]) -> Callable[[float], str]:
        """An attempt that records what ``body`` gives, which is JSON text."""
        return lambda began: self._record(body(), began)

    def until_done(self, attempt: Callable[[float], str]) -> str:
        """Makes attempts until one, which records its own result, succeeds; records the failures.

        Raises:
            StepFailed: the last one failed.
        """
        if self._known is not None and (at := retry_at(self._known)) is not None:
            self._replay.begin()
            self._driver.wait_until(at)
        while True:
            self._replay.begin()
            outcome = self.once(attempt)
            if isinstance(outcome, str):
                return outcome
            if outcome is not None:
                self._driver.retry(outcome.step, outcome.pause)

    def once(self, attempt: Callable[[float], str]) -> str | Again | None:
        """Makes one attempt, which records its own result. That it is to be made again is for the caller to record.
        None: it was interrupted, and has come to nothing; either the flow is told why, or it is made again.

        Raises:
            StepFailed: it failed, was the last one, and that is recorded.
            CancelledError: the step's task was cancelled; nothing is recorded.
        """
        with self._driver.runtime.watch.inline_step(self._driver, self._place, self._code, self.attempt) as made:
            outcome = self._once(attempt)
            if isinstance(outcome, str):
                made.came_to("succeeded")
            elif outcome is not None:
                made.came_to("retried", (outcome.step.error or {}).get("type"))
            return outcome

    def _once(self, attempt: Callable[[float], str]) -> str | Again | None:
        self._driver.check_lease()
        began = self._driver.clock()
        try:
            return attempt(began)
        except Suspended:
            raise
        except Interrupted:
            self._driver.look_for_cause()
            return None
        except CancelledError as cancelled:
            if is_cancelled():
                raise
            return self._failed(cancelled, began)
        except (Exception, TimeIsUp) as raised:
            return self._failed(raised, began)
        except BaseException as error:  # it ends more than the step: whatever the flow does about it, nothing follows
            self._driver.interrupt(error)
            raise

    def _record(self, result: str, began: float) -> str:
        self._driver.record(self.written(FlowStepStatus.SUCCEEDED, began, result=result), current_step=self._place.name)
        return result

    def _failed(self, raised: BaseException, began: float) -> Again:
        if isinstance(raised, TimeIsUp):
            raised = timed_out(self._place.name, self._timeout)
        error = of_attempt(raised)
        pause = self._rule.pause_after(self.attempt, raised)
        if pause is None:
            failed = self.written(FlowStepStatus.FAILED, began, error=error)
            self._driver.record(failed, current_step=self._place.name)
            raise failure_of(self._place.name, error) from raised
        self.attempt += 1
        return Again(self.written(FlowStepStatus.PENDING, began, error=error), pause)

    def written(self, status: FlowStepStatus, began: float, **outcome: Any) -> StepWrite:
        """The step's row after an attempt that began at ``began`` by the driver's clock."""
        return StepWrite(
            self._place.run_id,
            self._place.name,
            status,
            self._place.position,
            self.attempt,
            args=self._args,
            elapsed_us=int((self._driver.clock() - began) * 1_000_000),
            id=self._id,
            **outcome,
        )


def timed_out(step: str, seconds: float | None) -> StepTimedOut:
    """What an attempt failed with that took too long."""
    told = "took too long" if seconds is None else f"took longer than {seconds:g} s"
    return StepTimedOut(step, StepTimedOut.__name__, told)


def retry_at(step: FlowStep) -> datetime | None:
    """When the next attempt of a step that is tried again may begin."""
    text = (step.error_json or {}).get(RETRY_AT)
    return None if text is None else datetime.fromisoformat(text)


def step_name(work: Callable[..., Any]) -> str:
    """The name an inline step goes by: its function's."""
    return check_name("step", code_name(work))


def code_name(work: Callable[..., Any]) -> str:
    """A function's name in the code."""
    inner = getattr(work, "func", work)  # functools.partial
    name: str = getattr(inner, "__name__", type(inner).__name__)
    return name
