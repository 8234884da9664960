"""A flow function as a plain function: its steps are called where they stand, and nothing is stored."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from datetime import UTC, datetime
from typing import Any, NoReturn, TypeVar, cast

from celery import Celery
from pydantic_core import to_jsonable_python
from sqlalchemy import Connection

from celery_flows.store import Flow, FlowStep, FlowStepStatus
from celery_flows.store.changes import Join, Member, StepWrite
from celery_flows.store.waits import ExternalEventWait, TimerWait
from celery_flows.tasks.awaited import EVENT, TIMER
from celery_flows.tasks.call import call_flow
from celery_flows.tasks.driver import Driver
from celery_flows.tasks.errors import HistoryMismatch
from celery_flows.tasks.failures import of_attempt, of_flow
from celery_flows.tasks.interrupts import IN_PEACE, Interruptible
from celery_flows.tasks.loop import Loop, call
from celery_flows.tasks.payloads import result_codec
from celery_flows.tasks.registry import FlowDefinition, Registry
from celery_flows.tasks.replay import Place, Replay, Suspended
from celery_flows.tasks.run import Run
from celery_flows.tasks.runtime import Runtime
from celery_flows.tasks.settings import FlowSettings
from celery_flows.tasks.testing.replaced import asked_anew
from celery_flows.tasks.testing.stubs import Stubs
from celery_flows.tasks.testing.stuck import Stuck
from celery_flows.tasks.wait_steps import WAIT_TIMED_OUT
from celery_flows.tasks.watch import Watch

In = TypeVar("In")
Out = TypeVar("Out")


class NotInline(Exception):
    """The flow function asked for something that needs a store."""


class Refused(BaseException):
    """Carries an error out of the flow function, past its own ``except Exception``."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def run_inline(
    definition: FlowDefinition[In, Out],
    input: In | None = None,
    *,
    steps: Mapping[str, Callable[..., Any]] | None = None,
    events: Mapping[str, Any] | None = None,
) -> Out:
    """Calls the flow function, its steps, Celery's and child flows in place, and gives its result. Nothing is stored;
    waiting takes no time.

    For the logic of a flow alone. What it cannot show: crashes, cancelling, deadlines, steps side by side, and
    transactional steps, which are refused.

    Args:
        steps: functions to call in the place of Celery tasks and child flows of these names.
        events: payloads by topic, for ``run.wait_for``. A wait that has none times out.

    Raises:
        Stuck: it waits, without a timeout, for an event that is not among ``events``.
        NotInline: it does what needs a store.
        InvalidData: one of ``steps`` has no name of the application's, and was not called.
        Exception: whatever the function raises.
    """
    __tracebackhide__ = True
    try:
        with asked_anew(definition._runtime, "settings"):
            encoded = definition.encoded_input(input)
            stubs = Stubs(steps or {})
            result = InlineDriver(definition, encoded, stubs, events or {}).play()
            stubs.check(definition._runtime)
            return cast("Out", result)
    except Refused as refused:
        raise refused.error from None


class Storeless:
    """A runtime without what needs a server."""

    def __init__(self, runtime: Runtime) -> None:
        self.app: Celery = runtime.app
        self.registry: Registry = runtime.registry
        self.settings: FlowSettings = runtime.settings
        self.watch = Watch()

    def before_body(self, step: str, body: Callable[..., Any]) -> None:
        """Nobody is told."""

    def __getattr__(self, name: str) -> NoReturn:
        raise _needs_a_store(name)


class InlineDriver(Driver):
    """Drives a flow that is nowhere stored: what the function asks for is there the next time it is run."""

    def __init__(
        self,
        definition: FlowDefinition[Any, Any],
        input_json: Any,
        stubs: Stubs,
        events: Mapping[str, Any],
    ) -> None:
        self.runtime = cast("Runtime", Storeless(definition._runtime))
        self.app = self.runtime.app
        self.flow = Flow(controller_id=definition.name, owner_session_key="default", input_json=input_json)
        self.history = {}
        self.defaults = definition.defaults
        self.max_payload_bytes = self.runtime.settings.max_payload_bytes
        self._definition, self._stubs, self._events = definition, stubs, events
        self._kept: dict[str, FlowStep] = {}
        self._now = datetime.now(UTC)
        self.loop = Loop()
        self.lineage = (definition.name,)  # Python's own limit of recursion comes before ours

    def play(self) -> Any:
        """Runs the function until it does not ask for more."""
        with closing(self.loop):
            while True:
                self.history, self._by_position, self.is_cleaning = dict(self._kept), None, False
                with suppress(Suspended):
                    return self._once()

    def _once(self) -> Any:
        definition, replay = self._definition, Replay(self)
        run = Run(replay)
        try:
            result = call_flow(definition, replay, run)
        except Exception:
            run.clean_up()
            raise
        replay.finish()
        return definition.output.decode("result", result)

    # ---- what Run asks, where it is not as in a driver with a store ----

    def now(self) -> datetime:
        return self._now

    @property
    def join_group(self) -> int:
        return 0

    @property
    def queue(self) -> None:
        return None

    def check_stop(self) -> None: ...

    def may_go_on(self) -> bool:
        return True

    def has_to_tell(self) -> bool:
        return False

    def to_be_told(self) -> None:
        return None

    def settle_members(self) -> None:
        """They are closed."""

    def cancel_idle_members(self) -> None:
        """They are closed."""

    def interruptible(self) -> Interruptible:
        """Nobody interrupts."""
        return IN_PEACE

    def interrupt(self, error: BaseException) -> None:
        """It ends the test."""

    def check_lease(self) -> None:
        """There is none."""

    def refuse_history(self, mismatch: HistoryMismatch) -> NoReturn:
        raise Refused(mismatch)

    def record(self, step: StepWrite, *, current_step: str) -> None:
        self._keep(step)

    def retry(self, step: StepWrite, pause: float) -> None:
        self._keep(step)

    def note_retry(self, step: StepWrite, pause: float) -> datetime:
        self._keep(step)
        return self._now

    def update_state(self, place: Place, patch: Mapping[str, Any], args: str | None) -> None:
        self._keep(StepWrite(place.run_id, place.name, FlowStepStatus.SUCCEEDED, place.position))

    def transact(self, write: Callable[[Connection], StepWrite]) -> str:
        raise _needs_a_store("run.transaction")

    def continue_as(self, input: Any) -> NoReturn:
        raise _needs_a_store("run.restart_as")

    def __getattr__(self, name: str) -> NoReturn:
        raise _needs_a_store(f"the driver's {name}")

    def join(self, members: Sequence[Member], join: Join, *, cleanup: bool) -> NoReturn:
        never_comes: Refused | None = None
        succeeded = 0
        for member in sorted(members, key=_turn):
            try:
                kept = self._keep(self._outcome(member))
            except Refused as refused:
                if member.task != EVENT:
                    raise
                never_comes = refused  # others may be enough
            else:
                succeeded += kept.status is FlowStepStatus.SUCCEEDED
        if never_comes is not None and succeeded < join.good:
            raise never_comes
        raise Suspended

    def wait(self, timer: TimerWait, step: StepWrite) -> NoReturn:
        self._now = timer.at
        self._keep(_closed(step, FlowStepStatus.SUCCEEDED))
        raise Suspended

    def wait_for_event(self, wait: ExternalEventWait, step: StepWrite) -> FlowStep:
        if wait.topic in self._events:
            payload = json.dumps(to_jsonable_python(self._events[wait.topic]))
            return self._keep(_closed(step, FlowStepStatus.SUCCEEDED, result=payload))
        if wait.timeout_at is None:
            told = f"give run_inline its payload, events={{{wait.topic!r}: …}}"
            raise Refused(Stuck(f"the flow waits for the event {wait.topic!r}: {told}"))
        self._now = max(self._now, wait.timeout_at)
        return self._keep(_closed(step, FlowStepStatus.FAILED, error={"type": WAIT_TIMED_OUT, "message": ""}))

    # ---- steps ----

    def _keep(self, step: StepWrite) -> FlowStep:
        self._kept[step.run_id] = kept = FlowStep(
            flow_id=self.flow.id, run_id=step.run_id, task=step.task, status=step.status, position=step.position,
            attempt=step.attempt, result_json=None if step.result is None else json.loads(step.result),
            error_json=None if step.error is None else dict(step.error),
            args_json=None if step.args is None else json.loads(step.args),
        )  # fmt: skip
        return kept

    def _outcome(self, member: Member) -> StepWrite:
        try:
            result = self._stub_result(member) or self._result(member)
        except Exception as error:
            told = of_attempt(error) if member.child is None else of_flow(error)
            return StepWrite(member.run_id, member.task, FlowStepStatus.FAILED, member.position, error=told)
        return StepWrite(member.run_id, member.task, FlowStepStatus.SUCCEEDED, member.position, result=result)

    def _stub_result(self, member: Member) -> str | None:
        """The result, as JSON text, of what stands in for it; None: nothing does."""
        work = self._stubs.find(member.task)
        if work is None:
            return None
        if member.child is not None:
            args, kwargs = [] if member.child.input_json is None else [member.child.input_json], {}
        else:
            called = json.loads(member.args)
            args, kwargs = called["args"], called["kwargs"]
        value = call(self.loop, work, args, kwargs, None, IN_PEACE)
        return result_codec(work).encode(f"result of step {member.task}", value, self.max_payload_bytes)

    def _result(self, member: Member) -> str:
        what = f"result of step {member.task}"
        if (child := member.child) is not None:
            definition = self.runtime.registry.get(child.controller_id, child.definition_version)
            if definition is None:
                definition = self.runtime.registry.require(child.controller_id)
            value = InlineDriver(definition, child.input_json, self._stubs, self._events).play()
            return definition.output.encode(what, value, self.max_payload_bytes)
        task: Any = self.app.tasks.get(member.task)
        if task is None:
            raise Refused(Stuck(f"the app has no task {member.task!r}: give run_inline a function for it, steps={{…}}"))
        called = json.loads(member.args)
        value = call(self.loop, task, called["args"], called["kwargs"], None, IN_PEACE)
        return result_codec(task.run).encode(what, value, self.max_payload_bytes)


def _turn(member: Member) -> int:
    """An event comes after all that is at work, a time after all else."""
    return (EVENT, TIMER).index(member.task) + 1 if member.task in (EVENT, TIMER) else 0


def _closed(step: StepWrite, status: FlowStepStatus, **outcome: Any) -> StepWrite:
    return StepWrite(step.run_id, step.task, status, step.position, args=step.args, id=step.id, **outcome)


def _needs_a_store(what: str) -> Refused:
    return Refused(NotInline(f"{what} needs a store, and run_inline has none; for this there is flow_app"))
