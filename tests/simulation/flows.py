"""The flows that are simulated, and the application they belong to."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any
from uuid import UUID

from celery import Celery, Signature

from celery_flows import (
    AsyncRun,
    Event,
    FlowCancelled,
    Flows,
    FlowTimedOut,
    Limit,
    Retry,
    Run,
    StepFailed,
    WaitTimedOut,
)
from celery_flows.store import dispatch
from celery_flows.tasks.interrupts import Interrupted
from celery_flows.tasks.replay import run_id_of
from tests.simulation.invariants import Observer
from tests.simulation.world import (
    Crash,
    SimulatedInterrupts,
    SimulatedPublisher,
    SimulatedStopping,
    Violation,
    World,
    make_store,
)

MAX_CRASHES = 4

store = make_store()
observer = Observer(store)
store.observer = observer

app = Celery("simulation", broker="memory://", set_as_current=False)
app.conf.update(
    task_default_queue="simulation", flow_lease_seconds=30, flow_republish_seconds=5, flow_max_crashes=MAX_CRASHES
)
flows = Flows(app, store=store)
flows.runtime.__dict__["publisher"] = SimulatedPublisher()
flows.runtime.stopping = SimulatedStopping()  # type: ignore[assignment]
flows.runtime.interrupts = SimulatedInterrupts()  # type: ignore[assignment]

RETRY_SECONDS = 20


def effect(flow_id: str, name: str, *, cleanup: bool = False, run_id: str | None = None) -> str:
    """A step's body: begins, may be interrupted, has its effect."""
    world = World.current
    actor = world.me()
    observer.begin_step(actor, flow_id, run_id or run_id_of(UUID(flow_id), name, 1), cleanup=cleanup)
    for _ in range(world.stops_in_a_body):
        world.stop_here(f"in {name}")
        if actor is not None and actor.in_body is not None and actor.interrupted:
            raise Interrupted
    world.effects.append((flow_id, name))
    return name


def kill(flow_id: str, name: str, run_id: str | None = None) -> None:
    """A step's body that ends its process."""
    world = World.current
    actor = world.me()
    assert actor is not None
    effect(flow_id, name, run_id=run_id)
    world.deaths[flow_id, name] += 1
    world.lose(leases_of(actor.token))
    world.say(f"{actor.name} is killed by {name}")
    actor.dead = True
    if world.rng.random() < 0.7:
        world.spawn("parent", lambda: store.run(dispatch.release, [actor.token]))
    raise Crash


def leases_of(token: str) -> list[tuple[str, int]]:
    """The rows that a worker holds, with their fences."""
    held = "SELECT run_id, fence FROM flow_dispatch WHERE worker LIKE ?"
    return [(run_id, fence) for run_id, fence in observer.rows(held, f"{token}/%")]


def one(flow_id: str) -> str:
    return effect(flow_id, "one")


def two(flow_id: str) -> str:
    return effect(flow_id, "two")


def three(flow_id: str) -> str:
    return effect(flow_id, "three")


def undo(flow_id: str) -> str:
    return effect(flow_id, "undo", cleanup=True)


def deadly(flow_id: str) -> None:
    kill(flow_id, "deadly")


@app.task(bind=True, name="simulation.member", shared=False)
def member(self: Any, flow_id: str, number: int, fails: bool = False) -> int:
    """A Celery step."""
    effect(flow_id, f"member-{number}", run_id=self.request.id)
    if fails:
        raise RuntimeError(f"member {number} fails")
    return number


@app.task(bind=True, name="simulation.retried", shared=False, max_retries=1)
def retried(self: Any, flow_id: str, attempts: int = 2) -> int:
    """A Celery step that succeeds at its ``attempts``-th attempt, if it has so many."""
    world = World.current
    if self.request.retries and world.clock < world.not_before[self.request.id]:
        raise Violation("(7) an attempt begins before its backoff has passed")
    effect(flow_id, "retried", run_id=self.request.id)
    if self.request.retries + 1 < attempts:
        raise self.retry(countdown=RETRY_SECONDS, exc=RuntimeError("not yet"))
    return int(self.request.retries)


@app.task(bind=True, name="simulation.poison", shared=False)
def poison(self: Any, flow_id: str) -> None:
    """A Celery step that kills whoever runs it."""
    kill(flow_id, "poison", self.request.id)


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


@flows.flow("two-joins")
def two_joins(run: Run) -> str:
    """After a join that failed another follows; then it cleans up if it is cancelled."""
    try:
        try:
            run.gather(members(run, 3, fails=1))
        except StepFailed:
            run.gather([member.s(str(run.flow_id), number) for number in (8, 9)])
        return run.step(two, str(run.flow_id))
    except FlowCancelled:
        run.step(undo, str(run.flow_id))
        raise


@flows.flow("parent")
def parent(run: Run) -> str:
    """Runs flows as steps of its own, beside a Celery step, and cleans up if it is cancelled."""
    try:
        run.gather([member.s(str(run.flow_id), 1), inline.s(), gather.s()])
        return run.step(two, str(run.flow_id))
    except FlowCancelled:
        run.step(undo, str(run.flow_id))
        raise


@flows.flow("gather-fails-for-good")
def gather_fails_for_good(run: Run) -> None:
    run.gather(members(run, 3, fails=0))


@flows.flow("cleanup")
def cleanup(run: Run) -> None:
    """Is cancelled with members out, and cleans up, here and by a Celery step."""
    try:
        run.gather(members(run, 2))
        run.sleep(timedelta(seconds=50))
        run.step(one, str(run.flow_id))
    except FlowCancelled:
        run.step(undo, str(run.flow_id))
        run.step(member, str(run.flow_id), 9)
        raise


@flows.flow("retry")
def retry(run: Run) -> int:
    return int(run.step(retried, str(run.flow_id)))


@flows.flow("retry-fails")
def retry_fails(run: Run) -> str:
    try:
        run.step(retried, str(run.flow_id), 3)
    except StepFailed:
        return run.step(two, str(run.flow_id))
    return "the step did not fail"


@flows.flow("poisoned-step")
def poisoned_step(run: Run) -> str:
    try:
        run.step(poison, str(run.flow_id))
    except StepFailed as failed:
        run.step(two, str(run.flow_id))
        return failed.type
    return "the step did not fail"


@flows.flow("poisoned-driver")
def poisoned_driver(run: Run) -> None:
    run.step(one, str(run.flow_id))
    run.step(deadly, str(run.flow_id))


def flaky(flow_id: str) -> str:
    """Fails until it has had its effect before."""
    world = World.current
    began = (flow_id, "flaky") in world.effects
    if began and world.clock < world.not_before[run_id_of(UUID(flow_id), "flaky", 1)]:
        raise Violation("(7) an inline attempt begins before its pause has passed")
    effect(flow_id, "flaky")
    if not began:
        raise RuntimeError("not yet")
    return "flaky"


@flows.flow("inline-retry")
def inline_retry(run: Run) -> str:
    """A step is tried again after a pause that frees its worker; a cancel may come meanwhile."""
    try:
        run.options(retry=Retry(20, initial=timedelta(seconds=RETRY_SECONDS), factor=1, jitter=False)).step(
            flaky, str(run.flow_id)
        )
        return run.step(two, str(run.flow_id))
    except FlowCancelled:
        run.step(undo, str(run.flow_id))
        raise


@flows.flow("window")
def window(run: Run) -> int:
    """So many members at a time, of which one fails; then a join of another group."""
    outcomes = run.gather(members(run, 6, fails=2), limit=2, return_exceptions=True)
    run.gather([member.s(str(run.flow_id), number) for number in (8, 9)])
    return len(outcomes)


@flows.flow("window-fails")
def window_fails(run: Run) -> str:
    try:
        run.gather(members(run, 5, fails=2), limit=2)
    except StepFailed:
        run.step(undo, str(run.flow_id))
        return run.step(two, str(run.flow_id))
    return "no member failed"


@flows.flow("race")
def race(run: Run) -> int:
    """The first success goes on, and another join follows while losers run."""
    first = run.first(members(run, 3, fails=0))
    return int(first.value) + len(run.gather([member.s(str(run.flow_id), number) for number in (8, 9)]))


@flows.flow("deadline", timeout=timedelta(seconds=60))
def deadline(run: Run) -> None:
    """Is past its deadline before its timer."""
    try:
        run.gather(members(run, 2))
        run.sleep(timedelta(seconds=500))
    except FlowTimedOut:
        run.step(undo, str(run.flow_id))
        raise


@flows.flow("saga")
def saga(run: Run) -> None:
    """Fails with a member running, and undoes what it did, here and by a Celery step."""
    run.on_failure(undo, str(run.flow_id))
    run.on_failure(member, str(run.flow_id), 9)
    run.gather(members(run, 3, fails=1))


@flows.flow("broken")
def broken(run: Run) -> str:
    """A member fails, until somebody goes back."""
    is_mended = run._replay.driver.flow.forked_from is not None
    run.step(one, str(run.flow_id))
    run.update(told=True)
    run.gather(members(run, 3, fails=None if is_mended else 1))
    return run.step(two, str(run.flow_id))


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


@flows.flow("choice")
def choice(run: Run) -> str:
    """Waits for one of two events; what came for the other is given back."""
    run.step(one, str(run.flow_id))
    _, payload = run.first([Event("topic", "key"), Event("topic", "other")])
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


# ---- async functions ------------------------------------------------------------------------------------------------


async def beside(flow_id: str, number: int, fails: bool = False) -> int:
    """Runs beside its siblings, which go on wherever it awaits."""
    world = World.current
    observer.begin_step(world.me(), flow_id, run_id_of(UUID(flow_id), "beside", number + 1))
    actor = world.me()
    assert actor is not None
    actor.running_beside += 1
    try:
        for _ in range(world.rng.randrange(4)):
            world.stop_here(f"in beside-{number}")
            await asyncio.sleep(0)
    finally:
        actor.running_beside -= 1
    if fails:
        raise RuntimeError(f"member {number} fails")
    world.effects.append((flow_id, f"beside-{number}"))
    return number


async def deaf(flow_id: str) -> str:
    """Does not heed that it is cancelled."""
    world = World.current
    observer.begin_step(world.me(), flow_id, run_id_of(UUID(flow_id), "deaf", 1))
    for _ in range(3):
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(0)
    return "deaf"


async def flaky_beside(flow_id: str, number: int) -> str:
    """Fails the first time."""
    world = World.current
    run_id, name = run_id_of(UUID(flow_id), "flaky_beside", number + 1), f"flaky-{number}"
    observer.begin_step(world.me(), flow_id, run_id)
    if run_id in world.not_before and world.clock < world.not_before[run_id]:
        raise Violation("(7) an attempt beside others begins before its pause has passed")
    await asyncio.sleep(0)
    world.stop_here(f"in {name}")
    world.effects.append((flow_id, name))
    if world.effects.count((flow_id, name)) == 1:
        raise RuntimeError("not yet")
    return name


async def undo_beside(flow_id: str) -> str:
    """Cleans up: nothing of the flow runs beside it."""
    world = World.current
    if (actor := world.me()) is not None and actor.running_beside:
        raise Violation(f"(12) {actor.name} cleans up beside a running member")
    return effect(flow_id, "undo", cleanup=True, run_id=run_id_of(UUID(flow_id), "undo_beside", 1))


def all_beside(run: AsyncRun | Run, count: int, fails: int | None = None) -> list[Any]:
    return [partial(beside, str(run.flow_id), number, number == fails) for number in range(count)]


def flaky_ones(flow_id: str) -> list[Any]:
    return [partial(flaky_beside, flow_id, number) for number in range(2)]


@flows.flow("async")
async def side_by_side(run: AsyncRun) -> int:
    """Steps of each kind, one after the other and side by side, and a wait."""
    flow_id = str(run.flow_id)
    await run.step(one, flow_id)
    count = len(await run.gather(all_beside(run, 4), limit=3))
    await run.sleep(timedelta(seconds=40))
    return count + len(await run.gather([member.s(flow_id, 7), partial(deaf, flow_id)]))


@flows.flow("async-fails")
async def side_by_side_fails(run: AsyncRun) -> str:
    """A member fails, the flow catches that, and cleans up beside nothing."""
    try:
        await run.gather(all_beside(run, 4, fails=2))
    except StepFailed:
        await run.step(undo_beside, str(run.flow_id))
        return await run.step(two, str(run.flow_id))
    return "no member failed"


@flows.flow("async-retry")
async def side_by_side_retried(run: AsyncRun) -> int:
    """Some of its members are tried again after a pause, which may free the worker when the others have ended; a cancel
    may come meanwhile."""
    flow_id = str(run.flow_id)
    retry = Retry(3, initial=timedelta(seconds=RETRY_SECONDS), factor=1, jitter=False)
    try:
        return len(await run.options(retry=retry).gather([*flaky_ones(flow_id), *all_beside(run, 2)], limit=2))
    except FlowCancelled:
        await run.step(undo_beside, flow_id)
        raise


@flows.flow("plain-beside")
def beside_in_a_plain_flow(run: Run) -> int:
    return len(run.gather(all_beside(run, 3))) + len(run.step(deaf, str(run.flow_id)))


@flows.flow("limited", limit=Limit(2))
def limited(run: Run) -> str:
    """Works here, has a member, sleeps, and works again."""
    run.step(one, str(run.flow_id))
    run.step(member, str(run.flow_id), 1)
    run.sleep(timedelta(seconds=20))
    return run.step(two, str(run.flow_id))


@flows.flow("limited-tree", limit=Limit(1))
def limited_tree(run: Run, depth: int) -> int:
    """Runs flows of its own limit as steps, beside a member, and takes a member's place of its own after that."""
    run.step(one, str(run.flow_id))
    if not depth:
        return 1
    leaves = run.gather([member.s(str(run.flow_id), 1), limited_tree.s(depth - 1), limited_tree.s(depth - 1)])
    return int(sum(leaves)) + int(run.step(member, str(run.flow_id), 0))


@flows.flow("limited-starts", limit=Limit(2, every=timedelta(seconds=45), at_once=1))
def limited_starts(run: Run) -> str:
    run.step(one, str(run.flow_id))
    run.sleep(timedelta(seconds=5))
    return run.step(two, str(run.flow_id))


@flows.flow("limited-deadline", limit=Limit(1), timeout=timedelta(seconds=60))
def limited_deadline(run: Run) -> str:
    """May be past its deadline while it queues."""
    try:
        run.step(one, str(run.flow_id))
        run.step(member, str(run.flow_id), 1)
        return run.step(two, str(run.flow_id))
    except FlowTimedOut:
        run.step(undo, str(run.flow_id))
        raise


observer.bounds = {
    definition.name: definition.limit.bounds for definition in flows.runtime.registry if definition.limit is not None
}
