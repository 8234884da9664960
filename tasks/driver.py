"""The driver: what a flow function asks of the engine, through :class:`Run`, under one claim."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timedelta
from functools import cached_property
from typing import Any, NoReturn

import sqlalchemy as sa

from celery_flows.store import (
    FlowError,
    FlowStatus,
    FlowStep,
    FlowStepStatus,
    InvalidData,
    RevisionMismatch,
    StoreError,
    children,
    dispatch,
    transitions,
)
from celery_flows.store import operations as op
from celery_flows.store.changes import Change, End, Join, Member, Park, StepWrite, Successor
from celery_flows.store.models import new_id
from celery_flows.store.script import Call
from celery_flows.store.waits import ExternalEventWait, TimerWait, event_key, wait_json
from celery_flows.tasks.children import DEEPEST, settle_child
from celery_flows.tasks.emit import hand_over
from celery_flows.tasks.errors import HistoryMismatch
from celery_flows.tasks.inline import RETRY_AT
from celery_flows.tasks.interrupts import Interruptible
from celery_flows.tasks.lease import UNKNOWN_PAUSE_SECONDS
from celery_flows.tasks.payloads import describe
from celery_flows.tasks.replay import Place, Suspended
from celery_flows.tasks.telling import Telling
from celery_flows.tasks.wait_steps import WAIT_TIMED_OUT

log = logging.getLogger("celery_flows.drive")

REFUSED_PAUSE_SECONDS = 600.0  # before a flow is offered again whose function here is not the one of its history
MOMENT_SECONDS = 0.5  # a shorter pause between attempts is not worth another claim


class Driver(Telling):
    """Records steps, schedules members, waits. What suspends the function raises :class:`Suspended` through it."""

    @property
    def queue(self) -> str | None:
        """The flow's queue; None: the default."""
        return self.claim.queue

    @property
    def join_group(self) -> int:
        """The group of the last join."""
        return self.claim.join_group

    def check_horizon(self, at: datetime) -> None:
        """Refuses a timer past ``flow_timer_horizon_days``.

        Raises:
            InvalidData: it is.
        """
        days = self.runtime.settings.timer_horizon_days
        if days is not None and at > self.now() + timedelta(days=days):
            raise InvalidData("timer", f"is more than {days:g} days away (flow_timer_horizon_days)")

    @cached_property
    def lineage(self) -> tuple[str, ...]:
        """The names of the flows that this one is a child of, the outermost first, and its own. Free for a flow that is
        nobody's child."""
        if self.flow.parent_flow_id is None:
            return (self.flow.controller_id,)
        with self.unwinding():
            return self.runtime.store.run(children.lineage, self.flow.id, DEEPEST)

    def refuse_history(self, mismatch: HistoryMismatch) -> NoReturn:
        """The function here is not the one that this history was made by: the flow is left alone, and says why. One
        that was left alone before, and is to be cancelled, ends here.

        A cancel alone ends none: it may have met the wrong worker half way through a deployment, and another has the
        function that cleans up.
        """
        was_refused = (self.flow.error_json or {}).get("type") == HistoryMismatch.__name__
        if self.cancel_requested and was_refused:
            self._cancel_without_cleanup(mismatch)
        log.error("flow %s of %r is left alone: %s", self.flow.id, self.flow.controller_id, mismatch)
        with self.unwinding():
            if self.flow.error_json != describe(mismatch):
                self.kept_from_going_on = False
                self.write(lambda: ("history_refused", {"error_json": describe(mismatch)}))
        pause = UNKNOWN_PAUSE_SECONDS if self.cancel_requested else REFUSED_PAUSE_SECONDS
        self.park(self.now() + timedelta(seconds=pause))

    def _cancel_without_cleanup(self, mismatch: HistoryMismatch) -> NoReturn:
        """Ends the flow once nothing of it is at work any more; its children are cancelled, and clean up."""
        if self.open_members:
            self.drain()
        columns = {"status": FlowStatus.CANCELLED, "wait_json": None, "error_json": describe(mismatch)}
        log.error("flow %s of %r is cancelled without its cleanup: %s", self.flow.id, self.flow.controller_id, mismatch)
        with self.unwinding():
            self.end(lambda: ("cancelled", columns), payload={"cleaned_up": False})
        self.is_over = True
        raise Suspended from mismatch

    def end(self, outcome: Callable[[], tuple[str, dict[str, Any]]], **more: Any) -> None:
        """The last write; then a child's parent is told.

        Raises:
            As :meth:`write`.
        """
        self.write(outcome, drive=End(), **more)
        _, columns = outcome()
        error = (columns.get("error_json") or {}).get("type")
        self.runtime.watch.ended(self.flow.controller_id, columns["status"], self.span, error)
        if (run_id := self.claim.parent_run_id) is not None:
            settle_child(self.runtime, run_id)

    def interrupt(self, error: BaseException) -> None:
        """A step raised what ends its process, or was meant to: the claim is over, and ends with just that."""
        self.is_over, self.interruption = True, error

    def interruptible(self) -> Interruptible:
        """How cancel and deadline may interrupt the body of a step; see :meth:`look_for_cause`."""
        assert self.holder.worker is not None
        return Interruptible(self.runtime.interrupts, self.holder.worker)

    def look_for_cause(self) -> None:
        """After an interrupt: reads whether the flow is cancelled."""
        with self.unwinding():
            self.look_again()

    def retry(self, step: StepWrite, pause: float) -> None:
        """Writes that an attempt failed; the next may begin after ``pause`` seconds. Suspends until then, unless that
        is but a moment, which passes here."""
        stays = pause <= MOMENT_SECONDS
        self._write_retry(step, self.now() + timedelta(seconds=pause), parks=not stays)
        if not stays:
            self.is_over = True
            raise Suspended
        self.runtime.pause(pause)

    def note_retry(self, step: StepWrite, pause: float) -> datetime:
        """Writes that an attempt failed, and when the next may begin, which it gives; others of this flow go on."""
        at = self.now() + timedelta(seconds=pause)
        self._write_retry(step, at, parks=False)
        return at

    def _write_retry(self, step: StepWrite, at: datetime, *, parks: bool) -> None:
        step = replace(step, error={**(step.error or {}), RETRY_AT: at.isoformat()})
        with self.unwinding():
            self.write(
                lambda: ("step_retrying", {"current_step": step.task}), step=step, forgive=self.crashed,
                drive=Park(self.holder, self.claim.wakes, self.at_the_latest(at)) if parks else None,
            )  # fmt: skip

    def wait_until(self, at: datetime) -> None:
        """Suspends until a time, if it has not come."""
        if self.now() < at:
            self.park(self.at_the_latest(at))

    def pause_until(self, at: datetime) -> None:
        """:meth:`wait_until`, but a moment passes here."""
        seconds = (at - self.now()).total_seconds()
        if seconds > MOMENT_SECONDS:
            self.park(self.at_the_latest(at))
        self.runtime.pause(max(0.0, seconds))

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
            if self.kept_from_going_on:
                columns["error_json"] = None
            return Change(
                self.flow.id, self.revision, f"step_{step.status.value}", columns, step=step, forgive=self.crashed,
                write_id=write_id,
            )  # fmt: skip

        made = Call(op.change_made, (change,))
        settled = Call(op.find_step_result, (self.flow.id, write_id))
        with self.unwinding():
            try:
                result: str = self.under_revision(lambda: self.runtime.store.attempt(made, settled))
            except StoreError as error:
                # It counts as a crash, though it may have been the database's affair: what does this each time must
                # have an end.
                self.is_over = True
                log.warning("flow %s: a transaction is given up (%s)", self.flow.id, error)
                with suppress(FlowError):
                    self.runtime.store.run(dispatch.end_lease, self.holder)
                raise Suspended from error
        self.crashed = self.kept_from_going_on = False
        return result

    def continue_as(self, input: Any) -> NoReturn:
        """Ends this flow, and has another of its definition's latest version go on with a fresh history and this one's
        key, in one transaction."""
        if self.claim.parent_run_id is not None:
            raise InvalidData("restart_as", "is not for child flows: their parents wait for them")
        definition = self.runtime.registry.require(self.flow.controller_id)
        flow = definition.new_flow(
            goal=self.flow.goal,
            owner_session_key=self.flow.owner_session_key,
            requester_origin=self.flow.requester_origin,
            idempotency_key=self.flow.idempotency_key,
            input_json=definition.encoded_input(input),
            deadline_at=None if definition.timeout is None else self.now() + definition.timeout,
        )
        if self.open_members:
            self.settle_members()
        drive = definition.drive_row(definition.limit_key(flow.input_json), self.claim.priority)
        columns = {"status": FlowStatus.FINISHED, "wait_json": None, "idempotency_key": None, "continued_as": flow.id}
        with self.runtime.watch.spans.starting(definition.name, apart=True) as started, self.unwinding():
            flow = flow.model_copy(update={"trace_json": started.carrier})
            started.tell(flow.id)
            self.write(
                lambda: ("continued", columns), drive=End(), successor=Successor(flow, drive), illegal_after_cancel=True
            )
        self.is_over = True
        self.runtime.watch.ended(self.flow.controller_id, FlowStatus.FINISHED, self.span)
        self.runtime.publisher.publish(dispatch.drive_hint(flow.id, drive))
        raise Suspended

    def update_state(self, place: Place, patch: Mapping[str, Any], args: str | None) -> None:
        """Lays keys over the flow's state, as a step."""
        step = StepWrite(place.run_id, place.name, FlowStepStatus.SUCCEEDED, place.position, args=args)
        with self.unwinding():
            self.write(
                lambda: ("state_updated", {"state_json": transitions.merged(self.state, patch)}), step=step,
                forgive=self.crashed,
            )  # fmt: skip
        self.state = transitions.merged(self.state, patch)

    def join(self, members: Sequence[Member], join: Join, *, cleanup: bool) -> NoReturn:
        """Schedules members and suspends until ``join.good`` of its group have succeeded or more than ``join.bad`` have
        failed.

        Without new members the join that is waited for already is left as it is: its counters have moved meanwhile.
        """
        if not members:
            self.park(self.at_the_latest(None), keeps_slot=self.keeps_slot())
        keeps_slot = self.keeps_slot(members)
        pause = self.runtime.first_pause + 0.005 * len(members)  # publishing many takes a while itself
        with self.unwinding():
            self.write(
                lambda: ("step_scheduled", {"current_step": members[0].task}),
                members=tuple(members), first_pause=pause, forgive=self.crashed,
                drive=Park(self.holder, self.claim.wakes, self.at_the_latest(None), join, keeps_slot),
                illegal_after_cancel=not cleanup,
            )  # fmt: skip
        self.is_over, self.kept_slot = True, keeps_slot
        self.runtime.publisher.publish(*(self._hint_of(member) for member in members))
        raise Suspended

    def _hint_of(self, member: Member) -> dispatch.Hint:
        if (child := member.child) is not None:
            return dispatch.Hint(str(child.id), child.id, "drive", member.task, member.queue, member.priority)
        options = dict(member.options or {})
        return dispatch.Hint(member.run_id, self.flow.id, "step", member.task, member.queue, member.priority, options)

    def wait(self, timer: TimerWait, step: StepWrite) -> NoReturn:
        """Parks the flow until the timer is due, in one transaction, and suspends."""
        with self.unwinding():
            self.write(
                lambda: ("waiting", _waits(timer, step)),
                step=step, drive=Park(self.holder, self.claim.wakes, self.at_the_latest(timer.at)),
                illegal_after_cancel=True,
                forgive=self.crashed,
            )  # fmt: skip
        self.is_over = True
        raise Suspended

    def wait_for_event(self, wait: ExternalEventWait, step: StepWrite) -> FlowStep:
        """Waits for an external event, and gives the closed wait step if the event is there, or its time is up.

        In three steps: the transition with the row still leased; in new statements, a look; the park. Whichever of
        event and wait commits last, its look sees both. The look also comes before a timeout is taken.
        """
        with self.unwinding():
            self.write(
                lambda: ("waiting", _waits(wait, step)),
                step=step, illegal_after_cancel=True, forgive=self.crashed,
            )  # fmt: skip
            while True:
                hand_over(self.runtime, event_key(wait.topic, wait.correlation_id), own=self.flow.id)
                stored = self.runtime.store.run(op.find_step_by_run_id, self.flow.id, step.run_id)
                assert stored is not None
                if stored.status.is_terminal:
                    self.look_again()  # the look moved the flow's revision
                    return stored
                if wait.timeout_at is None or self.now() < wait.timeout_at:
                    break
                if self._take_timeout(step):
                    return stored.but(status=FlowStepStatus.FAILED, error_json={"type": WAIT_TIMED_OUT, "message": ""})
        return self.park(self.at_the_latest(wait.timeout_at))

    def _take_timeout(self, step: StepWrite) -> bool:
        """Closes the wait as timed out; False: the event came first."""
        timed_out = StepWrite(
            step.run_id, step.task, FlowStepStatus.FAILED, step.position, args=step.args, id=step.id,
            error={"type": WAIT_TIMED_OUT, "message": ""},
        )  # fmt: skip
        columns = {"status": FlowStatus.RUNNING, "wait_json": None}
        change = Change(self.flow.id, self.revision, "resumed", columns, {"timed_out": True}, step=timed_out)
        try:
            self.runtime.store.change(change)
        except RevisionMismatch:
            self.look_again()
            return False
        self.revision += 1
        return True


def _waits(wait: TimerWait | ExternalEventWait, step: StepWrite) -> dict[str, Any]:
    return {"status": FlowStatus.WAITING, "wait_json": wait_json(wait), "current_step": step.task}
