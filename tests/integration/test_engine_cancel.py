"""Cancelling: sticky, told to the flow once, cleaned up after, and never beside a member that still runs."""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest

from celery_flows import AlreadyTerminal, FlowCancelled, FlowHandle, FlowStatus, FlowStepStatus, Run
from tests.integration.conftest import MakeBench
from tests.support.bench import Bench

LONG = timedelta(days=1)


def sagas(bench: Bench) -> Any:
    """A flow that reserves, waits in the way it is asked to, and takes the reservation back when it is cancelled."""

    def reserve() -> str:
        bench.effects.append("reserved")
        return "reserved"

    def undo() -> str:
        bench.effects.append("undone")
        return "undone"

    @bench.task("work")
    def work(n: int) -> int:
        bench.effects.append(f"worked {n}")
        return n

    @bench.task("undo elsewhere")
    def undo_elsewhere() -> str:
        bench.effects.append("undone elsewhere")
        return "undone"

    @bench.flows.flow("saga")
    def saga(run: Run, way: str) -> str:
        run.step(reserve)
        try:
            if way == "sleeps":
                run.sleep(LONG)
            if way == "waits":
                run.wait_for("approval", "o-1")
            if way == "gathers":
                run.gather(work.s(n) for n in range(3))
            if way == "cancels itself":
                run.step(cancel_from_outside, str(run.flow_id))
                run.step(reserve)
        except FlowCancelled:
            bench.effects.append("told")
            run.step(undo)
            run.step(undo_elsewhere)
            raise
        return "done"

    def cancel_from_outside(flow_id: str) -> None:
        bench.flows.handle(flow_id).cancel()

    return saga


UNDONE = ["reserved", "told", "undone", "told", "undone elsewhere"]


def is_cancelled(bench: Bench, handle: FlowHandle[Any]) -> bool:
    with pytest.raises(FlowCancelled):
        bench.finish(handle)
    flow = handle.get()
    return flow.status is FlowStatus.CANCELLED and flow.cancel_requested and flow.wait_json is None


def told_once_a_pass(effects: list[Any]) -> list[Any]:
    """What was done, without how often the flow function was told: once in each pass over it."""
    return [effect for effect in effects if effect != "told"]


def test_a_flow_cancelled_before_it_began_is_told_at_its_first_step(bench: Bench) -> None:
    handle = sagas(bench).start("sleeps")
    handle.cancel()
    assert is_cancelled(bench, handle)
    assert bench.effects == []


@pytest.mark.parametrize("way", ["sleeps", "waits"])
def test_a_waiting_flow_that_is_cancelled_cleans_up(bench: Bench, way: str) -> None:
    handle = sagas(bench).start(way)
    bench.work()
    assert handle.status() is FlowStatus.WAITING
    handle.cancel()
    assert is_cancelled(bench, handle)
    assert told_once_a_pass(bench.effects) == ["reserved", "undone", "undone elsewhere"]
    steps = {step.task: step.status for step in bench.store.list_steps(handle.id)}
    assert steps.pop("undo") is steps.pop("undo elsewhere") is steps.pop("reserve") is FlowStepStatus.SUCCEEDED
    assert list(steps.values()) == [FlowStepStatus.CANCELLED]


def test_cancel_during_a_step_lets_it_end_and_records_it(bench: Bench) -> None:
    handle = sagas(bench).start("cancels itself")
    assert is_cancelled(bench, handle)
    assert told_once_a_pass(bench.effects) == ["reserved", "undone", "undone elsewhere"]
    steps = [step.task for step in bench.store.list_steps(handle.id)]
    assert steps == ["reserve", "cancel_from_outside", "undo", "undo elsewhere"]


def test_cancel_with_members_out_takes_back_those_that_have_not_begun(bench: Bench) -> None:
    handle = sagas(bench).start("gathers")
    bench.drive(handle.id)
    first = sorted(bench.store.list_steps(handle.id), key=lambda step: step.position)[1]
    bench.run_step(first.run_id)
    handle.cancel()
    assert is_cancelled(bench, handle)
    assert told_once_a_pass(bench.effects) == ["reserved", "worked 0", "undone", "undone elsewhere"]
    statuses = [step.status for step in bench.store.list_steps(handle.id) if step.task == "work"]
    assert sorted(statuses) == [FlowStepStatus.CANCELLED, FlowStepStatus.CANCELLED, FlowStepStatus.SUCCEEDED]


def test_no_cleanup_runs_beside_a_member_that_still_works(make_bench: MakeBench) -> None:
    bench, other = make_bench(), make_bench()
    flow = sagas(bench)
    held: list[UUID] = []

    @other.task("work")
    def work(n: int) -> int:
        bench.flows.handle(held[0]).cancel()
        bench.work()  # the other members are taken back, and the flow is driven as far as it goes
        bench.effects.append("still working")
        return n

    handle = flow.start("gathers")
    held.append(handle.id)
    bench.drive(handle.id)
    last = sorted(bench.store.list_steps(handle.id), key=lambda step: step.position)[-1]
    other.run_step(last.run_id, goes_on=False)
    assert is_cancelled(bench, handle)
    assert told_once_a_pass(bench.effects) == ["reserved", "still working", "undone", "undone elsewhere"]


def test_a_member_claimed_after_the_cancel_does_not_begin(bench: Bench) -> None:
    handle = sagas(bench).start("gathers")
    bench.drive(handle.id)
    handle.cancel()
    for step in bench.store.list_steps(handle.id)[1:]:
        bench.run_step(step.run_id, goes_on=False)
    assert not any(str(effect).startswith("worked") for effect in bench.effects)
    assert is_cancelled(bench, handle)


@pytest.mark.parametrize("way", ["sleeps", "waits", "gathers"])
def test_cancel_in_the_moment_before_the_flow_would_wait_is_not_missed(
    bench: Bench, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cancel commits after the driver last looked, and before it writes that the flow waits."""
    handle = sagas(bench).start(way)
    changing = bench.store.change

    def cancel_first(change: Any, **more: Any) -> Any:
        if change.kind in ("waiting", "step_scheduled"):
            monkeypatch.undo()
            handle.cancel()
        return changing(change, **more)

    monkeypatch.setattr(bench.store, "change", cancel_first)
    bench.drive(handle.id)
    bench.sweep()
    assert is_cancelled(bench, handle)
    assert told_once_a_pass(bench.effects) == ["reserved", "undone", "undone elsewhere"]


def test_cancel_in_the_moment_before_the_flow_would_finish_wins(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = sagas(bench).start("at once")
    changing = bench.store.change

    def cancel_first(change: Any, **more: Any) -> Any:
        if change.kind == "finished":
            monkeypatch.undo()
            handle.cancel()
        return changing(change, **more)

    monkeypatch.setattr(bench.store, "change", cancel_first)
    assert is_cancelled(bench, handle)


def test_a_flow_cannot_go_on_after_it_was_told(bench: Bench) -> None:
    """Catching the news does not take it back: whatever follows is cleanup, and the flow ends as cancelled."""

    @bench.flows.flow("deaf")
    def deaf(run: Run) -> str:
        try:
            run.sleep(LONG)
        except FlowCancelled:
            return "finished all the same"
        return "slept"

    handle = deaf.start()
    bench.work()
    handle.cancel()
    assert is_cancelled(bench, handle)
    assert handle.get().result_json is None


def test_a_cleanup_that_fails_still_ends_as_cancelled(bench: Bench) -> None:
    def refuse() -> None:
        raise ValueError("cannot be undone")

    @bench.flows.flow("stuck")
    def stuck(run: Run) -> None:
        try:
            run.sleep(LONG)
        finally:
            run.step(refuse)

    handle = stuck.start()
    bench.work()
    handle.cancel()
    assert is_cancelled(bench, handle)
    assert [step.status for step in bench.store.list_steps(handle.id) if step.task == "refuse"] == ["failed"]


def test_cleanup_must_not_wait(bench: Bench) -> None:
    """A cancelled flow cannot become waiting; a cleanup that would sleep or wait is told so again, and ends."""

    @bench.flows.flow("dawdles")
    def dawdles(run: Run) -> None:
        try:
            run.sleep(LONG)
        except FlowCancelled:
            run.sleep(LONG)
            bench.effects.append("slept")

    handle = dawdles.start()
    bench.work()
    handle.cancel()
    assert is_cancelled(bench, handle)
    assert bench.effects == []


def test_cancelling_twice_is_once_and_too_late_is_said(bench: Bench) -> None:
    handle = sagas(bench).start("sleeps")
    handle.cancel()
    handle.cancel()
    assert bench.kinds(handle.id).count("cancel_requested") == 1
    assert is_cancelled(bench, handle)
    with pytest.raises(AlreadyTerminal):
        handle.cancel()


def test_cancel_in_a_callers_transaction_follows_its_end(bench: Bench) -> None:
    handle = sagas(bench).start("sleeps")
    bench.work()
    bench.messages()
    with bench.store.engine.connect() as caller:
        handle.cancel(session=caller)
        caller.rollback()
    assert not handle.get().cancel_requested
    with bench.store.engine.connect() as caller:
        handle.cancel(session=caller)
        assert bench.messages() == []
        caller.commit()
    assert [message.id for message in bench.messages()] == [str(handle.id)]
    assert is_cancelled(bench, handle)


def test_a_hard_cancel_ends_the_flow_under_its_driver(bench: Bench) -> None:
    """Without cleanup, at once; the driver's next write is refused and its step's outcome is not kept."""

    def cancel_hard(flow_id: str) -> None:
        bench.flows.manager.cancel(UUID(flow_id))

    @bench.flows.flow("cut off")
    def cut_off(run: Run) -> str:
        try:
            run.step(cancel_hard, str(run.flow_id))
            bench.effects.append("went on")
        except Exception:
            bench.effects.append("caught")
        return "finished"

    handle = cut_off.start()
    bench.work()
    assert handle.status() is FlowStatus.CANCELLED
    assert bench.effects == []
    assert bench.store.list_steps(handle.id) == []


def test_a_hard_cancel_with_members_out_refuses_their_outcomes(bench: Bench) -> None:
    handles: list[UUID] = []

    @bench.task("cancels")
    def cancels() -> int:
        bench.flows.manager.cancel(handles[0])
        return 1

    @bench.flows.flow("cut off")
    def cut_off(run: Run) -> int:
        return run.step(cancels)

    handle = cut_off.start()
    handles.append(handle.id)
    bench.work()
    [step] = bench.store.list_steps(handle.id)
    assert (step.status, step.result_json) == (FlowStepStatus.CANCELLED, None)
