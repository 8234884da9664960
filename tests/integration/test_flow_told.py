"""What a flow is told - that it is cancelled, or past its deadline - it is told the same in every run of its function,
and nothing of it is at work then. Each of these once ended wrongly, or never."""

from __future__ import annotations

import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from celery_flows import FlowCancelled, FlowFailed, FlowHandle, FlowStatus, FlowTimedOut, Run, StepFailed
from celery_flows.store import FlowStepStatus, dispatch
from celery_flows.store.changes import Completion
from celery_flows.store.dispatch import StepClaim
from celery_flows.store.tables import flows
from tests.support.bench import Bench
from tests.support.waiting import until

TIMEOUT = timedelta(seconds=0.8)


def tasks(bench: Bench) -> tuple[Any, Any]:
    """A task that charges, and one that gives back."""

    @bench.task("charge")
    def charge(number: int = 0) -> int:
        bench.effects.append(f"charged {number}")
        return number

    @bench.task("release")
    def release() -> None:
        bench.effects.append("released")

    return charge, release


def pass_deadline(bench: Bench, handle: FlowHandle[Any]) -> None:
    """Waits until the flow is past its deadline, and drives it."""
    past = flows.select().where(flows.c.id == handle.id, flows.c.deadline_at < sa.func.now())
    if bench.store.engine.dialect.name == "sqlite":
        past = flows.select().where(flows.c.deadline_at < sa.text("strftime('%Y-%m-%d %H:%M:%f', 'now')"))
    until(lambda: bench.query(past), "the deadline passes")
    bench.drive(handle.id)


def begin_member(bench: Bench, run_id: str) -> StepClaim:
    """Another worker is at work on this member."""
    claim = bench.store.run(dispatch.claim_step, run_id, "node/1/request/claim", 30.0)
    assert claim is not None
    return claim


def end_member(bench: Bench, claim: StepClaim) -> None:
    done = Completion(claim.holder, claim.flow_id, FlowStepStatus.SUCCEEDED, result="1")
    assert bench.store.run(dispatch.complete_step, done) is not None


def to_the_end(bench: Bench, handle: FlowHandle[Any]) -> FlowStatus:
    """Works, with all times passed, until the flow has ended."""
    for _ in range(30):
        bench.work()
        if handle.status().is_terminal:
            return handle.status()
        bench.pass_time()
        bench.sweep()
    raise AssertionError(f"it does not end: {handle.get()}")


def steps_out(bench: Bench) -> list[str]:
    return [run_id for kind, run_id in bench.claimable() if kind == "step"]


# ---- deadlines ------------------------------------------------------------------------------------------------------


def test_a_deadline_that_was_told_is_told_again_though_a_cancel_came_since(bench: Bench) -> None:
    _, release = tasks(bench)

    @bench.flows.flow("late", timeout=TIMEOUT)
    def late(run: Run) -> None:
        try:
            run.wait_for("pay", "x")
        except FlowTimedOut:
            run.step(release)
            raise
        except FlowCancelled:
            run.step(bench.effects.append, "told cancelled")
            raise

    handle = late.start()
    bench.drive(handle.id)
    pass_deadline(bench, handle)  # told; the release is out
    handle.cancel()
    assert to_the_end(bench, handle) is FlowStatus.CANCELLED
    assert bench.effects == ["released"]


def test_a_member_that_the_deadline_cancelled_does_not_make_it_a_cancel(bench: Bench) -> None:
    charge, release = tasks(bench)

    @bench.flows.flow("late", timeout=TIMEOUT)
    def late(run: Run) -> None:
        try:
            run.step(charge)
        except FlowTimedOut:
            run.step(release)
            raise
        except FlowCancelled:
            run.step(bench.effects.append, "told cancelled")
            raise

    handle = late.start()
    bench.drive(handle.id)
    pass_deadline(bench, handle)
    assert to_the_end(bench, handle) is FlowStatus.FAILED
    assert (handle.get().error_json or {})["type"] == "FlowTimedOut"
    assert bench.effects == ["released"]


def test_a_deadline_waits_for_the_member_that_runs(bench: Bench) -> None:
    charge, _ = tasks(bench)

    @bench.flows.flow("late", timeout=TIMEOUT)
    def late(run: Run) -> None:
        run.gather([charge.s(1), charge.s(2)])

    handle = late.start()
    bench.drive(handle.id)
    running = begin_member(bench, steps_out(bench)[0])
    pass_deadline(bench, handle)
    assert handle.status() is FlowStatus.RUNNING
    end_member(bench, running)
    assert to_the_end(bench, handle) is FlowStatus.FAILED
    assert (handle.get().error_json or {})["type"] == "FlowTimedOut"


def test_a_member_that_ends_as_the_deadline_is_told_leaves_one_path(bench: Bench) -> None:
    """It ends between the look at history and the drain: the telling begins anew, from what it came to."""
    charge, release = tasks(bench)
    running: list[StepClaim] = []

    @bench.flows.flow("late", timeout=TIMEOUT)
    def late(run: Run) -> None:
        if running:
            end_member(bench, running.pop())
            time.sleep(TIMEOUT.total_seconds())
        try:
            run.step(charge)
            run.step(bench.effects.append, "went on")
        except FlowTimedOut:
            run.step(release)
            raise

    handle = late.start()
    bench.drive(handle.id)
    running.append(begin_member(bench, steps_out(bench)[0]))
    bench.call_driver(handle.id)  # before the deadline, which passes in this run of the function
    bench.drive(handle.id)
    assert to_the_end(bench, handle) is FlowStatus.FAILED
    assert bench.effects == ["released"]


def test_a_childs_definition_has_its_timeout(bench: Bench) -> None:
    @bench.flows.flow("child", timeout=TIMEOUT)
    def child(run: Run) -> None:
        run.wait_for("never", "comes")

    @bench.flows.flow("parent")
    def parent(run: Run) -> str:
        try:
            run.flow(child)
        except StepFailed as failed:
            return failed.type
        return ""

    assert bench.finish(parent.start()) == "FlowTimedOut"


# ---- cancels --------------------------------------------------------------------------------------------------------


def test_no_cleanup_runs_beside_a_member_of_a_window_that_is_moved(bench: Bench) -> None:
    """The cancel comes with the very write that would move the window."""
    charge, _ = tasks(bench)
    cancels = [False]
    beside: list[Any] = []

    @bench.flows.flow("slides")
    def slides(run: Run) -> None:
        if cancels[0]:
            cancels[0] = False
            bench.flows.handle(run.flow_id).cancel()
        try:
            run.gather([charge.s(n) for n in range(6)], limit=3)
        except FlowCancelled:
            beside.append([row for row in bench.rows(run.flow_id) if row.kind == "step"])
            run.step(bench.effects.append, "cleaned up")
            raise

    handle = slides.start()
    bench.drive(handle.id)
    first, second, _ = steps_out(bench)
    running = begin_member(bench, second)
    cancels[0] = True
    bench.run_step(first)
    bench.work()
    assert "cleaned up" not in bench.effects
    end_member(bench, running)
    assert to_the_end(bench, handle) is FlowStatus.CANCELLED
    assert beside == [[]]


def test_no_cleanup_runs_beside_a_loser(bench: Bench) -> None:
    charge, _ = tasks(bench)
    beside: list[Any] = []
    cancels = [False]

    @bench.flows.flow("races")
    def races(run: Run) -> None:
        run.first([charge.s(1), charge.s(2)])
        if cancels[0]:
            cancels[0] = False
            bench.flows.handle(run.flow_id).cancel()
        try:
            run.wait_for("go", "on")
        except FlowCancelled:
            beside.append([row for row in bench.rows(run.flow_id) if row.kind == "step"])
            run.step(bench.effects.append, "cleaned up")
            raise

    handle = races.start()
    bench.drive(handle.id)
    loser, winner = steps_out(bench)
    running = begin_member(bench, loser)
    cancels[0] = True
    bench.run_step(winner)
    bench.work()
    assert "cleaned up" not in bench.effects
    end_member(bench, running)
    assert to_the_end(bench, handle) is FlowStatus.CANCELLED
    assert beside == [[]]


@pytest.mark.parametrize("kind", ["inline", "celery"])
def test_an_undo_by_hand_that_a_cancel_interrupts_is_done_all_the_same(bench: Bench, kind: str) -> None:
    _, release = tasks(bench)
    handle: FlowHandle[Any]

    def fails() -> None:
        if kind == "inline":
            handle.cancel()
        raise ValueError

    def give_back() -> None:
        bench.effects.append("released")

    @bench.flows.flow("undoes")
    def undoes(run: Run) -> str:
        run.on_failure(bench.effects.append, "undone")
        run.on_failure(give_back if kind == "inline" else release)
        with suppress(StepFailed):
            run.step(fails)
        run.undo()
        return "went on"

    handle = undoes.start()
    bench.drive(handle.id)
    if kind == "celery":
        handle.cancel()
    assert to_the_end(bench, handle) is FlowStatus.CANCELLED
    assert bench.effects == ["released", "undone"]


# ---- what cannot begin ----------------------------------------------------------------------------------------------


def test_an_undo_that_cannot_begin_keeps_neither_the_others_nor_the_reason(bench: Bench) -> None:
    charge, _ = tasks(bench)

    @bench.flows.flow("undoes")
    def undoes(run: Run) -> None:
        run.on_failure(bench.effects.append, "undone")
        run.on_failure(charge, object())
        raise LookupError("the real reason")

    with pytest.raises(FlowFailed, match="the real reason") as failed:
        bench.finish(undoes.start())
    assert failed.value.undo_failed == ("charge (InvalidData)",)
    assert bench.effects == ["undone"]


def test_an_undo_with_a_name_it_cannot_have_is_refused_at_once(bench: Bench) -> None:
    charge, _ = tasks(bench)

    @bench.flows.flow("undoes")
    def undoes(run: Run) -> None:
        run.options(name="give back").on_failure(charge, 1)

    with pytest.raises(FlowFailed, match="step name: is of plain functions"):
        bench.finish(undoes.start())


# ---- identity -------------------------------------------------------------------------------------------------------


def test_keyed_steps_may_come_in_another_order(bench: Bench) -> None:
    runs: list[int] = []

    def ship(order: str) -> str:
        bench.effects.append(order)
        if len(bench.effects) == 2:
            raise SystemExit
        return order

    @bench.flows.flow("ships")
    def ships(run: Run) -> list[str]:
        runs.append(1)
        orders = ["a", "b"] if len(runs) == 1 else ["b", "a"]
        return [run.options(key=order).step(ship, order) for order in orders]

    handle = ships.start()
    with pytest.raises(SystemExit):
        bench.work()
    bench.recover()
    assert bench.finish(handle) == ["b", "a"]
    assert bench.effects == ["a", "b", "b"]


@pytest.mark.parametrize("what", ["uuid", "random", "on_failure"])
def test_nothing_is_asked_of_the_run_inside_a_step(bench: Bench, what: str) -> None:
    @bench.flows.flow("asks")
    def asks(run: Run) -> None:
        def work() -> None:
            run.on_failure(len, []) if what == "on_failure" else getattr(run, what)()

        run.step(work)

    with pytest.raises(FlowFailed, match="steps do not nest"):
        bench.finish(asks.start())


def test_a_step_does_not_take_over_the_row_of_a_wait(bench: Bench) -> None:
    @bench.flows.flow("grows")
    def before(run: Run) -> None:
        run.sleep(timedelta(days=1))

    handle = before.start()
    bench.work()
    bench.runtime.registry._definitions.clear()

    @bench.flows.flow("grows")
    def after(run: Run) -> None:
        run.step(time.sleep, 0)
        run.sleep(timedelta(days=1))

    bench.call_driver(handle.id)
    bench.work()
    assert (handle.get().error_json or {})["type"] == "HistoryMismatch"


@pytest.mark.parametrize("method", ["sleep", "wait_for", "update", "now", "uuid"])
def test_options_that_mean_nothing_are_refused(bench: Bench, method: str) -> None:
    arguments: dict[str, tuple[Any, ...]] = {"sleep": (timedelta(1),), "wait_for": ("a", "b")}

    @bench.flows.flow("asks")
    def asks(run: Run) -> None:
        getattr(run.options(timeout=timedelta(seconds=1)), method)(*arguments.get(method, ()))

    with pytest.raises(FlowFailed, match="is for step, transaction, flow"):
        bench.finish(asks.start())


def test_the_result_of_an_old_version_is_read_by_that_version(bench: Bench) -> None:
    @bench.flows.flow("grows")
    def old(run: Run) -> str:
        return "text"

    handle = old.start()
    bench.work()

    @bench.flows.flow("grows", version=2)
    def new(run: Run) -> int:
        return 1

    assert bench.flows.handle(handle.id).result(0) == "text"
