"""Bounds on how long a step and a flow may take."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any, NoReturn

import pytest

from celery_flows import (
    FlowCancelled,
    FlowFailed,
    FlowStatus,
    FlowTimedOut,
    InvalidData,
    Retry,
    Run,
    StepFailed,
    StepTimedOut,
    step,
)
from celery_flows.store import dispatch
from celery_flows.tasks.driver import Driver
from celery_flows.tasks.steps import time_out
from celery_flows.tasks.timeout import TimeIsUp, time_limit
from tests.support.bench import Bench
from tests.support.waiting import until

SHORT = timedelta(milliseconds=50)
FOREVER = 60.0  # seconds; a test that waits for it has failed


def hang() -> None:
    time.sleep(FOREVER)


# ---- steps ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["inline", "celery"])
def test_a_step_that_takes_too_long_is_interrupted(bench: Bench, kind: str) -> None:
    task = bench.task("hangs")(hang)

    @bench.flows.flow("hangs")
    def hangs(run: Run) -> str:
        with pytest.raises(StepTimedOut, match=r"took longer than 0\.05 s"):
            run.options(timeout=SHORT).step(task if kind == "celery" else hang)
        return "went on"

    assert bench.finish(hangs.start()) == "went on"


def test_a_step_that_timed_out_is_tried_again_by_its_policy(bench: Bench) -> None:
    @step(timeout=SHORT, retry=Retry(2, initial=timedelta(milliseconds=1)))
    def slow_once() -> str:
        bench.effects.append("began")
        if len(bench.effects) == 1:
            hang()
        return "done"

    @bench.flows.flow("slow once")
    def flow(run: Run) -> str:
        return run.step(slow_once)

    handle = flow.start()
    assert bench.finish(handle) == "done"
    assert bench.effects == ["began", "began"]
    retried = next(event for event in bench.store.list_events(handle.id) if event.kind == "step_retrying")
    assert retried.payload_json["step"]["error_json"]["type"] == "StepTimedOut"


def test_what_swallows_the_interrupt_is_judged_in_the_end() -> None:
    def stubborn() -> None:
        with suppress(BaseException):
            hang()

    with pytest.raises(TimeIsUp), time_limit(0.01):
        stubborn()


def test_a_thread_is_judged_in_the_end(bench: Bench) -> None:
    raised: list[BaseException] = []

    def work() -> None:
        try:
            with time_limit(0.01):
                time.sleep(0.05)
        except TimeIsUp as error:
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(raised) == 1


def test_an_own_failure_is_told_rather_than_the_time() -> None:
    def fails_late() -> None:
        try:
            hang()
        except TimeIsUp:
            raise LookupError from None

    with pytest.raises(LookupError), time_limit(0.001):
        fails_late()


def test_nothing_is_interrupted_after_the_step() -> None:
    with time_limit(0.02):
        pass
    time.sleep(0.05)  # the alarm would strike here


def test_a_process_that_was_ended_for_its_time_has_timed_out(bench: Bench) -> None:
    task = bench.task("hangs", time_limit=1)(hang)

    @bench.flows.flow("hangs")
    def hangs(run: Run) -> str:
        try:
            run.step(task)
        except StepTimedOut as late:
            return late.message
        return ""

    handle = hangs.start()
    bench.drive(handle.id)
    [(_, run_id)] = [row for row in bench.claimable() if row[0] == "step"]
    assert bench.store.run(dispatch.claim_step, run_id, "node/7/request/claim", 30.0)
    assert time_out(bench.runtime, "node/7/request")
    assert not time_out(bench.runtime, "node/7/request")
    assert bench.finish(handle) == "took too long"


# ---- flows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("waits", ["sleep", "event", "gather", "retry"])
def test_a_deadline_strikes_while_the_flow_waits(bench: Bench, waits: str) -> None:
    @bench.task("noop")
    def noop() -> None: ...

    def away() -> None:
        raise ConnectionError

    @bench.flows.flow("waits", timeout=timedelta(seconds=0.3))
    def flow(run: Run) -> None:
        try:
            if waits == "sleep":
                run.sleep(timedelta(days=3))
            elif waits == "event":
                run.wait_for("never", "comes")
            elif waits == "gather":
                run.step(noop)
            else:
                run.options(retry=Retry(2, initial=timedelta(days=1), jitter=False)).step(away)
        except FlowTimedOut:
            run.step(bench.effects.append, "told")
            raise

    handle = flow.start()
    bench.drive(handle.id)  # no worker takes the gather's member
    [row] = [row for row in bench.rows(handle.id) if row.kind == "drive"]
    assert row.due_at == handle.get().deadline_at
    with pytest.raises(FlowFailed, match="FlowTimedOut"):
        bench.finish(handle) if waits != "gather" else finish_drives(bench, handle)
    assert bench.effects == ["told"]


def finish_drives(bench: Bench, handle: Any) -> Any:
    """Drives the flow and runs none of its steps."""
    deadline = time.monotonic() + 10
    while not handle.status().is_terminal:
        assert time.monotonic() < deadline
        for kind, _ in bench.claimable():
            if kind == "drive":
                bench.drive(handle.id)
    return handle.result(0)


def test_a_function_that_returns_after_its_deadline_has_failed_all_the_same(bench: Bench) -> None:
    @bench.flows.flow("stubborn", timeout=timedelta(seconds=0.5))
    def stubborn(run: Run) -> str:
        run.step(time.sleep, 0.6)
        with suppress(FlowTimedOut):
            run.step(time.sleep, 0)
        return "fine"

    with pytest.raises(FlowFailed, match="FlowTimedOut"):
        bench.finish(stubborn.start())


def test_a_flow_that_ends_in_time_has_nothing_to_do_with_it(bench: Bench) -> None:
    @bench.flows.flow("quick", timeout=timedelta(hours=1))
    def quick(run: Run) -> str:
        return run.step(str, 1)

    handle = quick.start()
    assert bench.finish(handle) == "1"
    flow = handle.get()
    assert flow.deadline_at is not None
    assert timedelta(minutes=59) < flow.deadline_at - flow.created_at < timedelta(minutes=61)


def test_a_childs_timeout_is_its_deadline(bench: Bench) -> None:
    @bench.flows.flow("child")
    def child(run: Run) -> None:
        run.wait_for("never", "comes")

    @bench.flows.flow("parent")
    def parent(run: Run) -> str:
        try:
            run.options(timeout=timedelta(seconds=0.1)).flow(child)
        except StepFailed as failed:
            return failed.type
        return ""

    assert bench.finish(parent.start()) == "FlowTimedOut"


def test_a_cancel_after_the_deadline_was_told_still_cancels(bench: Bench) -> None:
    @bench.flows.flow("slow to go", timeout=timedelta(seconds=0.5))
    def slow(run: Run) -> None:
        run.step(time.sleep, 0.6)
        try:
            run.step(time.sleep, 0)
        except FlowTimedOut:
            run.step(bench.flows.handle(run.flow_id).cancel)
            raise

    handle = slow.start()
    with pytest.raises(FlowCancelled):
        bench.finish(handle)
    assert handle.status() is FlowStatus.CANCELLED


@pytest.mark.parametrize("timeout", [timedelta(0), timedelta(seconds=-1), 5])
def test_a_timeout_that_makes_no_sense_is_refused(bench: Bench, timeout: Any) -> None:
    with pytest.raises(InvalidData, match="timeout of flow x: must be a timedelta, and longer than nothing"):
        bench.flows.flow("x", timeout=timeout)(lambda run: None)
    with pytest.raises(InvalidData, match="step timeout"):
        step(timeout=timeout)


def test_a_deadline_that_passes_just_before_the_flow_parks_is_not_slept_through(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at the deadline and the park: nobody else would wake the flow."""

    @bench.task("member")
    def member() -> None: ...

    @bench.flows.flow("late", timeout=timedelta(seconds=0.3))
    def late(run: Run) -> None:
        run.step(member)

    joining, struck = Driver.join, []

    def slowly(driver: Driver, *args: Any, **options: Any) -> NoReturn:
        until(driver.is_late, "the deadline passes", within_seconds=5)
        struck.append(driver.flow.id)
        joining(driver, *args, **options)

    monkeypatch.setattr(Driver, "join", slowly)
    handle = late.start()
    bench.drive(handle.id)
    assert struck == [handle.id]
    bench.drive(handle.id)  # it is due at once
    with pytest.raises(FlowFailed, match="FlowTimedOut"):
        handle.result(0)
