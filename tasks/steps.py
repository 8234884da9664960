"""Celery steps: claims a step's row, runs the user's task as Celery would, and records what came of it."""

from __future__ import annotations

import logging
from asyncio import CancelledError
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from celery import Task
from celery._state import _task_stack  # type: ignore[attr-defined]
from celery.app.trace import task_has_custom
from celery.exceptions import Ignore, Reject, Retry, SoftTimeLimitExceeded

from celery_flows.store import FlowStepStatus, LeaseLost, StoreError, dispatch
from celery_flows.store.changes import Completion
from celery_flows.store.clock import boottime
from celery_flows.store.dispatch import StepClaim
from celery_flows.store.script import TRIES, Call
from celery_flows.tasks.drive import drive
from celery_flows.tasks.failures import of_attempt
from celery_flows.tasks.inline import timed_out
from celery_flows.tasks.interrupts import IN_PEACE, Interrupted, Interruptible
from celery_flows.tasks.lease import UNKNOWN_PAUSE_SECONDS, let_go, passed_on, surely, surely_held
from celery_flows.tasks.loop import Loop, call
from celery_flows.tasks.metrics import LEASES_LOST
from celery_flows.tasks.payloads import result_codec
from celery_flows.tasks.retry import NEVER, RetryRule
from celery_flows.tasks.runtime import Runtime, claim_token
from celery_flows.tasks.timeout import TimeIsUp
from celery_flows.tasks.watch import Attempt

log = logging.getLogger("celery_flows.steps")


@dataclass(frozen=True, slots=True)
class Delivery:
    """The message that brought us here, as far as it matters."""

    worker: str  # our token
    queue: str | None
    time_limited: bool
    hostname: str | None = None


def run_step(runtime: Runtime, run_id: str, delivery: Delivery) -> None:
    """Runs one Celery step, if its row is there to be claimed; then the flow itself, if this was what it waited for."""
    if passed_on(runtime, run_id):
        return
    asked_at, lease = boottime(), runtime.settings.lease_seconds
    claim: StepClaim | None = runtime.store.attempt(
        Call(dispatch.claim_step, (run_id, claim_token(delivery.worker), lease)), again={"repeat": True}
    )
    if claim is None:
        return
    task = runtime.app.tasks.get(claim.task)
    if task is None:
        log.error("no task %r here; step %s waits for a worker that has it", claim.task, run_id)
        runtime.store.run(dispatch.hand_back, claim.holder, UNKNOWN_PAUSE_SECONDS)
        return
    try:
        surely_held(runtime, claim.holder, asked_at + lease)  # the claim may have taken longer than a lease itself
        with runtime.watch.celery_step(runtime, claim) as made:
            while (outcome := _attempt(runtime, claim, task, delivery)) is None:
                surely_held(runtime, claim.holder, boottime())
            completed = settle(runtime, claim, outcome)
            tell(made, outcome)
    except LeaseLost as lost:
        runtime.watch.meter.add(LEASES_LOST, ("step",))
        log.info("%s", lost)
        return
    except StoreError as error:
        let_go(runtime, claim.holder, error)
        raise
    if completed is not None and completed.woke:
        go_on(runtime, claim, completed.queue, delivery)


@dataclass(frozen=True, slots=True)
class Again:
    """The step is tried again."""

    pause: float  # seconds
    error: dict[str, Any]


Outcome = Completion | Again


def _attempt(runtime: Runtime, claim: StepClaim, task: Task[Any, Any], delivery: Delivery) -> Outcome | None:
    """What an attempt comes to; None: it was interrupted by mistake, and is to be made again."""
    if claim.cancel_requested and not claim.args.get("cleanup"):
        return cancelled(claim)
    try:
        runtime.before_body(claim.task, task.run)
        value = _call(runtime, task, claim, delivery)
        result = result_codec(task.run).encode(
            f"result of step {claim.task}", value, runtime.settings.max_payload_bytes
        )
    except Interrupted:
        if not runtime.store.run(dispatch.list_to_stop, [_token(claim)]):
            return None
        return cancelled(claim)
    except Retry as retry:
        error = of_attempt(retry.exc) if retry.exc is not None else {"type": "Retry", "message": ""}
        return Again(_delay_seconds(retry.when), error)
    except Ignore:
        return Completion(claim.holder, claim.flow_id, FlowStepStatus.SUCCEEDED)
    except (TimeIsUp, SoftTimeLimitExceeded):
        return failed(claim, timed_out(claim.task, claim.args.get("timeout")))
    except (Exception, CancelledError, Reject) as error:
        return failed(claim, error)
    except BaseException as error:
        let_go(runtime, claim.holder, error)
        raise
    return Completion(claim.holder, claim.flow_id, FlowStepStatus.SUCCEEDED, result=result)


def cancelled(claim: StepClaim) -> Completion:
    """What an attempt comes to that its flow's cancelling forestalled, or cut off."""
    return Completion(claim.holder, claim.flow_id, FlowStepStatus.CANCELLED)


def _interruptible(runtime: Runtime, claim: StepClaim) -> Interruptible:
    in_peace = claim.args.get("cleanup") or claim.args.get("undoing")
    return IN_PEACE if in_peace else Interruptible(runtime.interrupts, _token(claim))


def _token(claim: StepClaim) -> str:
    assert claim.holder.worker is not None  # what was claimed is held
    return claim.holder.worker


def failed(claim: StepClaim, error: BaseException) -> Outcome:
    """What an attempt comes to that raised: another one, if the step's policy says so."""
    rule = NEVER if (policy := claim.args.get("retry")) is None else RetryRule.of(policy)
    pause, told = rule.pause_after(claim.attempt, error), of_attempt(error)
    again = "for good" if pause is None else f"and is tried again in {pause:.1f} s"
    log.warning("step %s of flow %s failed %s: %s", claim.task, claim.flow_id, again, told["type"])
    if pause is not None:
        return Again(pause, told)
    return Completion(claim.holder, claim.flow_id, FlowStepStatus.FAILED, error=told)


def _call(runtime: Runtime, task: Task[Any, Any], claim: StepClaim, delivery: Delivery) -> Any:
    """Calls the task under a request of its own. As an eager one, so that ``retry()`` raises instead of publishing. One
    that is an async function, which Celery would not await, runs in an event loop."""
    args, kwargs = claim.args["args"], claim.args["kwargs"]
    _task_stack.push(task)
    task.push_request(
        id=claim.holder.run_id, args=args, kwargs=kwargs, retries=claim.attempt - 1, is_eager=True,
        called_directly=False, root_id=str(claim.flow_id), parent_id=str(claim.flow_id), hostname=delivery.hostname,
        delivery_info={"is_eager": True, "routing_key": delivery.queue},
    )  # fmt: skip
    try:
        function = task if task_has_custom(task, "__call__") else task.run
        with closing(Loop()) as loop:
            return call(loop, function, args, kwargs, claim.args.get("timeout"), _interruptible(runtime, claim))
    finally:
        task.pop_request()
        _task_stack.pop()


def settle(runtime: Runtime, claim: StepClaim, outcome: Outcome, **how: Any) -> dispatch.Completed | None:
    """Records what an attempt came to; None: the step is not closed, or no longer this claim's."""
    if isinstance(outcome, Again):
        again = (claim.holder, claim.flow_id, claim.attempt, outcome.pause, outcome.error)
        if not runtime.store.run(dispatch.retry_step, *again):
            log.info("step %s: its lease was lost, its retry is not recorded", claim.holder.run_id)
        return None
    completed: dispatch.Completed | None = runtime.store.attempt(
        Call(dispatch.complete_step, (outcome,)),
        settled=Call(dispatch.find_completion, (outcome,)),
        **{**surely(runtime), **how},
    )
    if completed is None:
        runtime.watch.meter.add(LEASES_LOST, ("step",))
        log.info("step %s: its lease was lost, its outcome is refused", claim.holder.run_id)
    return completed


def time_out(runtime: Runtime, worker: str) -> bool:
    """Records that a step took too long, its process having been ended for that: ``worker`` is the beginning of its
    holder's token. False: it holds no step any more."""
    return _settle_for(runtime, worker, lambda claim: failed(claim, timed_out(claim.task, claim.args.get("timeout"))))


def cancel_stopped(runtime: Runtime, worker: str) -> bool:
    """Records that a step was cancelled, its process having been ended over it; as :func:`time_out`."""
    return _settle_for(runtime, worker, cancelled)


def _settle_for(runtime: Runtime, worker: str, outcome: Callable[[StepClaim], Outcome]) -> bool:
    claim: StepClaim | None = runtime.store.run(dispatch.find_step_claim, worker)
    if claim is None:
        return False
    came_to = outcome(claim)
    # Whoever asks sees to the leases of others, too, and asks again: no lock may hold that up for long.
    completed = settle(runtime, claim, came_to, lock_tries=TRIES)
    tell(made := Attempt(claim.definition, claim.task), came_to)
    runtime.watch.settled(made)
    if completed is not None and completed.woke:
        runtime.call_worker(str(claim.flow_id))
    return True


def tell(made: Attempt, outcome: Outcome) -> None:
    """Says to whoever watches what an attempt came to."""
    error = (outcome.error or {}).get("type")
    made.came_to("retried" if isinstance(outcome, Again) else outcome.status.value, error)


def go_on(runtime: Runtime, claim: StepClaim, queue: str | None, delivery: Delivery) -> None:
    """Drives the flow on right here, if this worker may: the flow's queue, no time limit of the step's, code it knows.
    Else sends the message."""
    served = (queue or runtime.default_queue()) == delivery.queue
    if served and not delivery.time_limited and runtime.registry.get(claim.definition) is not None:
        drive(runtime, claim.flow_id, delivery.worker)
    else:
        runtime.publisher.publish(dispatch.Hint(str(claim.flow_id), claim.flow_id, "drive", claim.definition, queue))


def _delay_seconds(when: Any) -> float:
    if isinstance(when, datetime):
        moment = when if when.tzinfo is not None else when.replace(tzinfo=UTC)
        return max(0.0, (moment - datetime.now(UTC)).total_seconds())
    return max(0.0, float(when or 0))


def delivery_of(request: Any, worker: str) -> Delivery:
    """What a Celery request says of its message."""
    info: Mapping[str, Any] = request.delivery_info or {}
    return Delivery(worker, info.get("routing_key"), any(request.timelimit or ()), request.hostname)
