"""A flow that this worker has claimed: its lease, its revision as last written, and its history as read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any, NoReturn, TypeVar

from celery import Celery

from celery_flows.store import FlowNotFound, FlowStep, LeaseLost, RevisionMismatch, StoreError, dispatch
from celery_flows.store.changes import Change, Member, Park, StepWrite
from celery_flows.store.clock import boottime
from celery_flows.store.dispatch import DriveClaim
from celery_flows.store.models import TERMINAL
from celery_flows.tasks.errors import FlowCancelled, FlowTimedOut
from celery_flows.tasks.lease import let_go, surely, surely_held
from celery_flows.tasks.loop import Loop
from celery_flows.tasks.metrics import CONFLICTS, LEASES_LOST
from celery_flows.tasks.options import StepOptions
from celery_flows.tasks.replay import Suspended
from celery_flows.tasks.runtime import Runtime
from celery_flows.tasks.spans import Span

log = logging.getLogger("celery_flows.drive")

T = TypeVar("T")


class Claimed:
    """What is written under one claim. Each write moves the flow's revision; a driver that was overtaken is refused."""

    def __init__(self, runtime: Runtime, claim: DriveClaim, asked_at: float) -> None:
        self.runtime = runtime
        self.app: Celery = runtime.app
        self.flow = claim.flow
        self.history: dict[str, FlowStep] = {}
        self.defaults = StepOptions()  # of steps, by the flow's definition
        self.max_payload_bytes = runtime.settings.max_payload_bytes
        self.claim = claim
        self.holder = claim.holder
        self.revision = claim.flow.revision
        self.state: Mapping[str, Any] = claim.flow.state_json
        self.cancel_requested = claim.flow.cancel_requested
        self.open_members = claim.open_members
        self.is_paused = False
        self.is_cleaning = False  # the function was told that the flow is cancelled or late; or it has failed
        self._by_position: dict[int, FlowStep] | None = None  # made from the history when it is asked for
        self.timed_out: FlowTimedOut | None = None  # the deadline has passed, and the flow has been told
        self.kept_from_going_on = claim.flow.error_json is not None
        self.crashed = claim.crash_count > 0
        self.is_over = False  # nothing more may be done under this claim
        self.interruption: BaseException | None = None  # what a step raised that ends more than the step
        self.is_due_again = False  # it was parked, and somebody had called meanwhile: whoever parked it goes on
        self.loop = Loop()
        self.span = Span()  # of this run
        self.kept_slot = False  # a limited flow keeps its slot beyond this claim
        self._lease_until = asked_at + runtime.settings.lease_seconds
        self._claimed_at = boottime()

    def clock(self) -> float:
        """Seconds of this process's own clock, to measure with."""
        return boottime()

    def now(self) -> datetime:
        """The database's clock: as of the claim, plus what has passed here since."""
        return self.claim.now + timedelta(seconds=boottime() - self._claimed_at)

    def at_the_latest(self, at: datetime | None) -> datetime | None:
        """``at``, or the flow's deadline if that comes before it and the flow is yet to be told of it; it may have
        passed in this very moment."""
        deadline = self.flow.deadline_at
        if deadline is None or self.is_cleaning:
            return at
        return deadline if at is None else min(at, deadline)

    def is_late(self) -> bool:
        """Whether the flow's deadline has passed."""
        return self.flow.deadline_at is not None and self.now() >= self.flow.deadline_at

    def read_history(self) -> None:
        """Reads the steps that are recorded."""
        if not self.claim.began:
            steps = self.runtime.store.run(dispatch.read_history, self.flow.id)
            self.history, self._by_position = {step.run_id: step for step in steps}, None

    def recorded_at(self, position: int) -> FlowStep | None:
        """The step that history has in this place."""
        if self._by_position is None:
            self._by_position = {step.position: step for step in self.history.values() if step.position}
        return self._by_position.get(position)

    def check_lease(self) -> None:
        """Renews the lease if it may have ended; before every step that runs here."""
        with self.unwinding():
            self._lease_until = surely_held(self.runtime, self.holder, self._lease_until)

    def write(
        self, outcome: Callable[[], tuple[str, dict[str, Any]]], *, illegal_after_cancel: bool = False, **more: Any
    ) -> None:
        """Writes one revision. On conflict: reads where flow and lease stand, and writes again what is still legal.

        Raises:
            LeaseLost: another driver has taken over, or the flow has ended.
            FlowCancelled: cancel was requested, and only cancelled may follow.
        """

        def write() -> None:
            if illegal_after_cancel and self.cancel_requested:
                raise FlowCancelled(self.flow.id)
            kind, columns = outcome()
            if self.kept_from_going_on:
                columns = {"error_json": None, **columns}
            change = Change(self.flow.id, self.revision, kind, columns, **more)
            self.is_due_again = self.runtime.store.change(change, **surely(self.runtime)).is_due

        self.under_revision(write)
        self.kept_from_going_on = False
        self.crashed = self.crashed and not more.get("forgive", False)

    def record(self, step: StepWrite, *, current_step: str) -> None:
        """Writes a step's outcome; it has committed when this returns."""
        with self.unwinding():
            self.write(
                lambda: (f"step_{step.status.value}", {"current_step": current_step}), step=step, forgive=self.crashed
            )

    def under_revision(self, write: Callable[[], T]) -> T:
        """Has ``write`` write one revision; tried again whenever somebody else has written one.

        Raises:
            LeaseLost: another driver has taken over, or the flow has ended.
            Suspended: the claim is over. A member of a gather may not have noticed.
        """
        if self.is_over:
            raise Suspended
        while True:
            try:
                written = write()
            except RevisionMismatch:
                self.runtime.watch.meter.add(CONFLICTS)
                self.look_again()
            except FlowNotFound:
                raise LeaseLost(self.holder.run_id) from None
            else:
                self.revision += 1
                return written

    def look_again(self) -> None:
        """Reads where flow and lease stand.

        Raises:
            LeaseLost: another driver has taken over, or the flow has ended.
        """
        standing = self.runtime.store.run(dispatch.standing, self.flow.id)
        if standing is None or standing.fence != self.holder.fence or standing.status in TERMINAL:
            raise LeaseLost(self.holder.run_id)
        self.revision = standing.revision
        self.state = standing.state
        self.cancel_requested = standing.cancel_requested
        self.is_paused = standing.paused

    def keeps_slot(self, members: Sequence[Member] = ()) -> bool:
        """Whether all that it waits for is work of its own: these members, and what is out. Child flows are none: they
        may be under the same limit, and wait for the slot."""
        out = (step for step in self.history.values() if not step.status.is_terminal)
        return not any(member.child for member in members) and not any(step.child_session_key for step in out)

    def park(self, due_at: datetime | None, *, keeps_slot: bool = False) -> NoReturn:
        """Gives the flow back until ``due_at`` (None: until somebody wakes it), and suspends."""
        with self.unwinding():
            parked = Park(self.holder, self.claim.wakes, due_at, keeps_slot=keeps_slot)
            self.is_due_again = self.runtime.store.run(dispatch.park, parked)
        self.kept_slot = keeps_slot
        self.is_over = True
        raise Suspended

    def end_claim(self, reason: Exception) -> None:
        """Nothing more may be done: the lease is lost, or the store cannot be reached."""
        self.is_over = True
        log.warning("flow %s: driving stops (%s)", self.flow.id, type(reason).__name__)
        if isinstance(reason, LeaseLost):
            self.runtime.watch.meter.add(LEASES_LOST, ("drive",))
        else:
            let_go(self.runtime, self.holder, reason)

    @contextmanager
    def unwinding(self) -> Iterator[None]:
        """Turns what ends a claim into :class:`Suspended`, which a flow function's ``except Exception`` lets pass."""
        try:
            yield
        except (LeaseLost, StoreError) as error:
            self.end_claim(error)
            raise Suspended from error
