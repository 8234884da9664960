"""A flow without an end goes on as another one with a fresh history, under the same key."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest

from celery_flows import FlowCancelled, FlowFailed, FlowStatus, InvalidData, KeyConflict, ResultTimedOut, Run
from celery_flows.store.engines import make_engine
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
    assert flow.start(2, key="k").id == last.id
    with pytest.raises(KeyConflict):
        flow.start(1, key="k")


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
