"""Run: what a flow function is handed. Each of its methods is a recorded step."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, overload
from uuid import UUID, uuid5

from celery import Signature, Task

from celery_flows.store import FlowStep, FlowStepStatus, InvalidData
from celery_flows.store.changes import StepWrite
from celery_flows.store.clock import as_utc
from celery_flows.store.validation import check_name
from celery_flows.store.waits import ExternalEventWait, TimerWait
from celery_flows.tasks.children import ChildFlow, child_member
from celery_flows.tasks.errors import FlowCancelled, StepFailed, StepLost, WaitTimedOut
from celery_flows.tasks.members import AnyMember, codec_of, member_name, member_of
from celery_flows.tasks.payloads import Codec, describe, read_back, result_codec

if TYPE_CHECKING:
    from celery_flows.tasks.drive import Driver
    from celery_flows.tasks.registry import FlowDefinition

P = ParamSpec("P")
T = TypeVar("T")
In = TypeVar("In")
Out = TypeVar("Out")

WAIT_TIMED_OUT = WaitTimedOut.__name__


class Suspended(BaseException):
    """Unwinds a flow function that waits or lost its lease; another claim goes on. Not an Exception, so that the
    function's own ``except Exception`` lets it pass."""


class Run:
    """The flow's own view of itself.

    Between steps a flow function may run again from the top, after a wait or a crash: recorded results are read back,
    and the first step without one is where it goes on. So it must not act outside steps, and must come to the same
    steps in the same order when their results are the same.
    """

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._calls: dict[str, int] = {}
        self._position = 0
        self._cleaning = False  # the flow is cancelled and has been told
        self._inside: str | None = None  # the step that is running now
        self.flow_id: UUID = driver.flow.id
        self.owner: str = driver.flow.owner_session_key
        self.logger = logging.LoggerAdapter(logging.getLogger("celery_flows.run"), {"flow_id": str(self.flow_id)})

    # ---- steps ----

    @overload
    def step(self, work: Signature[T], /) -> T: ...
    @overload
    def step(self, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T: ...
    def step(self, work: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Does a unit of work once and records its result; when replayed, reads it back.

        A plain callable runs here. A Celery task or signature runs as a Celery task of its own, on its own queue, while
        this worker does something else.

        Raises:
            StepFailed: it failed for good, now or in the run that is replayed.
            InvalidData: arguments or result cannot be JSON.
        """
        if isinstance(work, Task | Signature):
            return self.gather([work.s(*args, **kwargs) if isinstance(work, Task) else work])[0]
        return self._inline(work, args, kwargs)

    def flow(self, definition: FlowDefinition[In, Out], input: In | None = None, /) -> Out:
        """Runs another flow as a step of this one, with this one's owner, and gives its result. If this flow is
        cancelled, so is that one, before this one cleans up.

        Raises:
            StepFailed: it failed or was cancelled.
            InvalidData: the input is not what it takes, or cannot be JSON.
        """
        return self.gather([definition.s(input)])[0]

    @overload
    def gather(self, members: Iterable[Signature[T] | ChildFlow[T]]) -> list[T]: ...
    @overload
    def gather(self, members: Iterable[AnyMember]) -> list[Any]: ...
    def gather(self, members: Iterable[AnyMember]) -> list[Any]:
        """Runs Celery signatures (``task.s(…)``) and flows (``definition.s(input)``) side by side, each a step, and
        gives their results in order when all have succeeded.

        Raises:
            StepFailed: the first of them, in order, that failed for good.
            InvalidData: arguments cannot be JSON; none was scheduled.
        """
        signatures = list(members)
        identities = [self._identify(member_name(signature)) for signature in signatures]
        known = [self._driver.history.get(run_id) for run_id, _ in identities]
        if any(step is not None and step.status is FlowStepStatus.FAILED for step in known):
            self._outcome(self._first_failure([run_id for run_id, _ in identities]), None)
        if any(step is None or not step.status.is_terminal for step in known):
            self._join(list(zip(identities, signatures, known, strict=True)))
        return [
            self._outcome(step, codec_of(self._driver.app, signature))
            for step, signature in zip(known, signatures, strict=True)
        ]

    def _first_failure(self, run_ids: list[str]) -> FlowStep:
        """Of a join that has failed, the first member that did, once all are closed: what handles the failure must not
        run beside members, and which failure is told must not depend on when it is asked."""
        history = self._driver.history
        if any(run_id in history and not history[run_id].status.is_terminal for run_id in run_ids):
            self._driver.settle_members()
            history = self._driver.history
        members = [history[run_id] for run_id in run_ids if run_id in history]
        failed = [step for step in members if step.status is FlowStepStatus.FAILED]
        # Children that were cancelled because of the failure are not the failure.
        of_themselves = (step for step in failed if (step.error_json or {}).get("type") != FlowCancelled.__name__)
        return next(of_themselves, failed[0])

    def _join(self, steps: list[tuple[tuple[str, int], AnyMember, FlowStep | None]]) -> None:
        """Schedules the members that are not, and suspends the flow until all have succeeded or one has failed."""
        missing = [(identity, signature) for identity, signature, step in steps if step is None]
        if missing:
            self._new_step()
        limit, cleanup = self._driver.max_payload_bytes, self._cleaning
        members = [
            child_member(self._driver.flow, run_id, position, signature, cleanup=cleanup)
            if isinstance(signature, ChildFlow)
            else member_of(self._driver.app, run_id, position, signature, limit, cleanup=cleanup)
            for (run_id, position), signature in missing
        ]
        succeeded = sum(step is not None and step.status is FlowStepStatus.SUCCEEDED for _, _, step in steps)
        self._tell_once(lambda: self._driver.join(members, good=len(steps) - succeeded, bad=0, cleanup=cleanup))

    def _inline(self, work: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = step_name(work)
        run_id, position = self._identify(name)
        codec = result_codec(work)
        if (known := self._driver.history.get(run_id)) is not None:
            return self._outcome(known, codec)
        self._new_step()
        self._driver.check_lease()
        self._driver.runtime.before_body(name)
        began, self._inside = self._driver.clock(), name
        try:
            value = work(*args, **kwargs)
            self._inside = None
            result = codec.encode(f"result of step {name}", value, self._driver.max_payload_bytes)
        except Exception as error:
            self._inside = None
            self._record(run_id, name, FlowStepStatus.FAILED, position, began, error=describe(error))
            raise StepFailed(name, **describe(error)) from error
        except BaseException as error:  # it ends more than the step: whatever the flow does about it, nothing follows
            self._driver.interrupt(error)
            raise
        self._record(run_id, name, FlowStepStatus.SUCCEEDED, position, began, result=result)
        return codec.decode(f"result of step {name}", read_back(result))

    def _record(
        self, run_id: str, name: str, status: FlowStepStatus, position: int, began: float, **outcome: Any
    ) -> None:
        elapsed_us = int((self._driver.clock() - began) * 1_000_000)
        step = StepWrite(run_id, name, status, position, elapsed_us=elapsed_us, **outcome)
        self._driver.record(step, current_step=name)

    # ---- waits ----

    def sleep(self, duration: timedelta) -> None:
        """Waits without a worker, for seconds or months, by the database's clock."""
        self._sleep(lambda: self._driver.now() + duration)

    def sleep_until(self, at: datetime) -> None:
        """Waits without a worker until an aware time; a time that has passed is no wait.

        Raises:
            InvalidData: the time is naive.
        """
        moment = as_utc("at", at)
        self._sleep(lambda: moment)

    def _sleep(self, until: Callable[[], datetime]) -> None:
        run_id, position = self._identify("sleep")
        known = self._driver.history.get(run_id)
        if known is not None and known.status.is_terminal:
            self._outcome(known, None)
            return
        self._new_step()
        at = until() if known is None else datetime.fromisoformat(known.args_json["at"])
        if known is None:
            self._driver.check_horizon(at)
        step = self._wait_step(run_id, "sleep", position, {"at": at.isoformat()}, known)
        if self._driver.now() >= at:
            self._driver.record(_closed(step, FlowStepStatus.SUCCEEDED), current_step="sleep")
        else:
            self._refuse_in_cleanup("sleep")
            self._tell_once(lambda: self._driver.wait(TimerWait(at=at, run_id=run_id), step))

    def wait_for(self, topic: str, correlation_id: str, *, timeout: timedelta | None = None) -> Any:
        """Waits without a worker for an external event, and gives its payload. One that came before is taken at once;
        several are handed over first in, first out.

        Raises:
            WaitTimedOut: it did not come in time.
            InvalidData: topic or correlation id is empty or too long.
        """
        check_name("topic", topic)
        check_name("correlation_id", correlation_id)
        name = f"wait_for {topic}"
        run_id, position = self._identify(name)
        known = self._driver.history.get(run_id)
        if known is None or not known.status.is_terminal:
            self._new_step()
            wait = self._external_wait(topic, correlation_id, timeout, run_id, known)
            args = wait.model_dump(mode="json", exclude={"kind", "run_id"})
            step = self._wait_step(run_id, name, position, args, known)
            self._refuse_in_cleanup(name)
            known = self._tell_once(lambda: self._driver.wait_for_event(wait, step))
        if known.status is FlowStepStatus.FAILED and (known.error_json or {}).get("type") == WAIT_TIMED_OUT:
            raise WaitTimedOut(topic, correlation_id)
        return self._outcome(known, None)

    def _tell_once(self, go_on: Callable[[], T]) -> T:
        """Goes on; a cancel that comes in the moment before tells the flow too, so what follows is cleanup."""
        try:
            return go_on()
        except FlowCancelled:
            self._cleaning = True
            raise

    def _refuse_in_cleanup(self, name: str) -> None:
        if self._cleaning:
            raise InvalidData(f"step {name}", "cannot wait: the flow is cancelled and cleans up")

    def _external_wait(
        self, topic: str, correlation_id: str, timeout: timedelta | None, run_id: str, known: FlowStep | None
    ) -> ExternalEventWait:
        if known is not None:
            timeout_at = known.args_json.get("timeout_at")
        else:
            timeout_at = None if timeout is None else self._driver.now() + timeout
            if timeout_at is not None:
                self._driver.check_horizon(timeout_at)
        return ExternalEventWait(topic=topic, correlation_id=correlation_id, timeout_at=timeout_at, run_id=run_id)

    def _wait_step(
        self, run_id: str, name: str, position: int, args: dict[str, Any], known: FlowStep | None
    ) -> StepWrite:
        # A wait that is taken up again tells of the row that is there: same id, same position.
        same = {"position": position} if known is None else {"position": known.position, "id": known.id}
        return StepWrite(run_id, name, FlowStepStatus.RUNNING, args=json.dumps(args), **same)

    # ---- identity and outcome ----

    def _identify(self, name: str) -> tuple[str, int]:
        """A step's run id, from its name and how many times that came before, and its position in the flow."""
        if self._inside is not None:
            raise InvalidData(f"step {name}", f"was taken inside step {self._inside}; steps do not nest")
        count = self._calls[name] = self._calls.get(name, 0) + 1
        self._position += 1
        return run_id_of(self.flow_id, name, count), self._position

    def _new_step(self) -> None:
        """Called before anything new happens, or a wait is taken up again: here a cancelled flow is told so, once."""
        if self._driver.must_stop(cleaning=self._cleaning):
            self._cleaning = True
            raise FlowCancelled(self.flow_id)

    def _outcome(self, step: FlowStep | None, codec: Codec | None) -> Any:
        assert step is not None
        if step.status is FlowStepStatus.SUCCEEDED:
            return step.result_json if codec is None else codec.decode(f"result of step {step.task}", step.result_json)
        if step.status is FlowStepStatus.CANCELLED:
            self._cleaning = True
            raise FlowCancelled(self.flow_id)
        error = step.error_json or {"type": "unknown", "message": ""}
        failure = StepLost if error["type"] == StepLost.__name__ else StepFailed
        raise failure(step.task, error["type"], error["message"])


def _closed(step: StepWrite, status: FlowStepStatus) -> StepWrite:
    return StepWrite(step.run_id, step.task, status, step.position, args=step.args, id=step.id)


def run_id_of(flow_id: UUID, name: str, count: int) -> str:
    """The run id of the ``count``-th step of this name: the same in every run of this flow."""
    return str(uuid5(flow_id, f"{name}#{count}"))


def step_name(work: Callable[..., Any]) -> str:
    """The name an inline step goes by: its function's."""
    inner = getattr(work, "func", work)  # functools.partial
    name = getattr(inner, "__name__", type(inner).__name__)
    return check_name("step", name)
