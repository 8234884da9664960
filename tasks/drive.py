"""The driver: runs a flow function for as long as it holds the flow's lease, and writes what it comes to."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timedelta
from functools import cached_property
from typing import Any, NoReturn, TypeVar
from uuid import UUID

import sqlalchemy as sa
from celery import Celery
from celery.exceptions import WorkerShutdown, WorkerTerminate

from celery_flows.store import (
    Flow,
    FlowError,
    FlowNotFound,
    FlowStatus,
    FlowStep,
    FlowStepStatus,
    InvalidData,
    LeaseLost,
    RevisionMismatch,
    StoreError,
    children,
    dispatch,
    transitions,
)
from celery_flows.store import operations as op
from celery_flows.store.changes import Change, Drive, End, Holder, Join, Member, Park, StepWrite, Successor
from celery_flows.store.clock import boottime
from celery_flows.store.dispatch import DriveClaim
from celery_flows.store.models import TERMINAL, new_id
from celery_flows.store.script import Call
from celery_flows.store.waits import ExternalEventWait, TimerWait, event_key, wait_json
from celery_flows.tasks.children import DEEPEST, cancel_child, settle_child
from celery_flows.tasks.emit import hand_over
from celery_flows.tasks.errors import FlowCancelled, FlowTimedOut, HistoryMismatch
from celery_flows.tasks.inline import RETRY_AT
from celery_flows.tasks.options import StepOptions
from celery_flows.tasks.payloads import describe
from celery_flows.tasks.registry import FlowDefinition
from celery_flows.tasks.replay import Place, Replay, Suspended, run_id_of
from celery_flows.tasks.run import Run
from celery_flows.tasks.runtime import Runtime, claim_token
from celery_flows.tasks.wait_steps import WAIT_TIMED_OUT

log = logging.getLogger("celery_flows.drive")

T = TypeVar("T")

UNKNOWN_PAUSE_SECONDS = 60.0  # before a flow whose code is not here is offered again
REFUSED_PAUSE_SECONDS = 600.0  # the same, where the function here is not the one of its history
DEADLINE = "run.deadline"  # the step that records that a flow was told of it
MOMENT_SECONDS = 0.5  # a shorter pause between attempts is not worth another claim


def drive(runtime: Runtime, flow_id: UUID, worker: str) -> None:
    """Drives the flow until it waits, ends, or belongs to somebody else. A duplicate message finds nothing to claim."""
    while not passed_on(runtime, str(flow_id)) and (driver := _claimed(runtime, flow_id, worker)) is not None:
        if not driver.run():
            return


def passed_on(runtime: Runtime, run_id: str) -> bool:
    """Whether this worker is stopping, so that another is to do this: then its message has been sent again."""
    if not runtime.stopping.is_set():
        return False
    runtime.call_worker(run_id)
    return True


def _claimed(runtime: Runtime, flow_id: UUID, worker: str) -> Driver | None:
    asked_at = boottime()
    lease = runtime.settings.lease_seconds
    arguments = (flow_id, claim_token(worker), lease)
    claim = runtime.store.attempt(Call(dispatch.claim_drive, arguments), again={"repeat": True})
    return None if claim is None else Driver(runtime, claim, asked_at)


def surely_held(runtime: Runtime, holder: Holder, until: float) -> float:
    """Renews a lease that may have ended, by this process's own clock, and gives until when it surely runs.

    It looks again after renewing: that may have taken longer than a lease itself, if the process was stopped meanwhile.

    Raises:
        LeaseLost: another worker has taken over.
    """
    while (asked_at := boottime()) >= until:
        if not runtime.store.run(dispatch.renew_own, holder, runtime.settings.lease_seconds):
            raise LeaseLost(holder.run_id)
        until = asked_at + runtime.settings.lease_seconds
    return until


def let_go(runtime: Runtime, holder: Holder, error: BaseException) -> None:
    """Gives up a lease because of an exception that ends more than the work: unharmed if this process was told to stop
    or the database was away; as a crash, so that it has an end, if the work itself wanted to end the process or the
    database refuses what came of it."""
    told = isinstance(error, WorkerShutdown | WorkerTerminate) or runtime.stopping.is_set()
    unharmed = told or (isinstance(error, StoreError) and error.is_passing)
    with suppress(FlowError):
        runtime.store.run(dispatch.hand_back if unharmed else dispatch.end_lease, holder)


class Driver:
    """One claim's worth of driving: its lease, the flow's revision as last written, and the history as read."""

    def __init__(self, runtime: Runtime, claim: DriveClaim, asked_at: float) -> None:
        self.runtime = runtime
        self.app: Celery = runtime.app
        self.flow = claim.flow
        self.history: dict[str, FlowStep] = {}
        self.defaults = StepOptions()  # of steps, by the flow's definition
        self.max_payload_bytes = runtime.settings.max_payload_bytes
        self._claim = claim
        self._holder = claim.holder
        self._revision = claim.flow.revision
        self._state: Mapping[str, Any] = claim.flow.state_json
        self._cancel_requested = claim.flow.cancel_requested
        self._open_members = claim.open_members
        self._paused = False
        self._by_position: dict[int, FlowStep] | None = None
        self._timed_out: FlowTimedOut | None = None  # the deadline has passed, and the flow has been told
        self._kept_from_going_on = claim.flow.error_json is not None
        self._crashed = claim.crash_count > 0
        self._over = False  # nothing more may be done under this claim
        self._interruption: BaseException | None = None  # what a step raised that ends more than the step
        self._due_again = False
        self._lease_until = asked_at + runtime.settings.lease_seconds
        self._claimed_at = boottime()

    # ---- one pass over the flow function ----

    def run(self) -> bool:
        """Runs the flow function; True: the flow is due again already, claim it anew."""
        name, version = self.flow.controller_id, self.flow.definition_version
        definition = self.runtime.registry.get(name, version)
        if definition is None:
            log.error(
                "no flow definition %r, version %d, here; flow %s waits for a worker that has it",
                name, version, self.flow.id,
            )  # fmt: skip
            self.runtime.store.run(dispatch.hand_back, self._holder, UNKNOWN_PAUSE_SECONDS)
            return False
        try:
            self._run(definition)
        except Suspended:
            if (error := self._interruption) is not None:  # the function caught it, or went on all the same
                let_go(self.runtime, self._holder, error)
                raise error from None
        except LeaseLost as lost:
            log.info("%s", lost)
        except BaseException as error:
            let_go(self.runtime, self._holder, error)
            raise
        return self._due_again

    def _run(self, definition: FlowDefinition[Any, Any]) -> None:
        self._read_history()
        if (self._cancel_requested or self._is_late()) and not self._cleanup_is_out():
            self._drain()
            self._read_history()
        self.defaults = definition.defaults
        replay = Replay(self)
        run = Run(replay)
        try:
            arguments = [definition.input.decode("input", self.flow.input_json)] if definition.takes_input else []
            value = definition.function(run, *arguments)
            result = json.loads(definition.output.encode("result", value, self.max_payload_bytes))
        except Exception as error:
            self._end_badly(self._timed_out or error, run)
            return
        if self._timed_out is not None or self._cancel_requested:
            self._end_badly(self._timed_out or FlowCancelled(self.flow.id), run)
            return
        replay.finish()
        finished = {"status": FlowStatus.FINISHED, "result_json": result, "wait_json": None}
        try:
            self._end(lambda: ("finished", finished))
        except FlowCancelled as cancelled:
            self._end_badly(cancelled, run)

    def _read_history(self) -> None:
        if not self._claim.began:
            steps = self.runtime.store.run(dispatch.read_history, self.flow.id)
            self.history = {step.run_id: step for step in steps}

    def _cleanup_is_out(self) -> bool:
        """Whether members are out that clean up. Such are scheduled after draining only, so the others are closed."""
        out = (step.args_json for step in self.history.values() if not step.status.is_terminal)
        return any(isinstance(args, Mapping) and args.get("cleanup") for args in out)

    # ---- the end ----

    def _end(self, outcome: Callable[[], tuple[str, dict[str, Any]]], *, illegal_after_cancel: bool = True) -> None:
        """The last write.

        Raises:
            FlowCancelled: cancel was requested, and nothing else may be the end.
        """
        if self._over:  # the function caught what was to unwind it
            raise Suspended
        self._write(outcome, drive=End(), illegal_after_cancel=illegal_after_cancel)
        if (run_id := self._claim.parent_run_id) is not None:
            settle_child(self.runtime, run_id)

    def _end_badly(self, error: Exception, run: Run) -> None:
        """Undoes what is to be undone, once nothing of the flow is at work any more; then the flow has failed, or is
        cancelled."""
        if self._over:
            raise Suspended
        if self._open_members and not self._cleanup_is_out():
            self._drain()
        undo_failed = run.clean_up()
        if not isinstance(error, FlowCancelled):
            log.warning("flow %s of %r failed: %s", self.flow.id, self.flow.controller_id, type(error).__name__)
            try:
                self._end_failed(error, undo_failed)
            except FlowCancelled as cancelled:
                error = cancelled
            else:
                return
        columns: dict[str, Any] = {"status": FlowStatus.CANCELLED, "cancel_requested": True, "wait_json": None}
        if undo_failed:
            columns["error_json"] = _told(error, undo_failed)
        self._end(lambda: ("cancelled", columns), illegal_after_cancel=False)

    def _end_failed(self, error: Exception, undo_failed: list[str]) -> None:
        def failed() -> tuple[str, dict[str, Any]]:
            flow = self.flow.model_copy(update={"state_json": self._state, "status": FlowStatus.RUNNING})
            failure = transitions.fail(flow, type(error).__name__, _told(error, undo_failed))
            return failure.kind, failure.columns

        self._end(failed)

    def _drain(self) -> None:
        """Cancelling and failing begin here: members nobody has claimed are cancelled, children asked to cancel, and
        what is out is waited for."""
        with self._unwinding():
            self._open_members = self.runtime.store.run(dispatch.drain, self.flow.id, self._holder)
            if self._open_members:
                self._cancel_children()
        if self._open_members:
            self._park_and_suspend(None)

    def cancel_idle_members(self) -> None:
        """Cancels the members of joins that nobody has begun, and asks children to cancel; what runs goes on."""
        with self._unwinding():
            if self.runtime.store.run(dispatch.drain, self.flow.id, self._holder):
                self._cancel_children()

    def _cancel_children(self) -> None:
        """Asks those that have not been asked to cancel, each in a transaction of its own; whoever comes after this
        driver, should it be lost, asks the others."""
        for child_id in self.runtime.store.run(children.list_unasked, self.flow.id):
            cancel_child(self.runtime, child_id)

    # ---- what Run asks ----

    def clock(self) -> float:
        """Seconds of this process's own clock, to measure with."""
        return boottime()

    def now(self) -> datetime:
        """The database's clock: as of the claim, plus what has passed here since."""
        return self._claim.now + timedelta(seconds=boottime() - self._claimed_at)

    def check_horizon(self, at: datetime) -> None:
        """Refuses a timer past ``flow_timer_horizon_days``.

        Raises:
            InvalidData: it is.
        """
        days = self.runtime.settings.timer_horizon_days
        if days is not None and at > self.now() + timedelta(days=days):
            raise InvalidData("timer", f"is more than {days:g} days away (flow_timer_horizon_days)")

    @property
    def join_group(self) -> int:
        """The group of the last join."""
        return self._claim.join_group

    @cached_property
    def lineage(self) -> tuple[str, ...]:
        """The names of the flows that this one is a child of, the outermost first, and its own. Free for a flow that is
        nobody's child."""
        if self.flow.parent_flow_id is None:
            return (self.flow.controller_id,)
        with self._unwinding():
            return self.runtime.store.run(children.lineage, self.flow.id, DEEPEST)

    def recorded_at(self, position: int) -> FlowStep | None:
        """The step that history has in this place."""
        if self._by_position is None:
            self._by_position = {step.position: step for step in self.history.values() if step.position}
        return self._by_position.get(position)

    def refuse_history(self, mismatch: HistoryMismatch) -> NoReturn:
        """The function here is not the one that this history was made by: the flow is left alone, and says why."""
        log.error("flow %s of %r is left alone: %s", self.flow.id, self.flow.controller_id, mismatch)
        with self._unwinding():
            if self.flow.error_json != describe(mismatch):
                self._kept_from_going_on = False
                self._write(lambda: ("history_refused", {"error_json": describe(mismatch)}))
            self.runtime.store.run(dispatch.hand_back, self._holder, REFUSED_PAUSE_SECONDS)
        self._over = True
        raise Suspended from mismatch

    def _is_late(self) -> bool:
        return self.flow.deadline_at is not None and self.now() >= self.flow.deadline_at

    def check_stop(self) -> None:
        """Unwinds the flow function when the claim is over, the worker is stopping, or the flow is paused."""
        if self._over:
            raise Suspended
        if self.runtime.stopping.is_set():
            self._hand_over_to_another_worker()
        if self._paused:
            self._park_and_suspend(None)

    def to_be_told(self) -> FlowCancelled | FlowTimedOut | None:
        """What a flow that has not been told yet is to be told before anything new happens, if anything.

        That its deadline has passed is recorded, for a cancel may come after. Unwinds the function, as
        :meth:`check_stop` does, and as :meth:`settle_before_telling` does.
        """
        self.check_stop()
        deadline, run_id = self.flow.deadline_at, run_id_of(self.flow.id, DEADLINE, 1)
        is_recorded = run_id in self.history
        if not (is_recorded or self._cancel_requested or self._is_late()):
            return None
        self.settle_before_telling()
        if not is_recorded and self._cancel_requested:
            return FlowCancelled(self.flow.id)
        assert deadline is not None
        if not is_recorded:
            self.record(StepWrite(run_id, DEADLINE, FlowStepStatus.SUCCEEDED, 0), current_step=DEADLINE)
        self._timed_out = FlowTimedOut(self.flow.id, deadline)
        return self._timed_out

    def settle_before_telling(self) -> None:
        """A flow is told with all its members closed, and at a place that its history fixes: if some may be open, they
        are closed, and the function is run anew from what has become of them."""
        if self._open_members and not self._cleanup_is_out():
            self._drain()
            with self._unwinding():
                self.runtime.store.run(dispatch.hand_back, self._holder)
            self._over = self._due_again = True
            raise Suspended

    def _hand_over_to_another_worker(self) -> NoReturn:
        with self._unwinding():
            self.runtime.store.run(dispatch.hand_back, self._holder)
        self._over = True
        passed_on(self.runtime, self._holder.run_id)
        raise Suspended

    def settle_members(self) -> None:
        """Has the members of joins that nobody waits for any more closed before anything else happens: cancels those
        that nobody has begun, and suspends while others still run. Then history is read again."""
        self._drain()
        with self._unwinding():
            self._read_history()

    def interrupt(self, error: BaseException) -> None:
        """A step raised what ends its process, or was meant to: the claim is over, and ends with just that."""
        self._over, self._interruption = True, error

    def check_lease(self) -> None:
        """Renews the lease if it may have ended; before every step that runs here."""
        with self._unwinding():
            self._lease_until = surely_held(self.runtime, self._holder, self._lease_until)

    def record(self, step: StepWrite, *, current_step: str) -> None:
        """Writes a step's outcome; it has committed when this returns."""
        with self._unwinding():
            self._write(
                lambda: (f"step_{step.status.value}", {"current_step": current_step}), step=step, forgive=self._crashed
            )

    def retry(self, step: StepWrite, pause: float) -> None:
        """Writes that an attempt failed; the next may begin after ``pause`` seconds. Suspends until then, unless that
        is but a moment, which passes here."""
        at = self.now() + timedelta(seconds=pause)
        step = replace(step, error={**(step.error or {}), RETRY_AT: at.isoformat()})
        stays = pause <= MOMENT_SECONDS
        with self._unwinding():
            self._write(
                lambda: ("step_retrying", {"current_step": step.task}), step=step, forgive=self._crashed,
                drive=None if stays else Park(self._holder, self._claim.wakes, self._at_the_latest(at)),
            )  # fmt: skip
        if not stays:
            self._over = True
            raise Suspended
        self.runtime.pause(pause)

    def wait_until(self, at: datetime) -> None:
        """Suspends until a time, if it has not come."""
        if self.now() < at:
            self._park_and_suspend(at)

    def _at_the_latest(self, at: datetime | None) -> datetime | None:
        """``at``, or the flow's deadline if that comes before it and the flow is yet to be told of it."""
        deadline = self.flow.deadline_at
        if deadline is None or deadline <= self.now():
            return at
        return deadline if at is None else min(at, deadline)

    def transact(self, write: Callable[[sa.Connection], StepWrite]) -> str:
        """Runs ``write`` in a transaction, which commits together with the step that it gives; its result as JSON text.
        On conflict all of it is rolled back and run again.

        Raises:
            Whatever ``write`` raises; nothing was written.
        """
        write_id = new_id()

        def change(connection: sa.Connection) -> Change:
            step = write(connection)
            columns: dict[str, Any] = {"current_step": step.task}
            if self._kept_from_going_on:
                columns["error_json"] = None
            return Change(
                self.flow.id, self._revision, f"step_{step.status.value}", columns, step=step, forgive=self._crashed,
                write_id=write_id,
            )  # fmt: skip

        made = Call(op.change_made, (change,))
        settled = Call(op.find_step_result, (self.flow.id, write_id))
        with self._unwinding():
            try:
                result: str = self._under_revision(lambda: self.runtime.store.attempt(made, settled))
            except StoreError as error:
                # It counts as a crash, though it may have been the database's affair: what does this each time must
                # have an end.
                self._over = True
                log.warning("flow %s: a transaction is given up (%s)", self.flow.id, error)
                with suppress(FlowError):
                    self.runtime.store.run(dispatch.end_lease, self._holder)
                raise Suspended from error
        self._crashed = self._kept_from_going_on = False
        return result

    def continue_as(self, input: Any) -> NoReturn:
        """Ends this flow, and has another of its definition's latest version go on with a fresh history and this one's
        key, in one transaction."""
        if self._claim.parent_run_id is not None:
            raise InvalidData("restart_as", "is not for child flows: their parents wait for them")
        definition = self.runtime.registry.require(self.flow.controller_id)
        flow = Flow(
            controller_id=definition.name,
            definition_version=definition.version,
            goal=self.flow.goal,
            owner_session_key=self.flow.owner_session_key,
            requester_origin=self.flow.requester_origin,
            idempotency_key=self.flow.idempotency_key,
            input_json=definition.encoded_input(input),
            deadline_at=None if definition.timeout is None else self.now() + definition.timeout,
        )
        if self._open_members:
            self.settle_members()
        drive = Drive(definition.name, definition.queue, first_pause=self.runtime.first_pause)
        columns = {"status": FlowStatus.FINISHED, "wait_json": None, "idempotency_key": None, "continued_as": flow.id}
        with self._unwinding():
            self._write(
                lambda: ("continued", columns), drive=End(), successor=Successor(flow, drive), illegal_after_cancel=True
            )
        self._over = True
        self.runtime.publisher.publish(dispatch.Hint(str(flow.id), flow.id, "drive", definition.name, definition.queue))
        raise Suspended

    def update_state(self, place: Place, patch: Mapping[str, Any]) -> None:
        """Lays keys over the flow's state, as a step."""
        step = StepWrite(place.run_id, place.name, FlowStepStatus.SUCCEEDED, place.position)
        with self._unwinding():
            self._write(
                lambda: ("state_updated", {"state_json": transitions.merged(self._state, patch)}), step=step,
                forgive=self._crashed,
            )  # fmt: skip
        self._state = transitions.merged(self._state, patch)

    def join(self, members: Sequence[Member], join: Join, *, cleanup: bool) -> NoReturn:
        """Schedules members and suspends until ``join.good`` of its group have succeeded or more than ``join.bad`` have
        failed.

        Without new members the join that is waited for already is left as it is: its counters have moved meanwhile.
        """
        if not members:
            self._park_and_suspend(None)
        pause = self.runtime.first_pause + 0.005 * len(members)  # publishing many takes a while itself
        with self._unwinding():
            self._write(
                lambda: ("step_scheduled", {"current_step": members[0].task}),
                members=tuple(members), first_pause=pause, forgive=self._crashed,
                drive=Park(self._holder, self._claim.wakes, self._at_the_latest(None), join),
                illegal_after_cancel=not cleanup,
            )  # fmt: skip
        self._over = True
        self.runtime.publisher.publish(*(self._hint_of(member) for member in members))
        raise Suspended

    def _hint_of(self, member: Member) -> dispatch.Hint:
        if (child := member.child) is not None:
            return dispatch.Hint(str(child.id), child.id, "drive", member.task, member.queue, member.priority)
        options = dict(member.options or {})
        return dispatch.Hint(member.run_id, self.flow.id, "step", member.task, member.queue, member.priority, options)

    def wait(self, timer: TimerWait, step: StepWrite) -> NoReturn:
        """Parks the flow until the timer is due, in one transaction, and suspends."""
        with self._unwinding():
            self._write(
                lambda: ("waiting", {"status": FlowStatus.WAITING, "wait_json": wait_json(timer)}),
                step=step, drive=Park(self._holder, self._claim.wakes, self._at_the_latest(timer.at)),
                illegal_after_cancel=True,
                forgive=self._crashed,
            )  # fmt: skip
        self._over = True
        raise Suspended

    def wait_for_event(self, wait: ExternalEventWait, step: StepWrite) -> FlowStep:
        """Waits for an external event, and gives the closed wait step if the event is there, or its time is up.

        In three steps: the transition with the row still leased; in new statements, a look; the park. Whichever of
        event and wait commits last, its look sees both. The look also comes before a timeout is taken.
        """
        with self._unwinding():
            self._write(
                lambda: ("waiting", {"status": FlowStatus.WAITING, "wait_json": wait_json(wait)}),
                step=step, illegal_after_cancel=True, forgive=self._crashed,
            )  # fmt: skip
            while True:
                hand_over(self.runtime, event_key(wait.topic, wait.correlation_id), own=self.flow.id)
                stored = self.runtime.store.run(op.find_step_by_run_id, self.flow.id, step.run_id)
                assert stored is not None
                if stored.status.is_terminal:
                    self._look_again()  # the look moved the flow's revision
                    return stored
                if wait.timeout_at is None or self.now() < wait.timeout_at:
                    break
                if self._take_timeout(step):
                    return stored.but(status=FlowStepStatus.FAILED, error_json={"type": WAIT_TIMED_OUT, "message": ""})
        return self._park_and_suspend(wait.timeout_at)

    def _take_timeout(self, step: StepWrite) -> bool:
        """Closes the wait as timed out; False: the event came first."""
        timed_out = StepWrite(
            step.run_id, step.task, FlowStepStatus.FAILED, step.position, args=step.args, id=step.id,
            error={"type": WAIT_TIMED_OUT, "message": ""},
        )  # fmt: skip
        columns = {"status": FlowStatus.RUNNING, "wait_json": None}
        change = Change(self.flow.id, self._revision, "resumed", columns, {"timed_out": True}, step=timed_out)
        try:
            self.runtime.store.change(change)
        except RevisionMismatch:
            self._look_again()
            return False
        self._revision += 1
        return True

    # ---- writing under the lease ----

    def _write(
        self, outcome: Callable[[], tuple[str, dict[str, Any]]], *, illegal_after_cancel: bool = False, **more: Any
    ) -> None:
        """Writes one revision. On conflict: reads where flow and lease stand, and writes again what is still legal.

        Raises:
            LeaseLost: another driver has taken over, or the flow has ended.
            FlowCancelled: cancel was requested, and only cancelled may follow.
        """

        def write() -> None:
            if illegal_after_cancel and self._cancel_requested:
                raise FlowCancelled(self.flow.id)
            kind, columns = outcome()
            if self._kept_from_going_on:
                columns = {"error_json": None, **columns}
            change = Change(self.flow.id, self._revision, kind, columns, **more)
            # What is written is the outcome of work: worth trying for as long as the lease is likely to last.
            self.runtime.store.change(change, patience=self._patience)

        self._under_revision(write)
        self._kept_from_going_on = False
        self._crashed = self._crashed and not more.get("forgive", False)

    @property
    def _patience(self) -> float:
        return self.runtime.settings.lease_seconds / 2

    def _under_revision(self, write: Callable[[], T]) -> T:
        while True:
            try:
                written = write()
            except RevisionMismatch:
                self._look_again()
            except FlowNotFound:
                raise LeaseLost(self._holder.run_id) from None
            else:
                self._revision += 1
                return written

    def _look_again(self) -> None:
        standing = self.runtime.store.run(dispatch.standing, self.flow.id)
        if standing is None or standing.fence != self._holder.fence or standing.status in TERMINAL:
            raise LeaseLost(self._holder.run_id)
        self._revision = standing.revision
        self._state = standing.state
        self._cancel_requested = standing.cancel_requested
        self._paused = standing.paused

    def _park_and_suspend(self, due_at: datetime | None) -> NoReturn:
        with self._unwinding():
            parked = Park(self._holder, self._claim.wakes, self._at_the_latest(due_at))
            self._due_again = self.runtime.store.run(dispatch.park, parked)
        self._over = True
        raise Suspended

    def _unwinding(self) -> _Unwinding:
        return _Unwinding(self)

    def end_claim(self, reason: Exception) -> None:
        """Nothing more may be done: the lease is lost, or the store cannot be reached."""
        self._over = True
        log.warning("flow %s: driving stops (%s)", self.flow.id, type(reason).__name__)
        if not isinstance(reason, LeaseLost):
            let_go(self.runtime, self._holder, reason)


def _told(error: BaseException, undo_failed: list[str]) -> dict[str, Any]:
    return {**describe(error), "undo_failed": undo_failed} if undo_failed else describe(error)


class _Unwinding:
    """Turns what ends a claim into :class:`Suspended`, which a flow function's ``except Exception`` lets pass."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver

    def __enter__(self) -> None:
        return None

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        if isinstance(error, LeaseLost | StoreError):
            self._driver.end_claim(error)
            raise Suspended from error
