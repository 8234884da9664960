"""A flow without an end goes on as another one with a fresh history, under the same key."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from celery_flows import (
    AlreadyTerminal,
    AsyncRun,
    FlowCancelled,
    FlowFailed,
    FlowHandle,
    FlowManager,
    FlowNotFound,
    FlowStatus,
    InvalidData,
    KeyConflict,
    ResultTimedOut,
    Run,
)
from celery_flows.store.engines import make_engine
from celery_flows.store.tables import flow_dispatch
from tests.integration.conftest import MakeBench
from tests.support.bench import Bench
from tests.support.faults import Died, MortalStore, Strikes

MOST_CALLS = 60


def counting(bench: Bench, last: int = 3) -> Any:
    """A flow that does its work once per life, and ends in its last one."""

    @bench.flows.flow("counts")
    def counts(run: Run, number: int) -> str:
        run.step(bench.effects.append, number)
        if number < last:
            run.restart_as(number + 1)
        return f"ended at {number}"

    return counts


def lives(bench: Bench, flow_id: Any) -> list[Any]:
    """The flows that went on for this one, itself first."""
    found = [bench.store.get(flow_id)]
    while (last := found[-1]) is not None and last.continued_as is not None:
        found.append(bench.store.get(last.continued_as))
    return found


def test_each_life_has_a_history_of_its_own(bench: Bench) -> None:
    handle = counting(bench).start(1, key="k", owner="tenant:acme", goal="to count")
    bench.work()
    assert handle.result(0) == "ended at 3"
    first, second, third = lives(bench, handle.id)
    assert [flow.status for flow in (first, second, third)] == [FlowStatus.FINISHED] * 3
    assert [flow.idempotency_key for flow in (first, second, third)] == [None, None, "k"]
    assert {(flow.owner_session_key, flow.goal) for flow in (first, second, third)} == {("tenant:acme", "to count")}
    assert bench.kinds(first.id) == ["created", "started", "step_succeeded", "continued"]
    assert bench.store.list_events(second.id, None)[-1].payload_json["continues"] == str(first.id)
    assert bench.effects == [1, 2, 3]


def test_the_key_is_that_of_the_life_that_goes_on(bench: Bench) -> None:
    flow = counting(bench, last=2)
    handle = flow.start(1, key="k")
    bench.work()
    [_, last] = lives(bench, handle.id)
    assert last.idempotency_key == "k"
    assert bench.flows.search(key="k") == [last]


def test_a_key_that_was_given_again_after_a_restart_gives_the_life_that_is_there(bench: Bench) -> None:
    """As at each boot of an application, which knows the first life's input alone; and never mind which it gives."""
    flow = counting(bench)
    handle = flow.start(1, key="k")
    bench.work()
    [*_, last] = lives(bench, handle.id)
    assert [flow.start(number, key="k").id for number in (1, 2, 3, 4)] == [last.id] * 4
    [same, _] = flow.start_many([1, 3], keys=["k", "new"])
    assert same.id == last.id
    start_flow = bench.app.tasks["flows.start"]
    assert start_flow(name="counts", input=1, key="k") == str(last.id)
    assert start_flow(name="counts", input=1, key="k") == str(last.id), "delivered twice"
    with Session(bench.store.engine) as session, session.begin():
        assert flow.start(1, key="k", session=session).id == last.id


def test_a_key_whose_flow_has_not_started_anew_conflicts_beside_one_that_has(bench: Bench) -> None:
    flow = counting(bench)
    flow.start_many([1, 3], keys=["went on", "did not"])
    bench.work()
    with pytest.raises(KeyConflict, match="did not"):
        flow.start_many([1, 2, 0], keys=["went on", "did not", "new"])
    assert bench.flows.search(key="new") == []


def test_the_priority_goes_on(bench: Bench) -> None:
    @bench.flows.flow("urgent", priority=1)
    def urgent(run: Run, number: int) -> None:
        if number < 3:
            run.restart_as(number + 1)
        run.wait_for("go", "on")

    urgent.start(1, priority=9)
    bench.work()
    [row] = bench.query(sa.select(flow_dispatch.c.priority).where(flow_dispatch.c.kind == "drive"))
    assert row.priority == 9
    bench.flows.emit("go", "on")
    bench.work()


def test_the_result_is_waited_for_through_all_lives(bench: Bench) -> None:
    @bench.flows.flow("goes on")
    def goes_on(run: Run, number: int) -> str:
        if number == 1:
            run.restart_as(2)
        return str(run.wait_for("go", "on"))

    handle = goes_on.start(1)
    bench.work()
    with pytest.raises(ResultTimedOut):
        handle.result(0)
    bench.flows.emit("go", "on", "went")
    bench.work()
    assert handle.result(0) == "went"


def test_it_goes_on_with_the_latest_version(make_bench: MakeBench) -> None:
    bench = make_bench()

    @bench.flows.flow("grows")
    def first(run: Run, number: int) -> str:
        run.wait_for("go", "on")
        run.restart_as(number + 1)

    handle = first.start(1)
    bench.work()
    bench.flows.flow("grows", version=2)(lambda run, number: f"version 2, {number}")
    bench.flows.emit("go", "on")
    bench.work()
    assert handle.result(0) == "version 2, 2"


def test_a_cancel_that_comes_first_cancels(bench: Bench) -> None:
    @bench.flows.flow("cancelled")
    def cancelled(run: Run) -> None:
        run.step(bench.flows.handle(run.flow_id).cancel)
        run.restart_as()

    handle = cancelled.start(key="k")
    bench.work()
    with pytest.raises(FlowCancelled):
        handle.result(0)
    assert len(lives(bench, handle.id)) == 1


@pytest.mark.parametrize("wrong", ["x", object()])
def test_an_input_that_the_flow_does_not_take_fails_it(bench: Bench, wrong: Any) -> None:
    @bench.flows.flow("wrong")
    def flow(run: Run, number: int) -> None:
        run.restart_as(wrong)

    with pytest.raises(FlowFailed, match=InvalidData.__name__):
        bench.finish(flow.start(1))


def test_a_child_does_not_go_on_as_another(bench: Bench) -> None:
    child = counting(bench)

    @bench.flows.flow("parent")
    def parent(run: Run) -> Any:
        return run.flow(child, 1)

    with pytest.raises(FlowFailed, match="restart_as: is not for child flows"):
        bench.finish(parent.start())


@pytest.mark.parametrize("strikes", list(Strikes))
def test_no_life_is_lost_or_lived_twice_under_a_fault_at_every_call(make_bench: MakeBench, strikes: Strikes) -> None:
    survivor = make_bench()
    flow = counting(survivor)
    struck: list[str] = []
    for at in range(1, MOST_CALLS):
        store = MortalStore(make_engine(survivor.url))
        bench = make_bench(store=store)
        mortal_flow = counting(bench)
        store.strike(at, strikes)
        survivor.effects.clear()
        handle = None
        with suppress(Died):
            handle = mortal_flow.start(1, key=str(at))
            bench.work()
        store.close()
        if store.struck is None:
            break
        struck.append(store.struck)
        if handle is None:
            handle = flow.start(1, key=str(at))
        handle = survivor.flows.handle(handle.id)
        survivor.recover()
        assert survivor.finish(handle) == "ended at 3"
        assert [flow.idempotency_key for flow in lives(survivor, handle.id)] == [None, None, str(at)]
        ran = bench.effects + survivor.effects
        assert sorted(set(ran)) == [1, 2, 3]
        assert len(ran) <= 4, f"{strikes} at {store.struck}: {ran}"
    else:
        raise AssertionError(f"the flow makes more than {MOST_CALLS} calls: {struck}")
    assert {"create_flow", "claim_drive", "change_and_continue", "change_flow"} <= set(struck)


def test_who_goes_on_has_the_priority_of_the_definition(bench: Bench) -> None:
    @bench.flows.flow("counts", priority=7)
    def counts(run: Run, number: int) -> None:
        if number == 0:
            run.restart_as(1)

    handle = counts.start(0)
    bench.drive(handle.id)
    [_, after] = lives(bench, handle.id)
    assert [row.priority for row in bench.rows(after.id)] == [7]
    bench.work()


# ---- a handle of an earlier life ------------------------------------------------------------------------------------


def endless(bench: Bench, style: str = "plain") -> Any:
    """A flow that is in its third life when it first waits."""
    if style == "async":

        @bench.flows.flow("endless")
        async def lives_on_async(run: AsyncRun, number: int) -> str:
            await run.update(life=number)
            if number < 3:
                await run.restart_as(number + 1)
            return (await run.approval("end")).by

        return lives_on_async

    @bench.flows.flow("endless")
    def lives_on(run: Run, number: int) -> str:
        run.update(life=number)
        if number < 3:
            run.restart_as(number + 1)
        return run.approval("end").by

    return lives_on


def third_life(bench: Bench, style: str = "plain") -> FlowHandle[str]:
    """The handle of the first life of one that is in its third."""
    handle: FlowHandle[str] = endless(bench, style).start(1)
    bench.work()
    assert handle.get().status is FlowStatus.FINISHED
    return handle


@pytest.mark.parametrize("style", ["plain", "async"])
def test_a_handle_of_the_first_life_speaks_of_the_last(bench: Bench, style: str) -> None:
    handle = third_life(bench, style)
    assert (handle.status(), handle.state()) == (FlowStatus.WAITING, {"life": 3})
    assert (handle.get().id, handle.get().state_json) == (handle.id, {"life": 1})
    with pytest.raises(ResultTimedOut):
        handle.result(0)
    assert handle.approve("end", by="ann")
    bench.work()
    assert handle.result(0) == "ann"
    assert handle.status() is FlowStatus.FINISHED


@pytest.mark.parametrize("style", ["plain", "async"])
def test_a_cancel_by_a_handle_of_the_first_life_cancels_the_last(bench: Bench, style: str) -> None:
    handle = third_life(bench, style)
    handle.cancel()
    bench.work()
    with pytest.raises(FlowCancelled):
        handle.result(0)
    with pytest.raises(AlreadyTerminal):
        handle.cancel()


def test_an_awaited_handle_of_the_first_life_speaks_of_the_last(bench: Bench) -> None:
    handle = third_life(bench)

    async def cancel() -> None:
        assert await handle.astatus() is FlowStatus.WAITING
        with pytest.raises(ResultTimedOut):
            await handle.aresult(0)
        await handle.acancel()
        await asyncio.to_thread(bench.work)
        assert await handle.astatus() is FlowStatus.CANCELLED
        with pytest.raises(FlowCancelled):
            await handle.aresult(0)

    asyncio.run(cancel())
    again = asyncio.run(handle.aretry())
    again.approve("end", by="ann")
    assert bench.finish(again) == "ann"


def test_the_last_life_is_paused_and_resumed(bench: Bench) -> None:
    handle = third_life(bench)
    handle.pause()
    last = lives(bench, handle.id)[-1]
    assert last.paused_at is not None
    handle.unpause()
    handle.resume({"granted": True, "by": "hand", "at": "2026-01-31T08:00:00Z"})
    bench.work()
    assert handle.result(0) == "hand"


def test_a_cancel_in_the_callers_transaction_is_of_the_last_life(bench: Bench) -> None:
    handle = third_life(bench)
    with bench.store.engine.begin() as connection:
        handle.cancel(session=connection)
    bench.sweep()
    bench.work()
    assert handle.status() is FlowStatus.CANCELLED


def test_a_life_that_begins_while_it_is_cancelled_is_the_one_that_is(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flow goes on as another between the look for the last life and the change."""

    @bench.flows.flow("endless")
    def endless(run: Run, number: int) -> None:
        run.wait_for("next", "life")
        run.restart_as(number + 1)

    handle = endless.start(1)
    bench.work()
    request_cancel = FlowManager.request_cancel

    def goes_on_first(manager: FlowManager, flow_id: Any, **options: Any) -> Any:
        monkeypatch.undo()
        bench.flows.emit("next", "life")
        bench.work()
        return request_cancel(manager, flow_id, **options)

    monkeypatch.setattr(FlowManager, "request_cancel", goes_on_first)
    handle.cancel()
    bench.work()
    first, second = lives(bench, handle.id)
    assert (first.status, second.status) == (FlowStatus.FINISHED, FlowStatus.CANCELLED)


def test_a_fork_is_of_the_history_that_the_handle_names(bench: Bench) -> None:
    handle = counting(bench).start(1)
    bench.work()
    assert handle.fork(from_step="append").get().input_json == 1


def test_who_is_not_there_is_not_found(bench: Bench) -> None:
    handle = bench.flows.handle(UUID(int=7))
    for ask in handle.status, handle.state, handle.cancel, handle.result:
        with pytest.raises(FlowNotFound):
            ask()
