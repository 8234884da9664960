"""Telling a flow function what happened outside: cancel, deadline, a pause, a worker that stops."""

from __future__ import annotations

from typing import NoReturn

from celery_flows.store import FlowStepStatus, children, dispatch
from celery_flows.store.changes import StepWrite
from celery_flows.tasks.children import cancel_child
from celery_flows.tasks.claimed import Claimed
from celery_flows.tasks.errors import FlowCancelled, FlowTimedOut
from celery_flows.tasks.lease import passed_on
from celery_flows.tasks.replay import Suspended, is_cleanup, run_id_of

DEADLINE = "run.deadline"  # the step that records that a flow was told of it


class Telling(Claimed):
    """A claimed flow that is told, once and with all its members closed, that it is cancelled or past its deadline."""

    def check_stop(self) -> None:
        """Unwinds the flow function when the claim is over, the worker is stopping, or the flow is paused."""
        if self.is_over:
            raise Suspended
        if self.runtime.stopping.is_set():
            self._hand_over_to_another_worker()
        if self.is_paused:
            self.park(None)

    def may_go_on(self) -> bool:
        """Whether :meth:`check_stop` would unwind nothing."""
        return not (self.is_over or self.runtime.stopping.is_set() or self.is_paused)

    def has_to_tell(self) -> bool:
        """Whether there is something to tell a flow that has not been told yet."""
        return run_id_of(self.flow.id, DEADLINE, 1) in self.history or self.cancel_requested or self.is_late()

    def to_be_told(self) -> FlowCancelled | FlowTimedOut | None:
        """What a flow that has not been told yet is to be told before anything new happens, if anything.

        That its deadline has passed is recorded, for a cancel may come after. Unwinds the function, as
        :meth:`check_stop` does, and as :meth:`settle_before_telling` does.
        """
        self.check_stop()
        if not self.has_to_tell():
            return None
        deadline, run_id = self.flow.deadline_at, run_id_of(self.flow.id, DEADLINE, 1)
        is_recorded = run_id in self.history
        self.settle_before_telling()
        if not is_recorded and self.cancel_requested:
            return FlowCancelled(self.flow.id)
        assert deadline is not None
        if not is_recorded:
            self.record(StepWrite(run_id, DEADLINE, FlowStepStatus.SUCCEEDED, 0), current_step=DEADLINE)
        self.timed_out = FlowTimedOut(self.flow.id, deadline)
        return self.timed_out

    def settle_before_telling(self) -> None:
        """A flow is told with all its members closed, and at a place that its history fixes: if some may be open, they
        are closed, and the function is run anew from what has become of them."""
        if self.open_members and not self.cleanup_is_out():
            self.drain()
            with self.unwinding():
                self.runtime.store.run(dispatch.hand_back, self.holder)
            self.is_over = self.is_due_again = True
            raise Suspended

    def settle_members(self) -> None:
        """Has the members of joins that nobody waits for any more closed before anything else happens: cancels those
        that nobody has begun, and suspends while others still run. Then history is read again."""
        self.drain()
        with self.unwinding():
            self.read_history()

    def drain(self) -> None:
        """Cancelling and failing begin here: members nobody has claimed are cancelled, children asked to cancel, and
        what is out is waited for."""
        with self.unwinding():
            self.open_members = self.runtime.store.run(dispatch.drain, self.flow.id, self.holder)
            if self.open_members:
                self._cancel_children()
        if self.open_members:
            self.park(None, keeps_slot=self.keeps_slot())

    def cancel_idle_members(self) -> None:
        """Cancels the members of joins that nobody has begun, and asks children to cancel; what runs goes on."""
        with self.unwinding():
            if self.runtime.store.run(dispatch.drain, self.flow.id, self.holder):
                self._cancel_children()

    def _cancel_children(self) -> None:
        """Asks those that have not been asked to cancel, each in a transaction of its own; whoever comes after this
        driver, should it be lost, asks the others."""
        for child_id in self.runtime.store.run(children.list_unasked, self.flow.id):
            cancel_child(self.runtime, child_id)

    def cleanup_is_out(self) -> bool:
        """Whether members are out that clean up. Such are scheduled after draining only, so the others are closed."""
        return any(is_cleanup(step) for step in self.history.values() if not step.status.is_terminal)

    def _hand_over_to_another_worker(self) -> NoReturn:
        with self.unwinding():
            self.runtime.store.run(dispatch.hand_back, self.holder)
        self.is_over = True
        passed_on(self.runtime, self.holder.run_id)
        raise Suspended
