"""Going back: a flow that failed is retried, or forked at a step. What was recorded before is not done again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from celery_flows import (
    Event,
    FlowCancelled,
    FlowFailed,
    FlowHandle,
    FlowNotFound,
    FlowStatus,
    IllegalTransition,
    InvalidData,
    Limit,
    Run,
    StepFailed,
    Timer,
    UnknownFlow,
    WaitTimedOut,
)
from celery_flows.store import Flow, FlowStep, FlowStepStatus, audit, dispatch, taking_over
from celery_flows.store.changes import Drive
from celery_flows.store.engines import make_async_engine, make_engine
from celery_flows.store.tables import flow_events, flow_steps
from celery_flows.tasks.replay import run_id_of
from tests.integration.conftest import MakeBench
from tests.support.bench import Bench
from tests.support.faults import Died, MortalStore, Strikes

MOST_CALLS = 60


@pytest.fixture
def bench(bench: Bench) -> Iterator[Bench]:
    """Afterwards the audit finds nothing: neither with the flows that went back, nor with those they left behind."""
    yield bench
    assert list(audit.verify(bench.store)) == []


class Shop:
    """Work that is noted, and fails where it is told to."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.fails: set[str] = set()
        self.task = bench.task("remote")(self.note)

    def note(self, what: str) -> str:
        """A step's body."""
        self.bench.effects.append(what)
        if what in self.fails:
            raise RuntimeError(what)
        return f"{what} done"

    def ran(self) -> list[str]:
        """What has run since this was asked last."""
        ran, self.bench.effects = self.bench.effects, []
        return ran


@pytest.fixture
def shop(bench: Bench) -> Shop:
    """Work to be done in flows."""
    return Shop(bench)


def fail(bench: Bench, handle: FlowHandle[Any]) -> None:
    """Works until the flow has failed."""
    with pytest.raises(FlowFailed):
        bench.finish(handle)


def results(bench: Bench, flow_id: UUID) -> list[tuple[str, str, Any]]:
    """What the flow's own steps came to, in the order of their places."""
    steps = sorted(bench.store.list_steps(flow_id), key=lambda step: step.position)
    return [(step.task, step.status.value, step.result_json) for step in steps if not step.task.startswith("run.")]


def unchanged(bench: Bench, flow_id: UUID) -> Any:
    """All there is of a flow, to be compared."""
    return bench.store.get(flow_id), bench.store.list_steps(flow_id), bench.store.list_events(flow_id, None)


def three(shop: Shop) -> Any:
    """A flow of three steps, the second a Celery task."""

    @shop.bench.flows.flow("three", version=3)
    def flow(run: Run, name: str) -> list[str]:
        return [run.step(shop.note, "first"), run.step(shop.task, "second"), run.step(shop.note, "third")]

    return flow


# ---- retry ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", ["first", "second", "third"])
def test_a_retry_goes_on_at_the_failure_and_repeats_nothing_before_it(bench: Bench, shop: Shop, failing: str) -> None:
    shop.fails = {failing}
    handle = three(shop).start("Ada", key="k", owner="tenant:acme", goal="to be done")
    fail(bench, handle)
    before = unchanged(bench, handle.id)
    done, shop.fails = shop.ran(), set()

    again = handle.retry()
    assert again.id != handle.id
    assert bench.finish(again) == ["first done", "second done", "third done"]
    assert shop.ran() == ["first", "second", "third"][len(done) - 1 :]
    assert unchanged(bench, handle.id) == before, "the original is left as it is"
    old, new = handle.get(), again.get()
    kept = ("controller_id", "definition_version", "input_json", "owner_session_key", "goal")
    assert [getattr(new, name) for name in kept] == [getattr(old, name) for name in kept]
    assert (new.forked_from, new.idempotency_key, old.idempotency_key) == (old.id, None, "k")


def test_a_retry_can_be_retried(bench: Bench, shop: Shop) -> None:
    flow = three(shop)
    shop.fails = {"second"}
    first = flow.start("Ada")
    fail(bench, first)
    second = first.retry()
    fail(bench, second)
    shop.fails = {"third"}
    third = second.retry()
    fail(bench, third)
    shop.fails = set()
    assert bench.finish(third.retry()) == ["first done", "second done", "third done"]
    assert shop.ran() == ["first", "second", "second", "second", "third", "third"]


def test_a_failure_that_was_handled_stays_handled(bench: Bench, shop: Shop) -> None:
    @bench.flows.flow("handles")
    def flow(run: Run) -> list[str]:
        told = []
        for work in (shop.note, shop.task):
            try:
                run.step(work, "broken")
            except StepFailed as failed:
                told.append(f"{failed.type}: {failed.message}")
            run.step(shop.task, "instead")
        run.step(shop.note, "last")
        return told

    shop.fails = {"broken", "last"}
    handle = flow.start()
    fail(bench, handle)
    shop.fails, _ = set(), shop.ran()
    assert bench.finish(handle.retry()) == ["RuntimeError: broken"] * 2
    assert shop.ran() == ["last"]


@pytest.mark.parametrize("noted", ["here", "elsewhere"])
@pytest.mark.parametrize("broken", ["here", "elsewhere"])
def test_a_failure_that_was_caught_and_raised_again_is_the_failure(
    bench: Bench, shop: Shop, broken: str, noted: str
) -> None:
    """What was done about it is no part of the way that the flow takes when the step succeeds."""
    works: dict[str, Any] = {"here": shop.note, "elsewhere": shop.task}

    @bench.flows.flow("raises again")
    def flow(run: Run) -> str:
        run.step(shop.note, "before")
        try:
            run.step(works[broken], "broken")
        except StepFailed:
            run.step(works[noted], "told somebody")
            raise
        return str(run.step(shop.note, "after"))

    shop.fails = {"broken"}
    handle = flow.start()
    fail(bench, handle)
    fail(bench, handle.retry())
    shop.fails, _ = set(), shop.ran()
    assert bench.finish(handle.retry()) == "after done"
    assert shop.ran() == ["broken", "after"]


def test_of_attempts_by_hand_the_last_is_the_failure(bench: Bench, shop: Shop) -> None:
    @bench.flows.flow("tries")
    def flow(run: Run) -> str:
        for left in (2, 1, 0):
            try:
                return str(run.step(shop.note, "broken"))
            except StepFailed:
                if not left:
                    raise
        raise AssertionError

    shop.fails = {"broken"}
    handle = flow.start()
    fail(bench, handle)
    shop.fails, _ = set(), shop.ran()
    assert bench.finish(handle.retry()) == "broken done"
    assert shop.ran() == ["broken"]


@pytest.mark.parametrize("limit", [None, 2])
def test_of_a_gather_all_that_failed_are_run_again(bench: Bench, shop: Shop, limit: int | None) -> None:
    @bench.flows.flow("gathers")
    def flow(run: Run) -> list[str]:
        return list(run.gather([shop.task.s(str(n)) for n in range(6)], limit=limit))

    shop.fails = {"1", "3"}
    handle = flow.start()
    fail(bench, handle)
    ran, shop.fails = shop.ran(), set()
    assert bench.finish(handle.retry()) == [f"{n} done" for n in range(6)]
    assert sorted(ran + shop.ran()) == sorted([*map(str, range(6)), *({"1", "3"} & set(ran))])


def test_a_member_that_ended_after_another_had_failed_did_not_follow_it(bench: Bench, shop: Shop) -> None:
    """Whether they run side by side here, or one is scheduled when another has failed elsewhere."""
    failed = asyncio.Event()

    async def quick() -> str:
        try:
            return shop.note("quick")
        finally:
            failed.set()

    async def slow() -> str:
        await failed.wait()
        await asyncio.sleep(0.02)
        return shop.note("slow")

    @bench.flows.flow("side by side")
    def flow(run: Run, kind: str) -> list[Any]:
        if kind == "here":
            return run.gather([quick, slow])
        found = run.gather([shop.task.s(str(n)) for n in range(6)], limit=1, return_exceptions=True)
        if any(isinstance(each, StepFailed) for each in found):
            raise ValueError("of the function's own")
        return found

    shop.fails = {"quick", "1"}
    here, elsewhere = flow.start("here"), flow.start("elsewhere")
    for handle in (here, elsewhere):
        fail(bench, handle)
    assert shop.ran() == ["quick", "slow", *map(str, range(6))]
    shop.fails = set()
    assert bench.finish(here.retry()) == ["quick done", "slow done"]
    assert bench.finish(elsewhere.retry()) == [f"{n} done" for n in range(6)]
    assert shop.ran() == ["quick", "1"]


@pytest.mark.parametrize("reported", [False, True])
def test_failures_that_a_gather_collected_are_handled_once_another_step_was_taken(
    bench: Bench, shop: Shop, reported: bool
) -> None:
    @bench.flows.flow("collects")
    def flow(run: Run) -> int:
        found = run.gather([shop.task.s(each) for each in ("good", "bad")], return_exceptions=True)
        if reported:
            run.step(shop.note, "report")
        failed = sum(isinstance(each, StepFailed) for each in found)
        if failed and "mended" not in shop.fails:
            raise ValueError(f"{failed} failed")
        return failed

    shop.fails = {"bad"}
    handle = flow.start()
    fail(bench, handle)
    shop.fails, _ = {"mended"}, shop.ran()
    assert bench.finish(handle.retry()) == int(reported)
    assert shop.ran() == ([] if reported else ["bad"])


def test_what_the_function_itself_raised_is_mended_by_other_code(bench: Bench, shop: Shop) -> None:
    broken = [True]

    @bench.flows.flow("own error")
    def flow(run: Run) -> str:
        done = run.step(shop.task, "first")
        if broken:
            raise KeyError("a bug")
        return str(done)

    handle = flow.start()
    fail(bench, handle)
    broken.clear()
    assert bench.finish(handle.retry()) == "first done"
    assert shop.ran() == ["first"]


@pytest.mark.parametrize("handled", [False, True])
def test_a_wait_that_timed_out_is_waited_again_unless_that_was_handled(bench: Bench, shop: Shop, handled: bool) -> None:
    @bench.flows.flow("waits")
    def flow(run: Run) -> Any:
        run.sleep(timedelta(milliseconds=1))
        try:
            paid = run.wait_for("paid", "order-1", timeout=timedelta(milliseconds=1))
        except WaitTimedOut:
            if not handled:
                raise
            paid = "not paid"
        run.step(shop.note, "ship")
        return paid

    shop.fails = {"ship"}
    handle = flow.start()
    fail(bench, handle)
    shop.fails = set()
    again = handle.retry()
    if not handled:
        bench.flows.emit("paid", "order-1", "paid")
    assert bench.finish(again) == ("not paid" if handled else "paid")
    assert [kind for kind, _, _ in results(bench, again.id)].count("sleep") == 1


@pytest.mark.parametrize("killed", ["driver", "step"])
def test_what_killed_its_workers_is_begun_anew(make_bench: MakeBench, killed: str) -> None:
    bench = make_bench(max_crashes=1)
    shop = Shop(bench)
    handle = three(shop).start("Ada")
    if killed == "step":
        bench.drive(handle.id)
    while not handle.status().is_terminal:
        claim_and_die(bench)
        bench.end_leases()
        bench.sweep()
        if killed == "step" and not bench.rows(handle.id)[1:]:
            bench.work()
    assert (handle.get().error_json or {})["type"] == ("StepLost" if killed == "step" else "DriverLost"), "it struck"
    assert bench.finish(handle.retry()) == ["first done", "second done", "third done"]
    assert shop.ran() == ["first", "second", "third"]
    assert list(audit.verify(bench.store)) == []


def claim_and_die(bench: Bench) -> None:
    """A worker claims what there is, and is never heard of again."""
    for kind, run_id in bench.claimable():
        if kind == "step":
            bench.store.run(dispatch.claim_step, run_id, bench.token(), 60.0)
        else:
            bench.store.run(dispatch.claim_drive, UUID(run_id), bench.token(), 60.0)


def test_a_cancelled_flow_goes_on(bench: Bench, shop: Shop) -> None:
    @bench.flows.flow("cancelled")
    def flow(run: Run) -> str:
        run.step(shop.note, "first")
        return str(run.wait_for("go", "on"))

    handle = flow.start()
    bench.work()
    handle.cancel()
    bench.work()
    assert handle.status() is FlowStatus.CANCELLED
    again = handle.retry()
    bench.flows.emit("go", "on", "went on")
    assert bench.finish(again) == "went on"
    assert shop.ran() == ["first"]


@pytest.mark.parametrize("how", ["here", "elsewhere", "transaction", "state"])
def test_a_flow_that_cleaned_up_is_not_retried_but_forked(bench: Bench, shop: Shop, how: str) -> None:
    @bench.flows.flow("cleans up")
    def flow(run: Run) -> str:
        run.step(shop.note, "first")
        try:
            return str(run.wait_for("go", "on"))
        except FlowCancelled:
            if how == "here":
                run.step(shop.note, "undone")
            elif how == "elsewhere":
                run.step(shop.task, "undone")
            elif how == "transaction":
                run.transaction(lambda session: None)
            else:
                run.update(undone=True)
            raise

    handle = flow.start()
    bench.work()
    handle.cancel()
    bench.work()
    assert handle.status() is FlowStatus.CANCELLED
    with pytest.raises(IllegalTransition, match="it has cleaned up, so what it recorded may be undone; start anew"):
        handle.retry()
    again = handle.fork(from_step="note")
    bench.flows.emit("go", "on", "went on")
    assert bench.finish(again) == "went on"
    assert shop.ran() == (["first", "undone", "first"] if how in ("here", "elsewhere") else ["first", "first"])
    with pytest.raises(InvalidData, match=r"these are: note, wait_for go$"):
        handle.fork(from_step="undone")


@pytest.mark.parametrize("how", ["here", "elsewhere"])
def test_nor_is_one_that_undid_before_it_failed(bench: Bench, shop: Shop, how: str) -> None:
    """What was undone would be read back as done."""

    @bench.flows.flow("undoes by hand")
    def flow(run: Run) -> None:
        run.step(shop.note, "booked")
        run.on_failure(shop.note if how == "here" else shop.task, "cancelled")
        try:
            run.step(shop.note, "broken")
        except StepFailed:
            run.undo()
            raise

    shop.fails = {"broken"}
    handle = flow.start()
    fail(bench, handle)
    with pytest.raises(IllegalTransition, match="it has cleaned up"):
        handle.retry()


def test_one_that_undid_and_went_on_is_retried(bench: Bench, shop: Shop) -> None:
    @bench.flows.flow("goes on")
    def flow(run: Run) -> str:
        run.step(shop.note, "booked")
        run.on_failure(shop.note, "cancelled")
        try:
            run.step(shop.note, "broken")
        except StepFailed:
            run.undo()
        return run.step(shop.note, "another way")

    shop.fails = {"broken", "another way"}
    handle = flow.start()
    fail(bench, handle)
    shop.fails = set()
    assert bench.finish(handle.retry()) == "another way done"
    assert shop.ran() == ["booked", "broken", "cancelled", "another way", "another way"]


def test_neither_is_one_whose_failure_was_undone(bench: Bench, shop: Shop) -> None:
    @bench.flows.flow("undoes")
    def flow(run: Run) -> None:
        run.step(shop.note, "first")
        run.on_failure(shop.note, "not first")
        run.step(shop.note, "broken")

    shop.fails = {"broken"}
    handle = flow.start()
    fail(bench, handle)
    with pytest.raises(IllegalTransition, match="it has cleaned up"):
        handle.retry()
    # What a fork took over is undone, should that fail in its turn.
    shop.ran()
    fail(bench, handle.fork(from_step="note#2"))
    assert shop.ran() == ["broken", "not first"]


def test_only_what_failed_or_was_cancelled_is_retried(bench: Bench, shop: Shop) -> None:
    handle = three(shop).start("Ada")
    with pytest.raises(IllegalTransition, match="is created and cannot become retried: it has neither failed"):
        handle.retry()
    bench.finish(handle)
    with pytest.raises(IllegalTransition, match="is finished and cannot become retried: it has neither failed"):
        handle.retry()
    with pytest.raises(FlowNotFound):
        bench.flows.handle(uuid4()).retry()


def test_a_child_is_retried_by_its_parent_which_takes_over_the_others(bench: Bench, shop: Shop) -> None:
    @bench.flows.flow("child")
    def child(run: Run, name: str) -> str:
        return str(run.step(shop.task, name))

    @bench.flows.flow("parent")
    def parent(run: Run) -> list[str]:
        return list(run.gather([child.s("good"), child.s("bad")]))

    shop.fails = {"bad"}
    handle = parent.start()
    fail(bench, handle)
    steps = bench.store.list_steps(handle.id)
    bad = next(UUID(step.child_session_key or "") for step in steps if step.status is FlowStepStatus.FAILED)
    with pytest.raises(IllegalTransition, match=f"retry its parent {handle.id}, which would not be told"):
        bench.flows.handle(bad).retry()
    shop.fails, _ = set(), shop.ran()
    alone = bench.flows.handle(bad).fork(from_step="remote")
    assert bench.finish(alone) == "bad done"
    assert alone.get().parent_flow_id is None
    again = handle.retry()
    assert bench.finish(again) == ["good done", "bad done"]
    assert shop.ran() == ["bad", "bad"]
    good = [step for step in bench.store.list_steps(again.id) if step.child_session_key is None and step.position]
    assert [step.result_json for step in good] == ["good done"], "the child stays with the original"


def test_a_mirrored_flow_is_not_ours_to_run_again(bench: Bench, shop: Shop) -> None:
    flow = bench.flows.manager.create_mirrored(controller_id="remote", owner_session_key="me")
    with pytest.raises(InvalidData, match="is mirrored"):
        bench.flows.handle(flow.id).retry()


def test_a_version_that_is_not_here_is_named(bench: Bench, shop: Shop, make_bench: MakeBench) -> None:
    handle = three(shop).start("Ada")
    bench.work()
    elsewhere = make_bench()

    @elsewhere.flows.flow("three", version=4)
    def flow(run: Run, name: str) -> None: ...

    with pytest.raises(UnknownFlow, match="no flow definition 'three' of version 3"):
        elsewhere.flows.handle(handle.id).fork(from_step="note")


# ---- fork -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("from_step", "again"),
    [
        ("note", ["first", "second", "third"]),
        ("note#1", ["first", "second", "third"]),
        ("remote", ["second", "third"]),
        ("note#2", ["third"]),
    ],
)
def test_a_fork_goes_on_at_the_step_that_is_named(bench: Bench, shop: Shop, from_step: str, again: list[str]) -> None:
    handle = three(shop).start("Ada")
    bench.finish(handle)
    before = unchanged(bench, handle.id)
    shop.ran()
    forked = handle.fork(from_step=from_step)
    assert bench.finish(forked) == ["first done", "second done", "third done"]
    assert shop.ran() == again
    assert unchanged(bench, handle.id) == before
    by_run_id = handle.fork(from_step=named(bench, handle, from_step).run_id)
    bench.finish(by_run_id)
    assert shop.ran() == again


def named(bench: Bench, handle: FlowHandle[Any], name: str) -> FlowStep:
    task, _, number = name.partition("#")
    return sorted(
        (step for step in bench.store.list_steps(handle.id) if step.task == task), key=lambda step: step.position
    )[int(number or 1) - 1]


@pytest.mark.parametrize(
    "from_step", ["nothing", "note#3", "note#0", "note#", "#1", "", "5561c6ce-865e-4fb6-8a3e-82e6cf027a12"]
)
def test_a_step_that_is_not_there_is_answered_with_those_that_are(bench: Bench, shop: Shop, from_step: str) -> None:
    handle = three(shop).start("Ada")
    bench.finish(handle)
    with pytest.raises(InvalidData, match=r"from_step: is no step that flow .* took; these are: note#1 to note#2, rem"):
        handle.fork(from_step=from_step)


def test_a_flow_that_has_not_ended_is_forked_beside_itself(bench: Bench, shop: Shop) -> None:
    handle = three(shop).start("Ada")
    for kind, run_id in bench.claimable():
        assert kind == "drive"
        bench.drive(UUID(run_id))  # its second step is out on a queue
    forked = handle.fork(from_step="remote")
    assert [bench.finish(each)[1] for each in (handle, forked)] == ["second done"] * 2
    assert sorted(shop.ran()) == ["first", "second", "second", "third", "third"]


def test_members_of_a_gather_are_taken_over_by_their_places(bench: Bench, shop: Shop) -> None:
    @bench.flows.flow("gathers")
    def flow(run: Run) -> list[str]:
        return list(run.gather([shop.task.s("a"), shop.task.s("b"), partial(shop.note, "here"), shop.task.s("c")]))

    handle = flow.start()
    bench.finish(handle)
    shop.ran()
    assert bench.finish(handle.fork(from_step="remote#2")) == ["a done", "b done", "here done", "c done"]
    assert sorted(shop.ran()) == ["b", "c", "here"]


def test_the_state_is_what_it_was_at_that_step(bench: Bench, shop: Shop) -> None:
    @bench.flows.flow("tells")
    def flow(run: Run) -> None:
        for name in ("a", "b", "c"):
            run.step(shop.note, name)
            run.update(last=name, **{name: 1})
        run.step(shop.note, "broken")

    shop.fails = {"broken"}
    handle = flow.start()
    fail(bench, handle)
    assert handle.fork(from_step="note").state() == {}
    assert handle.fork(from_step="note#3").state() == {"last": "b", "a": 1, "b": 1}
    retried = handle.retry()
    assert retried.state() == {"last": "c", "a": 1, "b": 1, "c": 1}
    assert retried.fork(from_step="update#2").state() == {"last": "a", "a": 1}
    given = handle.fork(from_step="note#3", state={"given": True})
    assert given.state() == {"given": True}
    assert given.fork(from_step="update#2").state() == {"given": True}
    fail(bench, given)
    assert given.state() == {"given": True, "last": "c", "c": 1, "failure": {"reason": "StepFailed"}}
    refused: Any
    for refused in ([], {"a": {1, 2}}):
        with pytest.raises(InvalidData, match="state"):
            handle.fork(from_step="note", state=refused)


def test_steps_that_are_known_by_a_key_are_taken_over_if_they_had_ended(bench: Bench, shop: Shop) -> None:
    @bench.flows.flow("child")
    def child(run: Run) -> str:
        return shop.note("child")

    def write(session: Session, what: str) -> str:
        return shop.note(what)

    order = ["inline", "remote", "child", "transaction"]

    @bench.flows.flow("keyed")
    def flow(run: Run) -> None:
        for each in order:
            by_key = run.options(key=f"key of {each}")
            if each == "inline":
                by_key.step(shop.note, each)
            elif each == "remote":
                by_key.step(shop.task, each)
            elif each == "child":
                by_key.flow(child)
            else:
                by_key.transaction(write, each)
            run.step(shop.note, f"after {each}")

    shop.fails = {"after transaction"}
    handle = flow.start()
    fail(bench, handle)
    assert shop.ran() == [name for each in order for name in (each, f"after {each}")]
    order.reverse()  # they may come in another order
    shop.fails = set()
    bench.finish(handle.retry())
    assert shop.ran() == ["after inline"], "the place of what failed"
    order.reverse()
    bench.finish(handle.fork(from_step="note#2"))  # after remote
    assert shop.ran() == ["after remote", "child", "after child", "transaction", "after transaction"]
    bench.finish(handle.fork(from_step="child"))
    assert shop.ran() == ["child", "after child", "transaction", "after transaction"]


def test_what_was_drawn_before_is_drawn_again_and_then_anew(bench: Bench, shop: Shop) -> None:
    drawn: list[tuple[UUID, float]] = []

    @bench.flows.flow("draws")
    def flow(run: Run) -> None:
        drawn.clear()
        for name in ("a", "b", "c"):
            drawn.append((run.uuid(), run.random()))
            run.step(shop.note, name)
        drawn.append((run.uuid(), run.random()))

    def draws(handle: FlowHandle[Any]) -> list[tuple[UUID, float]]:
        bench.finish(handle)
        return list(drawn)

    first = flow.start()
    original = draws(first)
    second = first.fork(from_step="note#3")
    forked = draws(second)
    assert forked[:2] == original[:2]
    assert not set(forked[2:]) & set(original)
    assert draws(first.fork(from_step="note"))[0] not in original
    again = draws(second.fork(from_step="note#2"))
    assert again[:1] == original[:1]
    assert not set(again[1:]) & set(original + forked)
    third = second
    for _ in range(2):  # a fork of a fork at the same step, and one at the end
        third = third.fork(from_step="note#3")
        assert draws(third)[:2] == original[:2]


def test_a_deadline_begins_anew(bench: Bench, shop: Shop) -> None:
    @bench.flows.flow("late", timeout=timedelta(milliseconds=200))
    def flow(run: Run) -> str:
        run.step(shop.note, "first")
        return str(run.wait_for("go", "on"))

    handle = flow.start()
    fail(bench, handle)
    assert (handle.get().error_json or {})["type"] == "FlowTimedOut"
    bench.flows.emit("go", "on", "in time")
    again = handle.retry()
    deadline, before = again.get().deadline_at, handle.get().deadline_at
    assert deadline is not None
    assert before is not None
    assert deadline > before
    assert bench.finish(again) == "in time"
    assert shop.ran() == ["first"]


def test_a_history_that_its_function_does_not_fit_is_forked_where_they_part(
    bench: Bench, shop: Shop, make_bench: MakeBench
) -> None:
    @bench.flows.flow("changes")
    def flow(run: Run) -> str:
        run.step(shop.note, "first")
        run.step(shop.task, "second")
        return str(run.wait_for("go", "on"))

    handle = flow.start()
    bench.work()
    other = make_bench()

    @other.flows.flow("changes")
    def changed(run: Run) -> str:
        run.step(shop.note, "first")
        return str(run.step(shop.note, "another"))

    other.call_driver(handle.id)
    other.work()
    assert (handle.get().error_json or {})["type"] == "HistoryMismatch", "it is left alone"
    with pytest.raises(IllegalTransition):
        other.flows.handle(handle.id).retry()
    assert other.finish(other.flows.handle(handle.id).fork(from_step="remote")) == "another done"
    handle.cancel()
    bench.flows.manager.cancel(handle.id)


def test_a_flow_that_went_on_as_another_is_forked_by_itself(bench: Bench, shop: Shop) -> None:
    @bench.flows.flow("restarts")
    def flow(run: Run, n: int) -> str:
        run.step(shop.note, f"a{n}")
        run.step(shop.note, f"b{n}")
        return run.restart_as(n + 1) if n < 2 else "end"

    handle = flow.start(1, key="k")
    bench.finish(handle)
    shop.ran()
    with pytest.raises(IllegalTransition):
        handle.retry()
    forked = handle.fork(from_step="note#2")
    assert bench.finish(forked) == "end"
    assert shop.ran() == ["b1", "a2", "b2"]
    last = bench.flows.handle(forked.get().continued_as or "")
    assert (last.get().idempotency_key, last.get().forked_from) == (None, None)


# ---- in whose transaction, and under which faults -------------------------------------------------------------------


def test_going_back_is_part_of_the_callers_transaction(bench: Bench, shop: Shop) -> None:
    shop.fails = {"second"}
    handle = three(shop).start("Ada")
    fail(bench, handle)
    bench.messages()
    with Session(bench.store.engine) as session:
        undone = [handle.retry(session=session), handle.fork(from_step="remote", session=session)]
        assert bench.messages() == []
        session.rollback()
    for each in undone:
        with pytest.raises(FlowNotFound):
            each.get()
    with Session(bench.store.engine) as session, session.begin():
        again = handle.retry(session=session)
    assert [message.id for message in bench.messages() if message.kwargs or message.args] != []
    shop.fails = set()
    assert bench.finish(again) == ["first done", "second done", "third done"]


def test_the_same_from_asyncio(bench: Bench, shop: Shop) -> None:
    shop.fails = {"second"}
    handle = three(shop).start("Ada")
    fail(bench, handle)

    async def go_back() -> list[FlowHandle[Any]]:
        engine = make_async_engine(bench.url)
        made = [await handle.aretry(), await handle.afork(from_step="remote", state={"given": 1})]
        async with AsyncSession(engine) as session, session.begin():
            made.append(await handle.aretry(session=session))
        await engine.dispose()
        return made

    retried, forked, with_session = asyncio.run(go_back())
    shop.fails = set()
    assert forked.state() == {"given": 1}
    for each in (retried, forked, with_session):
        assert bench.finish(each) == ["first done", "second done", "third done"]


@pytest.mark.parametrize("strikes", list(Strikes))
def test_no_step_is_run_twice_under_a_fault_at_every_call(make_bench: MakeBench, strikes: Strikes) -> None:
    survivor = make_bench()
    shop = Shop(survivor)
    shop.fails = {"third"}
    handle = three(shop).start("Ada")
    fail(survivor, handle)
    struck: list[str] = []
    for at in range(1, MOST_CALLS):
        store = MortalStore(make_engine(survivor.url))
        bench = make_bench(store=store)
        mortal = Shop(bench)
        three(mortal)
        shop.fails, _ = set(), shop.ran()
        store.strike(at, strikes)
        known = flow_ids(survivor)
        with suppress(Died):
            bench.flows.handle(handle.id).retry()
            bench.work()
        store.close()
        if store.struck is None:
            break
        struck.append(store.struck)
        made = flow_ids(survivor) - known
        assert len(made) == (not _dies_before_it_is_made(store.struck, strikes)), store.struck
        survivor.recover()
        for flow_id in made:
            assert survivor.finish(survivor.flows.handle(flow_id)) == ["first done", "second done", "third done"]
            assert set(mortal.ran() + shop.ran()) == {"third"}
    else:
        raise AssertionError(f"it makes more than {MOST_CALLS} calls: {struck}")
    assert {"read_origin", "create_taking_over", "claim_drive", "change_flow"} <= set(struck)
    assert list(audit.verify(survivor.store)) == []


def _dies_before_it_is_made(struck: str, strikes: Strikes) -> bool:
    reading = (Strikes.BEFORE, Strikes.AFTER)
    dies = {"get_last_life": reading, "read_origin": reading, "create_taking_over": (Strikes.BEFORE,)}
    return strikes in dies.get(struck, ())


def flow_ids(bench: Bench) -> set[UUID]:
    """The ids of all flows."""
    return {row.id for row in bench.query(sa.text("SELECT id FROM flows").columns(id=sa.Uuid()))}


def test_ten_thousand_steps_are_taken_over_at_once(bench: Bench, shop: Shop) -> None:
    many = 10_000

    @bench.flows.flow("long")
    def flow(run: Run) -> int:
        done = [run.step(shop.note, str(n)) for n in range(many)]
        run.step(shop.task, "last")
        return len(done)

    # They would take minutes to be made one by one, so they are written as a fork's are.
    made = Flow(controller_id="long", owner_session_key="me", forked_from=uuid4())
    steps = [
        FlowStep(
            flow_id=made.id,
            run_id=run_id_of(made.id, "note", n),
            task="note",
            status="succeeded",
            position=n,
            result_json="x",
        )
        for n in range(1, many + 1)
    ]
    bench.store.run(taking_over.create_taking_over, made, Drive("long"), [taking_over.Taken(step) for step in steps])
    first = bench.flows.handle(made.id)
    assert bench.finish(first, 60) == many
    began = time.monotonic()
    forked = first.fork(from_step="remote")
    took = time.monotonic() - began
    assert bench.finish(forked, 60) == many
    assert shop.ran() == ["last", "last"]
    assert len(bench.store.list_steps(forked.id)) == many + 2
    assert took < 20, f"{took:.1f} s: its transaction is open for most of this"


def test_the_audit_sees_what_is_wrong_with_a_step_that_was_taken_over(bench: Bench, shop: Shop) -> None:
    handle = three(shop).start("Ada")
    bench.finish(handle)
    forked = handle.fork(from_step="note#2")
    bench.finish(forked)
    mine = sa.and_(flow_steps.c.flow_id == forked.id, flow_steps.c.task == "note", flow_steps.c.position == 1)

    def found(*writes: Any) -> list[tuple[str, str]]:
        with bench.store.engine.connect() as connection:
            for write in writes:
                connection.execute(write)
            snapshot = audit.take_snapshot(connection, forked.id)
            connection.rollback()
        assert snapshot is not None
        return [(finding.kind, finding.about.partition(": ")[2]) for finding in audit.findings(snapshot)]

    assert found() == []
    assert found(sa.update(flow_steps).where(mine).values(result_json="another")) == [("step", "result_json")]
    earlier = sa.update(flow_steps).where(mine).values(created_at=datetime(2020, 1, 1, tzinfo=UTC))
    assert found(earlier) == [("step", "created_at")]
    told = sa.and_(flow_events.c.flow_id == forked.id, flow_events.c.kind == "step_taken_over")
    assert {kind for kind, _ in found(sa.delete(flow_events).where(told))} == {"step_without_events"}


def test_the_priority_of_the_start_is_that_of_who_goes_back(bench: Bench) -> None:
    """Though the row that had it is gone when the flow has ended."""

    @bench.flows.flow("urgent", priority=1)
    def urgent(run: Run) -> None:
        run.step(bool)
        raise RuntimeError

    [many] = urgent.start_many([None], priority=8)
    one, usual = urgent.start(priority=9), urgent.start()
    bench.work()

    def priority_of(handle: FlowHandle[Any]) -> int:
        [row] = bench.rows(handle.id)
        return int(row.priority)

    again = [handle.retry() for handle in (one, many, usual)]
    assert [priority_of(handle) for handle in again] == [9, 8, 1]
    assert priority_of(again[0].fork(from_step="bool")) == 9
    bench.work()
    assert priority_of(again[0].retry()) == 9


def test_a_flow_that_goes_back_is_under_the_limit_of_its_definition(bench: Bench, shop: Shop) -> None:
    @bench.flows.flow("limited", limit=Limit(1))
    def limited(run: Run) -> str:
        return run.step(shop.note, "once")

    shop.fails.add("once")
    handle = limited.start()
    bench.work()
    assert handle.status() is FlowStatus.FAILED
    shop.fails.clear()
    again = handle.retry()
    assert [row.limit_key for row in bench.rows(again.id)] == ['["limited"]']
    assert bench.finish(again) == "once done"


@pytest.mark.parametrize("which", [0, "paid"])
def test_what_came_first_is_taken_over(bench: Bench, shop: Shop, which: int | str) -> None:
    @bench.flows.flow("chooses")
    def chooses(run: Run) -> list[Any]:
        members: list[Any] = [Event("paid", "o1"), Timer(timedelta(hours=1)), shop.task.s("beside")]
        named = dict(zip(("paid", "late", "beside"), members, strict=True))
        first = run.first(members) if which == 0 else run.first(**named)
        return [*first, run.step(shop.note, "after")]

    shop.fails |= {"after", "beside"}
    bench.flows.emit("paid", "o1", 5)
    handle = chooses.start()
    bench.work()
    assert handle.status() is FlowStatus.FAILED
    shop.fails.clear()
    assert bench.finish(handle.retry()) == [which, 5, "after done"]
    assert bench.finish(handle.fork(from_step="note")) == [which, 5, "after done"]
    assert shop.ran() == ["beside", "after", "after", "after"]


def test_a_step_that_somebody_inserted_by_hand_is_not_taken_for_the_flows_own(make_bench: MakeBench) -> None:
    bench = make_bench()
    shop = Shop(bench)
    shop.fails = {"second"}
    handle = three(shop).start("Ada")
    fail(bench, handle)
    by_hand = FlowStep(flow_id=handle.id, run_id="mine", task="note", status=FlowStepStatus.SUCCEEDED, position=9)
    bench.store.insert_step(by_hand)
    with pytest.raises(InvalidData, match="step note: has a run id that its flow did not give it: mine"):
        handle.retry()
    with bench.store.engine.begin() as connection:  # no history would be whole with it
        connection.execute(sa.delete(flow_steps).where(flow_steps.c.id == by_hand.id))
