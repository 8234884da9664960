"""The flows that are simulated, and the application they belong to."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from celery import Celery, Signature

from celery_flows import FlowCancelled, Flows, Run, StepFailed, WaitTimedOut
from celery_flows.tasks.run import run_id_of
from tests.simulation.invariants import Observer
from tests.simulation.world import SimulatedPublisher, Violation, World, make_store

store = make_store()
observer = Observer(store)
store.observer = observer

app = Celery("simulation", broker="memory://", set_as_current=False)
app.conf.update(task_default_queue="simulation", flow_lease_seconds=30, flow_republish_seconds=5, flow_max_crashes=4)
flows = Flows(app, store=store)
flows.runtime.__dict__["publisher"] = SimulatedPublisher()

RETRY_SECONDS = 20


def effect(flow_id: str, name: str, *, cleanup: bool = False, run_id: str | None = None) -> str:
    """A step's body: begins, may be interrupted, has its effect."""
    world = World.current
    from uuid import UUID

    observer.begin_step(world.me(), flow_id, run_id or run_id_of(UUID(flow_id), name, 1), cleanup=cleanup)
    world.stop_here(f"in {name}")
    world.effects.append((flow_id, name))
    return name


def one(flow_id: str) -> str:
    return effect(flow_id, "one")


def two(flow_id: str) -> str:
    return effect(flow_id, "two")


def three(flow_id: str) -> str:
    return effect(flow_id, "three")


def undo(flow_id: str) -> str:
    return effect(flow_id, "undo", cleanup=True)


@app.task(bind=True, name="simulation.member", shared=False)
def member(self: Any, flow_id: str, number: int, fails: bool = False) -> int:
    """A Celery step."""
    effect(flow_id, f"member-{number}", run_id=self.request.id)
    if fails:
        raise RuntimeError(f"member {number} fails")
    return number


@app.task(bind=True, name="simulation.retried", shared=False, max_retries=2)
def retried(self: Any, flow_id: str) -> int:
    """A Celery step that succeeds at its second attempt."""
    world = World.current
    if self.request.retries and world.clock < world.not_before[self.request.id]:
        raise Violation("(7) an attempt begins before its backoff has passed")
    effect(flow_id, "retried", run_id=self.request.id)
    if self.request.retries < 1:
        raise self.retry(countdown=RETRY_SECONDS, exc=RuntimeError("not yet"))
    return int(self.request.retries)


def members(run: Run, count: int, fails: int | None = None) -> list[Signature[int]]:
    return [member.s(str(run.flow_id), number, number == fails) for number in range(count)]


@flows.flow("inline")
def inline(run: Run) -> list[str]:
    return [run.step(body, str(run.flow_id)) for body in (one, two, three)]


@flows.flow("gather")
def gather(run: Run) -> int:
    run.step(one, str(run.flow_id))
    first = sum(run.gather(members(run, 3)))
    run.step(two, str(run.flow_id))
    return first + int(run.step(member, str(run.flow_id), 7))


@flows.flow("gather-fails")
def gather_fails(run: Run) -> str:
    """A member fails, the flow catches that and goes on with another join while stragglers run."""
    try:
        run.gather(members(run, 3, fails=1))
    except StepFailed:
        run.step(undo, str(run.flow_id))
        run.step(member, str(run.flow_id), 8)
        return run.step(two, str(run.flow_id))
    return "no member failed"


@flows.flow("gather-fails-for-good")
def gather_fails_for_good(run: Run) -> None:
    run.gather(members(run, 3, fails=0))


@flows.flow("cleanup")
def cleanup(run: Run) -> None:
    """Is cancelled with members out, and cleans up."""
    try:
        run.gather(members(run, 2))
        run.sleep(timedelta(seconds=50))
        run.step(one, str(run.flow_id))
    except FlowCancelled:
        run.step(undo, str(run.flow_id))
        raise


@flows.flow("retry")
def retry(run: Run) -> int:
    return int(run.step(retried, str(run.flow_id)))


@flows.flow("sleep")
def sleep(run: Run) -> str:
    run.step(one, str(run.flow_id))
    run.sleep(timedelta(seconds=40))
    return run.step(two, str(run.flow_id))


@flows.flow("event")
def event(run: Run) -> str:
    run.step(one, str(run.flow_id))
    payload = run.wait_for("topic", "key")
    run.step(two, str(run.flow_id))
    return str(payload)


@flows.flow("event-timeout")
def event_timeout(run: Run) -> str:
    try:
        payload = run.wait_for("topic", "key", timeout=timedelta(seconds=25))
    except WaitTimedOut:
        payload = "timed out"
    run.step(two, str(run.flow_id))
    return str(payload)
