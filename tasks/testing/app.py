"""The application under test: its flows, and the worker that drives them, in the test's own process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any, Self, TypeVar
from uuid import UUID

import sqlalchemy as sa

from celery_flows.store import operations as op
from celery_flows.store.dispatch import Hint
from celery_flows.store.tables import IS_PAUSED, UtcDateTime, flow_dispatch, flow_limits, flows
from celery_flows.tasks.runtime import Runtime
from celery_flows.tasks.testing.asked import meant
from celery_flows.tasks.testing.beat import FlowBeat
from celery_flows.tasks.testing.broker import in_memory
from celery_flows.tasks.testing.clock import FlowClock
from celery_flows.tasks.testing.crash import CrashingStore, Died, FlowCrash
from celery_flows.tasks.testing.hands import Hands
from celery_flows.tasks.testing.messages import FlowMessages
from celery_flows.tasks.testing.names import bodies_tasks
from celery_flows.tasks.testing.replaced import asked_anew, replaced
from celery_flows.tasks.testing.stuck import NeverStruck, Spins, Stuck, tell_waits

T = TypeVar("T")

_d, _l = flow_dispatch.c, flow_limits.c


class OutOfPatience(BaseException):
    """Stops a flow that goes on for too long. Not an Exception, so that no flow handles it."""


class FlowApp:
    """An application's flows, with everything in reach: no worker process, no broker, and time at the test's hand.

    Flows are started and handled as ever. What they come to, they come to when the test says so: by :meth:`run`, by
    ``handle.result()``, which lets time pass until the flow has ended, or by ``clock.advance``. With :meth:`run` and
    ``clock.advance`` beat is there too, and starts what the flows' schedules say.
    """

    def __init__(self, runtime: Runtime, engine: sa.Engine) -> None:
        self.clock = FlowClock()
        self.beat = FlowBeat(runtime, self.clock)
        self.crash = FlowCrash()
        self.messages = FlowMessages(runtime.default_queue)
        self.store = CrashingStore(engine, self.crash)
        self.ran: list[str] = []  # the steps whose bodies ran, in order, as often as they did
        self.patience_seconds = (
            10.0  # of this process's CPU time, for one run(); up to ten times that if the clock starts flows
        )
        self._runtime = runtime
        self._hands = Hands(runtime)
        self._deadline: float | None = None  # while something is being done
        self._started_by_clock = 0  # flows, meanwhile
        self._message: Hint | None = None  # that is being delivered
        self.clock.works(self._work_until)

    @contextmanager
    def installed(self) -> Iterator[Self]:
        """The application's flows are driven here and on this clock, and its broker is left alone, until the end."""
        runtime = self._runtime
        ours = {
            "publisher": self.messages, "_store": self.store, "wait_until": self._wait_until, "pause": self._pause,
            "before_body": self._before_body, "due_slots": self.beat.due_slots,
        }  # fmt: skip
        with (
            asked_anew(runtime, "settings"),  # must not stay as they are now: others may be set after the test
            asked_anew(runtime.app, "timezone"),
            self.clock.installed(),
            in_memory(runtime.app),
            replaced(runtime, **ours),
        ):
            yield self

    # ---- what a test asks ----

    def run(self) -> None:
        """Does all there is to do now: delivers messages, looks for due work and at schedules until nothing is left.
        Time stands still, so whoever sleeps goes on sleeping.

        Raises:
            Spins: there is always more to do.
            UnknownFlow, Stuck: a flow definition or a task is not registered.
        """
        with self._patience():
            self._work()
            while started := self.beat.look():
                self._started_by_clock += started
                self._work()

    def check_struck(self) -> None:
        """Says nothing if all that the test has asked to happen did.

        Raises:
            NeverStruck: naming what did not.
        """
        __tracebackhide__ = True
        spared = [*self.crash.spared(), *self.messages.spared()]
        if spared:
            ran, sent = dict.fromkeys(self.ran), dict.fromkeys(message.task for message in self.messages.sent)
            told = "; ".join(f"{asked}{meant(name, [*ran, *sent])}" for asked, name in spared)
            raise NeverStruck(
                f"did not happen, so this test proves nothing of it: {told}. "
                f"Steps that ran: {', '.join(ran) or 'none'}. Messages were for: {', '.join(sent) or 'none'}"
            )

    # ---- time ----

    def _work_until(self, at: datetime) -> None:
        if self._deadline is not None:  # inside a step: it takes that long
            self.clock.move_to(at)
            return
        with self._patience():
            self.run()
            while (due := self._next_due(slots=True)) is not None and due <= at:
                self.clock.move_to(due)
                self.run()
            self.clock.move_to(at)
            self.run()

    def _wait_until(self, look: Callable[[], T | None], timeout: float | None) -> T | None:
        """Lets time pass from one thing that falls due to the next, until ``look`` finds something. Beat is not there:
        schedules go on for ever, so nobody would be stuck, and a flow of months would begin thousands of others."""
        __tracebackhide__ = True
        end = None if timeout is None else self.clock.now() + timedelta(seconds=timeout)
        with self._patience():
            self._work()
            while (found := look()) is None:
                due = self._next_due()
                if end is not None and (due is None or due > end):
                    self.clock.move_to(end)
                    return None
                if due is None:
                    raise Stuck(f"nothing is left to do, and these flows have not ended:\n{tell_waits(self.store)}")
                self.clock.move_to(due)
                self._work()
        return found

    def _pause(self, seconds: float) -> None:
        self.clock.move_to(self.clock.now() + timedelta(seconds=seconds))

    def _next_due(self, *, slots: bool = False) -> datetime | None:
        paused = sa.exists().where(flows.c.id == _d.flow_id, IS_PAUSED)
        queued = sa.select(_d.limit_key).where(_d.queued_at.isnot(None), ~paused)
        with self.store.engine.connect() as connection:
            now = sa.literal(op.now(connection), UtcDateTime())
            rows = sa.select(sa.func.min(_d.due_at)).where(_d.due_at > now, ~paused)
            limits = sa.select(sa.func.min(_l.due_at)).where(_l.due_at > now, _l.key.in_(queued))
            due = [connection.scalar(rows), connection.scalar(limits)]
        if slots:
            due.append(self.beat.next_slot())
        return min((at for at in due if at is not None), default=None)

    # ---- work ----

    def _work(self) -> None:
        """What workers find to do now, without beat."""
        while True:
            while (message := self.messages.take()) is not None:
                self._deliver(message)
            report = self._hands.sweep()
            if not (report.due or report.handed_over or report.admitted or report.settled):
                return

    def _deliver(self, message: Hint) -> None:
        if message.kind == "step" and message.task not in self._runtime.app.tasks:
            raise Stuck(f"flow {message.flow_id} has a step {message.task!r}, and the app has no task of that name")
        self._message = message
        try:
            self._hands.deliver(message)
        except Died:
            pass
        finally:
            self.store.dead = False  # the next one is another process
        self._check_driven(message.flow_id)

    def _check_driven(self, flow_id: UUID) -> None:
        """Says nothing if the flow's code is here: a worker without it leaves the flow to others, for ever here."""
        flow, registry = self.store.get(flow_id), self._runtime.registry
        if flow is None or flow.status.is_terminal:
            return
        if registry.get(flow.controller_id, flow.definition_version) is None:
            registry.require(flow.controller_id)
            raise Stuck(f"flow {flow_id} needs version {flow.definition_version} of {flow.controller_id!r}")
        if flow.error_json is not None:
            raise Stuck(f"flow {flow_id} ({flow.controller_id}) is left alone: {flow.error_json['message']}")

    def _before_body(self, step: str, body: Callable[..., Any]) -> None:
        self.crash.called(step, bodies_tasks(self._runtime.app, body))
        if self.crash.strikes(step, "before"):
            self.store.die()
        self.ran.append(step)

    @contextmanager
    def _patience(self) -> Iterator[None]:
        if self._deadline is not None:
            yield
            return
        self._deadline, self._started_by_clock = time.process_time() + self.patience_seconds, 0
        try:
            with self.clock.watched(self._lose_patience):
                yield
        except OutOfPatience:
            message, patience = self._message, self.patience_seconds + self._granted()
            last = ", ".join(self.ran[-3:]) or "none"
            who = "what" if message is None else f"flow {message.flow_id} ({message.task})"
            by_clock, instead = "", ""
            if self._started_by_clock:
                by_clock = f"; flows started by the clock: {self._started_by_clock}"
                instead = (
                    ", name the schedules that count by flow_beat.only(…), or set the date by flow_clock.move_to(…)"
                )
            raise Spins(
                f"{who} does not come to rest: after {patience:g} s of work there is more to do; "
                f"{len(self.ran)} steps have run, the last of them: {last}{by_clock}. "
                f"If it only takes long, raise flow_app.patience_seconds{instead}"
            ) from None
        finally:
            self._deadline = None

    def _lose_patience(self) -> None:
        if self._deadline is not None and time.process_time() > self._deadline + self._granted():
            raise OutOfPatience

    def _granted(self) -> float:
        """Seconds of patience that the clock's flows have brought along: they are as many as the test lets slots pass.
        But whoever lets years pass, to come to a date, is to be told."""
        return self.patience_seconds * min(self._started_by_clock / 10, 9)
