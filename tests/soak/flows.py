"""The soak's flows, of every kind. A further kind is a function and a line at the end."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from functools import partial

from celery import Celery

from celery_flows import FlowCancelled, Flows, Run, StepFailed, WaitTimedOut
from tests.soak.application import (
    BROKER,
    CANCELLED_OR_TOO_LATE,
    DATABASE,
    EFFECTS,
    FAILED,
    LEASE_SECONDS,
    LONG,
    QUEUE,
    TOPIC,
    Application,
    Kind,
    Order,
    Receipt,
)
from tests.soak.bodies import Bodies, Steps, define_bodies
from tests.support.effects import EffectLog


def open_application(environment: Mapping[str, str]) -> Application:
    """The application of this environment, in a new app."""
    app = Celery("soak", broker=environment[BROKER], set_as_current=False)
    app.conf.update(
        task_default_queue=QUEUE,
        worker_prefetch_multiplier=1,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        beat_schedule={"prune often": {"task": "flows.prune", "schedule": 7.0}},
        flow_store_url=environment[DATABASE],
        flow_lease_seconds=LEASE_SECONDS,
        flow_republish_max_seconds=20,  # what is flushed again and again is not to wait for minutes in the end
        flow_max_crashes=1000,  # a monkey strikes the same flow more often than fate does
    )
    flows = Flows(app)
    return Application(app, flows, define_flows(flows, define_bodies(app, EffectLog(environment[EFFECTS]))))


def define_flows(flows: Flows, bodies: Bodies) -> tuple[Kind, ...]:
    """The flows, each with what must come of it."""
    work, elsewhere, retried, retries = bodies.work, bodies.elsewhere, bodies.retried, bodies.retries

    @flows.flow("soak/inline")
    def inline(run: Run, _: Order) -> Receipt:
        """Steps in the driver's own process."""
        here = Steps(run, work)
        return Receipt(did=[here(f"inline {number}") for number in range(6)])

    @flows.flow("soak/celery")
    def celery(run: Run, _: Order) -> Receipt:
        """Celery steps, one after another."""
        return Receipt(did=[run.step(elsewhere, str(run.flow_id), f"celery {number}") for number in range(4)])

    @flows.flow("soak/gather")
    def gather(run: Run, _: Order) -> Receipt:
        """Celery steps side by side, twice."""
        did: list[str] = []
        for group in "ab":
            did += run.gather(elsewhere.s(str(run.flow_id), f"member {group}{number}") for number in range(5))
        return Receipt(did=did)

    @flows.flow("soak/long")
    def long(run: Run, _: Order) -> Receipt:
        """A step inline and a Celery step that each take longer than a lease."""
        here = Steps(run, work)
        return Receipt(did=[here("long", LONG), run.step(elsewhere, str(run.flow_id), "longer", LONG)])

    @flows.flow("soak/timers")
    def timers(run: Run, _: Order) -> Receipt:
        """Timers between steps."""
        here = Steps(run, work)
        did = [here("before")]
        for number in range(2):
            run.sleep(timedelta(seconds=1))
            did.append(here(f"after {number}"))
        return Receipt(did=did)

    def wait(run: Run, order: Order, timeout: timedelta | None = None) -> Receipt:
        here = Steps(run, work)
        did = [here("before")]
        try:
            heard = run.wait_for(TOPIC, order.key, timeout=timeout)["number"]
        except WaitTimedOut:
            heard = None
        return Receipt(did=[*did, here("after")], heard=[heard])

    @flows.flow("soak/event")
    def event(run: Run, order: Order) -> Receipt:
        """An event of its own."""
        return wait(run, order)

    @flows.flow("soak/queue")
    def queue(run: Run, order: Order) -> Receipt:
        """One of the events that several flows wait for."""
        return wait(run, order)

    @flows.flow("soak/timeout")
    def timeout(run: Run, order: Order) -> Receipt:
        """An event that comes, if at all, about when the time is up."""
        return wait(run, order, timedelta(seconds=1.5))

    @flows.flow("soak/retry")
    def retry(run: Run, _: Order) -> Receipt:
        """Celery steps that fail at first, and are tried again as Celery does."""
        flow_id = str(run.flow_id)
        return Receipt(did=[run.step(retried, flow_id, "retried"), run.step(retries, flow_id, "retries")])

    @flows.flow("soak/cancel")
    def cancel(run: Run, _: Order) -> Receipt:
        """A saga that is cancelled at some time: what it did is undone, inline and as a Celery step."""
        here, flow_id = Steps(run, work), str(run.flow_id)
        try:
            did = [here("do")]
            did += run.gather(elsewhere.s(flow_id, f"do {number}", 0.5) for number in range(4))
            run.sleep(timedelta(seconds=1))
            return Receipt(did=[*did, here("done", 0.5)])
        except FlowCancelled:
            here("undo")
            run.step(elsewhere, flow_id, "undo elsewhere")
            raise

    @flows.flow("soak/child")
    def child(run: Run, _: Order) -> Receipt:
        """A flow that others run as a step of theirs."""
        here = Steps(run, work)
        did = [here("young"), run.step(elsewhere, str(run.flow_id), "younger")]
        run.sleep(timedelta(seconds=0.5))
        return Receipt(did=[*did, here("grown")])

    @flows.flow("soak/parent")
    def parent(run: Run, _: Order) -> Receipt:
        """Children side by side with a Celery step, and one by itself."""
        here, flow_id = Steps(run, work), str(run.flow_id)
        run.gather([child.s(Order()), child.s(Order())])
        did = [here("between"), run.step(elsewhere, flow_id, "elsewhere")]
        return Receipt(did=[*did, *run.flow(child, Order()).did])

    @flows.flow("soak/recall")
    def recall(run: Run, _: Order) -> Receipt:
        """A parent that is cancelled at some time, and so are its children, before it undoes what it did."""
        here, flow_id = Steps(run, work), str(run.flow_id)
        try:
            did = [here("do")]
            run.gather([child.s(Order()), child.s(Order())])
            return Receipt(did=[*did, here("done", 0.5)])
        except FlowCancelled:
            here("undo")
            run.step(elsewhere, flow_id, "undo elsewhere")
            raise

    @flows.flow("soak/failure")
    def failure(run: Run, _: Order) -> Receipt:
        """Catches the failure of one of its members, then fails of another."""
        here, flow_id = Steps(run, work), str(run.flow_id)
        try:
            run.gather([elsewhere.s(flow_id, "good"), elsewhere.s(flow_id, "bad", fails=True)])
        except StepFailed:
            here("caught")
        here("fails", fails=True)
        raise AssertionError("the step above did not fail")

    done = ("do", "do 0", "do 1", "do 2", "do 3", "done")
    grown = ("young", "younger", "grown")
    waits = partial(Kind, did=("before", "after"), hears=1)
    saga = partial(Kind, ends=CANCELLED_OR_TOO_LATE, cancelled=True, undoes=("undo", "undo elsewhere"))
    return (
        Kind(inline, tuple(f"inline {number}" for number in range(6))),
        Kind(celery, tuple(f"celery {number}" for number in range(4))),
        Kind(gather, tuple(f"member {group}{number}" for group in "ab" for number in range(5))),
        Kind(long, ("long", "longer")),
        Kind(timers, ("before", "after 0", "after 1")),
        waits(event),
        waits(queue, shares=True),
        waits(timeout, patient=False),
        Kind(retry, ("retried", "retries")),
        saga(cancel, did=done),
        Kind(child, grown, ends=CANCELLED_OR_TOO_LATE, by_parents=True),
        Kind(parent, ("between", "elsewhere", *grown)),
        saga(recall, did=("do", "done")),
        Kind(failure, (), ends=FAILED),
    )
