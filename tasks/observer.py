"""Celery's signals → observations, in the processes of a worker that mirrors.

A message says by a header which mirrored flow its task belongs to; whatever a mirrored task publishes is given the
same. So a worker needs no look into the store to tell whose a task is, and a task of nobody's costs a look into a
dictionary.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any
from uuid import UUID

from celery import Task, signals, states
from celery._state import get_current_worker_task
from celery.utils.dispatch import Signal

from celery_flows.store import Flow, FlowMode, FlowStatus, FlowStepStatus
from celery_flows.store.observations import Observation
from celery_flows.tasks.canvas import HEADER, Planned, planned_by_message
from celery_flows.tasks.celery_tasks import PRUNE_TASK, START_TASK, SWEEP_TASK, VERIFY_TASK
from celery_flows.tasks.mirror import flow_id_of_root
from celery_flows.tasks.payloads import describe
from celery_flows.tasks.publish import DRIVE_TASK, STEP_TASK
from celery_flows.tasks.recorder import PATIENCE_SECONDS, Recorder
from celery_flows.tasks.runtime import Runtime

log = logging.getLogger("celery_flows.mirror")

OURS = frozenset({DRIVE_TASK, STEP_TASK, SWEEP_TASK, PRUNE_TASK, VERIFY_TASK, START_TASK})
CHORD_UNLOCK = "celery.chord_unlock"  # asks every second whether a chord is ready; passes the header on to its body

PENDING, RUNNING, SUCCEEDED = FlowStepStatus.PENDING, FlowStepStatus.RUNNING, FlowStepStatus.SUCCEEDED
FAILED, CANCELLED = FlowStepStatus.FAILED, FlowStepStatus.CANCELLED


@dataclass(slots=True)
class Running:
    """A mirrored task that runs in this thread."""

    flow_id: UUID
    run_id: str
    task: str
    attempt: int
    called: Mapping[str, Any]
    leads_on: bool  # to the rest of a chain, or to a chord's body
    published: list[Observation] = field(default_factory=list)
    is_published_again: bool = False  # under its own id, now or later: a retry, or what it is replaced by
    is_recorded: bool = False

    def seen(self, status: FlowStepStatus, error: Mapping[str, Any] | None = None, attempts: int = 0) -> Observation:
        """It is in this status now, ``attempts`` later."""
        attempt = self.attempt + attempts
        return Observation(self.flow_id, self.run_id, self.task, status, attempt, error, self.called)


def _quietly(handler: Callable[..., None]) -> Callable[..., None]:
    """A mirror that breaks must not break what it shows."""

    @wraps(handler)
    def quiet(*args: Any, **kwargs: Any) -> None:
        try:
            handler(*args, **kwargs)
        except Exception as error:
            log.warning("a task is not mirrored (%s: %s)", handler.__name__.strip("_"), type(error).__name__)

    return quiet


class Observer:
    """Watches the tasks of one app. Handlers are called in the thread, and before the end, of the task they tell of."""

    def __init__(self, runtime: Runtime, patience_seconds: float = PATIENCE_SECONDS) -> None:
        self._runtime, self._app = runtime, runtime.app
        self._recorder = Recorder(runtime, patience_seconds)
        self._here = threading.local()

    def connect(self) -> None:
        """From now on this process, and those it forks, record what they run."""
        for signal, handler in self._handlers():
            signal.connect(handler, weak=False, dispatch_uid=self._uid(handler))

    def disconnect(self) -> None:
        """The opposite of :meth:`connect`; what is not written yet is waited for, within bounds."""
        for signal, handler in self._handlers():
            signal.disconnect(dispatch_uid=self._uid(handler))
        self._flush()

    def _handlers(self) -> list[tuple[Signal, Callable[..., None]]]:
        return [
            (signals.task_prerun, self._begin),
            (signals.task_success, self._succeed),
            (signals.task_postrun, self._end),
            (signals.task_failure, self._fail_elsewhere),
            (signals.task_revoked, self._revoke),
            (signals.before_task_publish, self._pass_on),
            (signals.after_task_publish, self._note),
            (signals.worker_process_shutdown, self._flush),
        ]

    def _flush(self, **_: Any) -> None:
        self._recorder.flush()

    def _uid(self, handler: Callable[..., None]) -> str:
        return f"celery-flows {id(self)} {handler.__name__}"

    # ---- what runs here ----

    @_quietly
    def _begin(self, task: Task[Any, Any], **_: Any) -> None:
        flow_id, born = self._flow_of(task, task.request)
        if flow_id is None:
            return
        request = task.request
        leads_on = bool(request.chain or request.chord)
        attempt, called = (request.retries or 0) + 1, _called(request.parent_id)
        run = Running(flow_id, str(request.id), task.name, attempt, called, leads_on)
        self._stack().append(run)
        running = run.seen(RUNNING)
        if born is None:
            self._recorder.record([running])
            return
        request.headers = {**(request.headers or {}), HEADER: str(flow_id)}  # what it publishes is given the same
        follow = planned_by_message({"chain": request.chain, "chord": request.chord})
        self._recorder.record([running, *self._yet_to_come(flow_id, follow)], born)

    def _flow_of(self, task: Task[Any, Any], request: Any) -> tuple[UUID | None, Flow | None]:
        """The mirrored flow that a task belongs to; the flow itself, if it begins with this task."""
        if task.app is not self._app or task.name in OURS or task.name == CHORD_UNLOCK:
            return None, None
        if (said := (request.headers or {}).get(HEADER)) is not None:
            return UUID(said), None
        if request.id is None or request.root_id != request.id or request.parent_id is not None:
            return None, None
        rule = next((rule for rule in self._runtime.mirror_rules if rule.matches(task.name)), None)
        if rule is None:
            return None, None
        flow = Flow(
            id=flow_id_of_root(request.id), controller_id=task.name, goal=rule.goal, owner_session_key=rule.owner,
            idempotency_key=request.id, mode=FlowMode.MIRRORED, status=FlowStatus.RUNNING,
        )  # fmt: skip
        return flow.id, flow

    @_quietly
    def _succeed(self, sender: Task[Any, Any], **_: Any) -> None:
        run = self._running(sender.request.id)
        if run is not None:
            self._record(run, run.seen(SUCCEEDED))

    @_quietly
    def _end(self, task_id: str, state: str | None = None, retval: Any = None, **_: Any) -> None:
        run = self._running(task_id)
        if run is None:
            return
        self._stack().pop()
        if not run.is_recorded:
            self._record(run, *_ending(run, state, retval, sys.exc_info()[1]))

    def _record(self, run: Running, *outcome: Observation) -> None:
        """Outcome and what was published meanwhile are written at once, so that the flow does not look over between."""
        run.is_recorded = True
        own = {each.run_id for each in outcome}
        published = {each.run_id: each for each in run.published if each.run_id not in own}
        if outcome or published:
            self._recorder.record([*published.values(), *outcome])

    # ---- what is told by the parent process: of a task whose process died, or that never began ----

    @_quietly
    def _fail_elsewhere(self, sender: Task[Any, Any], task_id: str, exception: BaseException, **_: Any) -> None:
        request = sender.request
        if request.id == task_id and self._running(task_id) is None:
            self._close(sender, request, FAILED, describe(exception))

    @_quietly
    def _revoke(self, sender: Task[Any, Any], request: Any, terminated: bool, expired: bool, **_: Any) -> None:
        how = "terminated" if terminated else "expired" if expired else "revoked"
        self._close(sender, request, CANCELLED, {"type": "TaskRevokedError", "message": how})

    def _close(self, task: Task[Any, Any], request: Any, status: FlowStepStatus, error: Mapping[str, Any]) -> None:
        flow_id, _ = self._flow_of(task, request)
        if flow_id is not None:
            called = _called(request.parent_id)
            attempt = (request.retries or 0) + 1
            self._recorder.record([Observation(flow_id, request.id, task.name, status, attempt, error, called)])

    # ---- what a mirrored task publishes ----

    @_quietly
    def _pass_on(self, sender: str, headers: dict[str, Any] | None = None, **_: Any) -> None:
        parent = get_current_worker_task()
        if parent is None or parent.app is not self._app or headers is None or sender in OURS:
            return
        said = (parent.request.headers or {}).get(HEADER)
        if said is not None:
            headers.setdefault(HEADER, said)

    @_quietly
    def _note(self, sender: str, headers: Mapping[str, Any], body: Any = None, **_: Any) -> None:
        stack = self._stack()
        if not stack or headers.get(HEADER) != str(stack[-1].flow_id):
            return
        run = stack[-1]
        embedded = body[2] if isinstance(body, tuple | list) and len(body) == 3 else {}
        follow = self._yet_to_come(run.flow_id, planned_by_message(embedded))
        run.published += follow
        if run.run_id in (headers["id"], *(each.run_id for each in follow)):
            run.is_published_again = True
        if headers["id"] != run.run_id and sender != CHORD_UNLOCK:
            attempt, called = headers["retries"] + 1, _called(headers["parent_id"])
            run.published.append(Observation(run.flow_id, headers["id"], sender, PENDING, attempt, called=called))

    # ---- within this thread ----

    def _stack(self) -> list[Running]:
        if not hasattr(self._here, "stack"):
            self._here.stack = []
        stack: list[Running] = self._here.stack
        return stack

    def _running(self, task_id: str | None) -> Running | None:
        stack = self._stack()
        return stack[-1] if stack and stack[-1].run_id == task_id else None

    @staticmethod
    def _yet_to_come(flow_id: UUID, follow: Any) -> Sequence[Observation]:
        steps: list[Planned] = list(follow)
        return [Observation(flow_id, each.run_id, each.task, PENDING) for each in steps]


@contextmanager
def observed(runtime: Runtime) -> Iterator[None]:
    """Records the tasks that run in this process meanwhile."""
    observer = Observer(runtime)
    observer.connect()
    try:
        yield
    finally:
        observer.disconnect()


def _called(parent_id: str | None) -> dict[str, Any]:
    """How a task was called: never with what."""
    return {"parent_id": parent_id}


def _ending(run: Running, state: str | None, value: Any, raised: BaseException | None) -> list[Observation]:
    """What becomes of a task that did not simply succeed."""
    match state:
        case states.FAILURE:
            return [run.seen(FAILED, describe(value))]
        case states.RETRY:
            why = {"type": "Retry", "message": ""} if value.exc is None else describe(value.exc)
            return [run.seen(PENDING, why, attempts=1)]
        case states.IGNORED:
            # Nothing follows what is ignored, neither the rest of its chain nor its chord's body.
            said = run.seen(CANCELLED, describe(value)) if run.leads_on else run.seen(SUCCEEDED)
            return [] if run.is_published_again else [said]
        case states.REJECTED:
            return [] if value.requeue else [run.seen(FAILED, describe(value))]
    # It never came to an end of its own, or Celery could not store the result, which it then takes for a failure.
    return [run.seen(FAILED, describe(raised))] if isinstance(raised, Exception) else []
