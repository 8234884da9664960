"""Flows and steps that are ``async def``: one loop for a drive, and the engine's rules in it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import sqlalchemy as sa
from celery import Task, current_task
from pydantic import BaseModel
from sqlalchemy.orm import Session

from celery_flows import (
    AsyncRun,
    FlowCancelled,
    FlowFailed,
    FlowStatus,
    InvalidData,
    Retry,
    Run,
    StepFailed,
    StepTimedOut,
)
from tests.support.bench import Bench

FOREVER = 60.0  # seconds; a test that waits for it has failed
SHORT = timedelta(milliseconds=50)


class Order(BaseModel):
    id: str
    cents: int


class Receipt(BaseModel):
    order: Order
    at: str


async def double(order: Order) -> Order:
    await asyncio.sleep(0)
    return Order(id=order.id, cents=2 * order.cents)


def triple(order: Order) -> Order:
    return Order(id=order.id, cents=3 * order.cents)


async def fails() -> None:
    await asyncio.sleep(0)
    raise LookupError("not there")


async def hang() -> None:
    await asyncio.sleep(FOREVER)


# ---- an async flow --------------------------------------------------------------------------------------------------


def test_every_kind_of_step_in_an_async_flow(bench: Bench) -> None:
    @bench.task("charge")
    def charge(cents: int) -> str:
        return f"paid {cents}"

    @bench.flows.flow("child")
    async def child(run: AsyncRun, cents: int) -> int:
        return await run.step(abs, -cents)

    @bench.flows.flow("parent")
    async def parent(run: AsyncRun, order: Order) -> Receipt:
        assert isinstance(order, Order)
        order = await run.step(double, order)
        order = await run.step(triple, order)
        assert isinstance(order, Order)
        paid = await run.step(charge, order.cents)
        assert await run.flow(child, 5) == 5
        assert await run.gather([charge.s(1), child.s(2)]) == ["paid 1", 2]
        assert (await run.first([charge.s(3)])).value == "paid 3"
        await run.sleep(timedelta(milliseconds=1))
        await run.sleep_until(await run.now())
        await run.update(done=True)
        payload = await run.wait_for("topic", order.id)
        assert (await run.approval("boss")).by == "ann"
        assert await run.undo() == []
        assert 0 <= run.random() < 1
        assert run.uuid() != run.uuid()
        assert (run.owner, run.flow_id) == ("tenant:a", handle.id)
        return Receipt(order=order, at=f"{paid} {payload}")

    bench.flows.emit("topic", "o-1", "now")
    handle = parent.start(Order(id="o-1", cents=7), owner="tenant:a")
    handle.approve("boss", by="ann")
    assert bench.finish(handle) == Receipt(order=Order(id="o-1", cents=42), at="paid 42 now")
    assert handle.state() == {"done": True}


def test_an_async_flow_runs_a_transaction_exactly_once(bench: Bench) -> None:
    def write(session: Session, name: str) -> str:
        assert session.execute(sa.text("SELECT 1")).scalar_one() == 1
        bench.effects.append(name)
        return name

    @bench.flows.flow("writes")
    async def writes(run: AsyncRun) -> str:
        written = await run.transaction(write, "a")
        await run.sleep(timedelta(milliseconds=1))
        return written

    assert bench.finish(writes.start()) == "a"
    assert bench.effects == ["a"]


def test_recorded_steps_of_an_async_flow_do_not_run_again(bench: Bench) -> None:
    async def note(text: str) -> str:
        bench.effects.append(text)
        return text

    @bench.flows.flow("notes")
    async def notes(run: AsyncRun) -> list[str]:
        noted = [await run.step(note, "a"), *await run.gather([partial(note, "b"), partial(note, "c")])]
        await run.sleep(timedelta(milliseconds=1))
        return [*noted, await run.step(note, "d")]

    assert bench.finish(notes.start()) == ["a", "b", "c", "d"]
    assert bench.effects == ["a", "b", "c", "d"]


def test_an_async_flow_cleans_up_when_it_is_cancelled(bench: Bench) -> None:
    @bench.flows.flow("waits")
    async def waits(run: AsyncRun) -> None:
        run.on_failure(undo, "undone")
        try:
            await run.wait_for("never", "comes")
        except FlowCancelled:
            await run.step(undo, "cleaned up")
            raise

    async def undo(text: str) -> None:
        await asyncio.sleep(0)
        bench.effects.append(text)

    handle = waits.start()
    bench.work()
    handle.cancel()
    with pytest.raises(FlowCancelled):
        bench.finish(handle)
    assert bench.effects == ["cleaned up", "undone"]


def test_an_async_flow_without_input_starts_anew(bench: Bench) -> None:
    @bench.flows.flow("counts")
    async def counts(run: AsyncRun, number: int) -> int:
        if number < 3:
            await run.restart_as(number + 1)
        return number

    handle = counts.start(1, key="count")
    bench.work()
    assert handle.result(0) == 3


def test_another_steps_history_leaves_an_async_flow_alone(bench: Bench) -> None:
    name = "before"

    @bench.flows.flow("changes")
    async def changes(run: AsyncRun) -> None:
        await run.options(name=name).step(double, Order(id="a", cents=1))
        await run.wait_for("never", "comes")

    handle = changes.start()
    bench.work()
    name = "after"
    bench.call_driver(handle.id)
    bench.work()
    assert (handle.get().error_json or {})["type"] == "HistoryMismatch"


def test_several_drives_at_once_have_a_loop_each(bench: Bench) -> None:
    inside = threading.Barrier(3, timeout=10)

    async def meet() -> str:
        await asyncio.to_thread(inside.wait)
        return "met"

    @bench.flows.flow("meets")
    async def meets(run: AsyncRun) -> str:
        return await run.step(meet)

    handles = [meets.start() for _ in range(3)]
    threads = [threading.Thread(target=bench.drive, args=(handle.id,)) for handle in handles]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [handle.result(0) for handle in handles] == ["met"] * 3


def test_the_threads_own_event_loop_stays_as_it_is(bench: Bench) -> None:
    @bench.flows.flow("plain")
    def plain(run: Run) -> Order:
        return run.step(double, Order(id="a", cents=1))

    own = asyncio.new_event_loop()
    asyncio.set_event_loop(own)
    try:
        assert bench.finish(plain.start()).cents == 2
        assert asyncio.get_event_loop_policy().get_event_loop() is own
    finally:
        asyncio.set_event_loop(None)
        own.close()


def test_what_runs_beside_the_function_ends_with_it(bench: Bench) -> None:
    async def beside() -> None:
        try:
            await hang()
        finally:
            bench.effects.append("ended")

    @bench.flows.flow("leaves")
    async def leaves(run: AsyncRun) -> str:
        bench.effects.append(asyncio.create_task(beside()))
        await run.step(double, Order(id="a", cents=1))
        return "done"

    assert bench.finish(leaves.start()) == "done"
    assert bench.effects[1:] == ["ended"]


def test_a_plain_step_of_an_async_flow_knows_its_celery_task(bench: Bench) -> None:
    def who() -> str:
        return f"{current_task.name} {current_task.request.id}"

    @bench.flows.flow("asks")
    async def asks(run: AsyncRun) -> str:
        return await run.step(who)

    handle = asks.start()
    bench.app.tasks["flows.drive"].apply(kwargs={"flow_id": str(handle.id)}, task_id="a message", throw=True)
    assert handle.result(0) == "flows.drive a message"


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_a_run_of_the_wrong_kind_is_refused_with_what_to_write(bench: Bench) -> None:
    with pytest.raises(InvalidData, match="flow x: is async and takes a Run; write: run: AsyncRun"):

        @bench.flows.flow("x")
        async def wrong(run: Run) -> None: ...

    with pytest.raises(InvalidData, match="flow x: takes an AsyncRun and is not async; write async def, or: run: Run"):

        @bench.flows.flow("x")  # type: ignore[arg-type]
        def wrong_too(run: AsyncRun) -> None: ...


async def beside_another(run: AsyncRun) -> None:
    await asyncio.gather(run.step(asyncio.sleep, 0.001), run.step(double, Order(id="a", cents=1)))


async def inside_another(run: AsyncRun) -> None:
    async def takes_a_step() -> None:
        await run.step(double, Order(id="a", cents=1))

    try:
        await run.step(takes_a_step)
    except StepFailed as failed:
        raise InvalidData("run.step", failed.message) from failed


async def not_awaited(run: AsyncRun) -> None:
    task = asyncio.create_task(run.step(hang))
    await asyncio.sleep(0)
    assert not task.done()


async def draws_beside(run: AsyncRun) -> None:
    task = asyncio.create_task(run.step(hang))
    await asyncio.sleep(0)
    assert not task.done()
    run.uuid()


async def bounds_a_step(run: AsyncRun) -> None:
    async with asyncio.timeout(0.01):
        await run.step(hang)


async def bounds_a_gather(run: AsyncRun) -> None:
    await asyncio.wait_for(run.gather([hang, hang]), 0.01)


async def is_async(session: Session) -> None: ...


async def awaits_in_a_transaction(run: AsyncRun) -> None:
    await run.transaction(is_async)  # type: ignore[unused-coroutine]


async def cancels_itself(run: AsyncRun) -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (beside_another, "run.step: came before another step had ended"),
        (inside_another, "run.step: .*came before another step had ended"),
        (not_awaited, "the function's end: came before another step had ended"),
        (draws_beside, r"run.uuid\(\): came before another step had ended"),
        (bounds_a_step, r"run.step: was cancelled by the flow function; bound a step by run.options\(timeout=…\)"),
        (bounds_a_gather, "run.gather: was cancelled by the flow function"),
        (awaits_in_a_transaction, "step is_async: is async; a transaction's function is not"),
        (cancels_itself, "flow wrong: has cancelled its own task"),
    ],
)
def test_what_would_depend_on_time_fails_the_flow(
    bench: Bench, function: Callable[[AsyncRun], Coroutine[Any, Any, None]], told: str
) -> None:
    handle = bench.flows.flow("wrong")(function).start()
    with pytest.raises(FlowFailed, match=told):
        bench.finish(handle)


def test_a_loop_that_runs_already_is_no_place_to_drive_a_flow_in(bench: Bench) -> None:
    @bench.flows.flow("driven in a loop")
    async def driven(run: AsyncRun) -> None: ...

    async def drive_here() -> None:
        bench.drive(handle.id)

    handle = driven.start()
    asyncio.run(drive_here())
    with pytest.raises(FlowFailed, match="event loop: runs in this thread; call it in another"):
        handle.result(0)


# ---- what unwinds a flow --------------------------------------------------------------------------------------------


def test_a_wait_within_a_group_of_tasks_unwinds_the_flow(bench: Bench) -> None:
    @bench.flows.flow("grouped")
    async def grouped(run: AsyncRun) -> Any:
        async with asyncio.TaskGroup():
            return await run.wait_for("topic", "a")

    handle = grouped.start()
    bench.work()
    assert handle.status() is FlowStatus.WAITING
    bench.flows.emit("topic", "a", "here")
    assert bench.finish(handle) == "here"
    assert "reclaimed" not in bench.kinds(handle.id)


def test_a_wait_in_another_task_unwinds_the_flow(bench: Bench) -> None:
    @bench.flows.flow("waits elsewhere")
    async def elsewhere(run: AsyncRun) -> Any:
        waiting = asyncio.create_task(run.wait_for("topic", "a"))
        while not waiting.done():
            await asyncio.sleep(FOREVER)
        return waiting.result()

    handle = elsewhere.start()
    bench.work()
    assert handle.status() is FlowStatus.WAITING


def test_a_function_that_catches_what_unwinds_it_does_not_go_on(bench: Bench) -> None:
    @bench.flows.flow("clings")
    async def clings(run: AsyncRun) -> str:
        with suppress(BaseException):
            await run.wait_for("topic", "a")
        bench.effects.append("went on")
        await run.step(double, Order(id="a", cents=1))
        return "ended"

    handle = clings.start()
    bench.work()
    assert handle.status() is FlowStatus.WAITING
    assert "double" not in [step.task for step in bench.store.list_steps(handle.id)]
    assert bench.effects == ["went on"]


@pytest.mark.parametrize("kind", ["step", "gather", "flow"])
def test_an_exit_counts_as_a_crash(bench: Bench, kind: str) -> None:
    async def leave() -> None:
        await asyncio.sleep(0)
        raise SystemExit(3)

    @bench.flows.flow("leaves")
    async def leaves(run: AsyncRun) -> None:
        bench.effects.append("began")
        if len(bench.effects) > 1:
            return
        if kind == "flow":
            await leave()
        await (run.step(leave) if kind == "step" else run.gather([leave, hang]))

    handle = leaves.start()
    with pytest.raises(SystemExit):
        bench.drive(handle.id)
    bench.recover()
    assert handle.result(0) is None
    assert "reclaimed" in bench.kinds(handle.id)


def test_what_strikes_the_loop_itself_ends_the_drive_and_every_task_of_it(bench: Bench) -> None:
    """As an alarm of a worker's does that is raised wherever the process just is."""

    def strike() -> None:
        raise SystemExit(9)

    async def work() -> None:
        asyncio.get_running_loop().call_later(0.01, strike)
        try:
            await hang()
        finally:
            bench.effects.append("ended")

    @bench.flows.flow("struck")
    async def struck(run: AsyncRun) -> str:
        if bench.effects:
            return "again"
        try:
            await run.gather([work, hang])
        finally:
            with pytest.raises(asyncio.CancelledError):
                await run.step(double, Order(id="a", cents=1))
            bench.effects.append("took no step")
        return ""

    handle = struck.start()
    with pytest.raises(SystemExit):
        bench.drive(handle.id)
    assert bench.effects == ["ended", "took no step"]
    assert bench.store.list_steps(handle.id) == []
    bench.recover()
    assert handle.result(0) == "again"


# ---- async steps ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["flow", "async flow"])
def test_an_async_step_fails_and_is_tried_again_as_any(bench: Bench, kind: str) -> None:
    async def flaky() -> str:
        await asyncio.sleep(0)
        bench.effects.append("tried")
        if len(bench.effects) < 3:
            raise ConnectionError
        return "connected"

    retry = Retry(3, initial=timedelta(milliseconds=1), jitter=False)

    @bench.flows.flow("plain")
    def plain(run: Run) -> str:
        with pytest.raises(StepFailed, match="step fails failed with LookupError: not there"):
            run.step(fails)
        return run.options(retry=retry).step(flaky)

    @bench.flows.flow("async")
    async def awaits(run: AsyncRun) -> str:
        with pytest.raises(StepFailed, match="step fails failed with LookupError: not there"):
            await run.step(fails)
        return await run.options(retry=retry).step(flaky)

    handle = (plain if kind == "flow" else awaits).start()
    assert bench.finish(handle) == "connected"
    assert bench.kinds(handle.id).count("step_retrying") == 2


def test_a_long_pause_between_attempts_holds_no_worker(bench: Bench) -> None:
    async def flaky() -> None:
        bench.effects.append("tried")
        if len(bench.effects) < 2:
            raise ConnectionError

    @bench.flows.flow("patient")
    async def patient(run: AsyncRun) -> None:
        await run.options(retry=Retry(2, initial=timedelta(hours=1), jitter=False)).step(flaky)

    handle = patient.start()
    bench.work()
    assert bench.effects == ["tried"]
    [row] = bench.rows(handle.id)
    assert row.worker is None
    assert row.due_at is not None


def test_what_an_async_function_is(bench: Bench) -> None:
    class Doubles:
        async def __call__(self, cents: int) -> int:
            return 2 * cents

        async def method(self, cents: int) -> int:
            return 2 * cents

    order = Order(id="a", cents=1)

    @bench.flows.flow("kinds")
    def kinds(run: Run) -> int:
        of_a_partial: Order = run.step(partial(double, order))
        assert isinstance(of_a_partial, Order)
        by_call = run.options(name="by call").step(Doubles(), 1)
        by_method = run.step(Doubles().method, 1)
        by_lambda = run.options(name="by lambda").step(lambda: Doubles().method(1))
        return of_a_partial.cents + by_call + by_method + by_lambda

    assert bench.finish(kinds.start()) == 8


@pytest.mark.parametrize("kind", ["inline", "celery"])
def test_an_async_step_past_its_timeout_is_cancelled(bench: Bench, kind: str) -> None:
    async def hangs() -> None:
        try:
            await hang()
        finally:
            bench.effects.append("cancelled")

    task = bench.task("hangs")(hangs)

    @bench.flows.flow("hangs")
    def flow(run: Run) -> str:
        try:
            run.options(timeout=SHORT).step(task if kind == "celery" else hangs)
        except StepTimedOut as late:
            return late.message
        return ""

    assert bench.finish(flow.start()) == "took longer than 0.05 s"
    assert bench.effects == ["cancelled"]


async def blocks() -> None:
    time.sleep(0.1)


async def is_deaf() -> None:
    with suppress(asyncio.CancelledError):
        await hang()


async def times_out_itself() -> None:
    async with asyncio.timeout(0.001):
        await hang()


async def fails_late() -> None:
    try:
        await hang()
    except asyncio.CancelledError:
        raise LookupError from None


async def ends_of_another_cancel() -> None:
    task = asyncio.create_task(hang())
    task.cancel()
    await task


@pytest.mark.parametrize(
    ("work", "told"),
    [
        (blocks, "StepTimedOut"),
        (is_deaf, "StepTimedOut"),
        (times_out_itself, "TimeoutError"),
        (fails_late, "LookupError"),
        (ends_of_another_cancel, "CancelledError"),
    ],
)
@pytest.mark.parametrize("thread", [False, True], ids=["main thread", "a thread"])
def test_what_a_late_async_step_has_failed_of(bench: Bench, work: Any, told: str, thread: bool) -> None:
    @bench.flows.flow("late")
    async def late(run: AsyncRun) -> str:
        try:
            await run.options(timeout=SHORT).step(work)
        except StepFailed as failed:
            return failed.type
        return ""

    handle = late.start()
    if thread:
        driving = threading.Thread(target=bench.drive, args=(handle.id,))
        driving.start()
        driving.join()
    assert bench.finish(handle) == told


@pytest.mark.parametrize("kind", ["inline", "celery"])
def test_a_plain_flow_is_told_of_a_step_that_ended_of_another_cancel(bench: Bench, kind: str) -> None:
    task = bench.task("cancelled")(ends_of_another_cancel)

    @bench.flows.flow("told")
    def told(run: Run) -> str:
        try:
            run.step(task if kind == "celery" else ends_of_another_cancel)
        except StepFailed as failed:
            return failed.type
        return ""

    assert bench.finish(told.start()) == "CancelledError"


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_step_that_cancels_its_own_task_fails_a_plain_flow(bench: Bench, at_once: int) -> None:
    async def cancels_itself() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(0)

    @bench.flows.flow("plain")
    def plain(run: Run) -> None:
        run.gather([cancels_itself, hang][:at_once])

    with pytest.raises(FlowFailed, match="step cancels_itself: has cancelled its own task"):
        bench.finish(plain.start())


def test_a_plain_step_of_an_async_flow_is_interrupted(bench: Bench) -> None:
    @bench.flows.flow("sleeps")
    async def sleeps(run: AsyncRun) -> str:
        with pytest.raises(StepTimedOut, match=r"took longer than 0\.05 s"):
            await run.options(timeout=SHORT).step(time.sleep, FOREVER)
        return "went on"

    assert bench.finish(sleeps.start()) == "went on"


def test_an_async_celery_task_runs_as_a_step(bench: Bench) -> None:
    async def fetch(self: Task[Any, Any], order: Order) -> Order:
        await asyncio.sleep(0)
        bench.effects.append(self.request.id)
        if self.request.retries == 0:
            raise self.retry(countdown=0)
        return await double(Order.model_validate(order))

    task: Task[Any, Any] = bench.task("fetch", bind=True)(fetch)

    @bench.flows.flow("fetches")
    async def fetches(run: AsyncRun) -> int:
        [order] = await run.gather([task.s({"id": "a", "cents": 2})])
        return int(order.cents)

    assert bench.finish(fetches.start()) == 4
    assert len(set(bench.effects)) == 1


def test_what_is_undone_by_an_async_function(bench: Bench) -> None:
    async def undo(text: str) -> None:
        await asyncio.sleep(0)
        bench.effects.append(text)

    @bench.flows.flow("plain")
    def plain(run: Run) -> None:
        run.on_failure(undo, "first")
        run.on_failure(partial(undo, "second"))
        run.step(fails)

    @bench.flows.flow("async")
    async def awaits(run: AsyncRun) -> list[str]:
        run.on_failure(undo, "third")
        return await run.undo()

    with pytest.raises(FlowFailed, match="LookupError"):
        bench.finish(plain.start())
    assert bench.finish(awaits.start()) == []
    assert bench.effects == ["second", "first", "third"]


FORGOTTEN: dict[str, Callable[[AsyncRun], Any]] = {
    "step": lambda run: run.step(len, "abc"),
    "sleep": lambda run: run.sleep(SHORT),
    "update": lambda run: run.options().update(done=1),
    "now": lambda run: asyncio.create_task(run.now()),
}


@pytest.mark.parametrize("what", FORGOTTEN)
def test_a_forgotten_await_fails_the_flow_and_names_the_call(bench: Bench, what: str) -> None:
    """Python's own warning is a line in a worker's log; the flow would be finished, with nothing done."""

    @bench.flows.flow("forgets")
    async def forgets(run: AsyncRun) -> str:
        await run.step(str, 1)
        FORGOTTEN[what](run)
        return "done"

    with pytest.raises(FlowFailed, match=rf"InvalidData: run\.{what}: was not awaited"):
        bench.finish(forgets.start())


def test_steps_that_are_called_for_first_and_awaited_later_are_not_forgotten(bench: Bench) -> None:
    @bench.flows.flow("prepares")
    async def prepares(run: AsyncRun) -> list[int]:
        ahead = [run.step(len, text) for text in ("a", "bb", "ccc")]
        run.sleep(SHORT).close()  # thought better of it
        return [await step for step in ahead]

    assert bench.finish(prepares.start()) == [1, 2, 3]


def test_a_thread_that_a_late_step_left_behind_does_not_hold_the_worker(bench: Bench) -> None:
    """Whatever it calls may never return, and the worker's process would be gone for good."""
    returns, left = threading.Event(), threading.Event()

    def never_answers() -> None:
        returns.wait(FOREVER)
        left.set()

    async def ask() -> None:
        await asyncio.to_thread(never_answers)

    @bench.flows.flow("asks")
    async def asks(run: AsyncRun) -> str:
        try:
            await run.options(timeout=SHORT).step(ask)
        except StepTimedOut:
            return "late"
        return "answered"

    try:
        handle = asks.start()
        bench.drive(handle.id)  # would come back when the thread does
        assert not left.is_set()
        assert (handle.status(), handle.get().result_json) == (FlowStatus.FINISHED, "late")
    finally:
        returns.set()
    assert left.wait(FOREVER)


def test_a_generator_that_a_step_left_behind_is_closed_with_its_loop(bench: Bench) -> None:
    async def lines() -> AsyncIterator[int]:
        try:
            yield 1
            yield 2
        finally:
            await asyncio.sleep(0)
            bench.effects.append("closed")

    kept = []

    async def read_one() -> int:
        kept.append(lines())
        return await anext(kept[0])

    @bench.flows.flow("reads")
    async def reads(run: AsyncRun) -> int:
        return await run.step(read_one)

    assert bench.finish(reads.start()) == 1
    assert bench.effects == ["closed"]
