"""What a flow asks of people and tells them, and what it asks of the clock and of chance."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest

from celery_flows import (
    AlreadyTerminal,
    Approval,
    Decision,
    FlowCancelled,
    FlowFailed,
    FlowStatus,
    InvalidData,
    Run,
    WaitTimedOut,
)
from celery_flows.store import operations as op
from tests.support.bench import Bench
from tests.support.waiting import until


def asking(bench: Bench) -> Any:
    @bench.flows.flow("asks")
    def asks(run: Run) -> Approval:
        return run.approval("expense")

    return asks


# ---- approvals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granted", [True, False])
def test_a_decision_says_who_and_when(bench: Bench, granted: bool) -> None:
    handle = asking(bench).start()
    bench.work()
    (handle.approve if granted else handle.reject)("expense", by="ann", comment="as agreed")
    decided = bench.finish(handle)
    assert (decided.granted, decided.by, decided.comment) == (granted, "ann", "as agreed")
    assert abs(decided.at - datetime.now(UTC)) < timedelta(minutes=1)


def test_a_decision_that_comes_early_is_kept(bench: Bench) -> None:
    handle = asking(bench).start()
    handle.approve("expense", by="ann")
    assert bench.finish(handle).granted


def test_a_decision_is_of_one_flow_and_one_question(bench: Bench) -> None:
    one, other = asking(bench).start(), asking(bench).start()
    bench.work()
    other.approve("expense", by="ann")
    one.approve("holiday", by="ann")
    assert bench.finish(other).granted
    assert not one.status().is_terminal


def test_nobody_decides(bench: Bench) -> None:
    @bench.flows.flow("gives up")
    def gives_up(run: Run) -> str:
        with pytest.raises(WaitTimedOut):
            run.approval("expense", timeout=timedelta(milliseconds=20))
        return "gave up"

    assert bench.finish(gives_up.start()) == "gave up"


def test_a_flow_that_has_ended_cannot_be_approved(bench: Bench) -> None:
    handle = asking(bench).start()
    handle.approve("expense", by="ann")
    bench.finish(handle)
    with pytest.raises(AlreadyTerminal):
        handle.approve("expense", by="bob")


def test_a_second_decision_of_one_name_answers_the_next_question_of_that_name(bench: Bench) -> None:
    """It is not dropped, nor does it change the first answer: the flow may ask again. Who gives it is told."""

    @bench.flows.flow("asks twice")
    def asks_twice(run: Run) -> list[str]:
        return [run.approval("expense").by, run.approval("expense").by]

    handle = asks_twice.start()
    assert not handle.approve("expense", by="eve"), "nobody asks yet"
    bench.work()
    assert handle.approve("expense", by="ann")
    assert not handle.approve("expense", by="bob"), "it has its answer"
    assert bench.finish(handle) == ["eve", "ann"]


def test_who_decides_second_of_several_is_told(bench: Bench) -> None:
    @bench.flows.flow("asks two")
    def asks_two(run: Run) -> str:
        which = run.first(manager=Decision("manager"), finance=Decision("finance")).which
        run.wait_for("go", "on")
        return which

    handle = asks_two.start()
    bench.work()
    assert handle.approve("finance", by="ann")
    bench.work()
    assert not handle.reject("manager", by="bob")
    bench.flows.emit("go", "on")
    assert bench.finish(handle) == "finance"


def test_in_a_transaction_a_decision_is_told_how_it_looks_before_the_commit(bench: Bench) -> None:
    handle = asking(bench).start()
    bench.work()
    with bench.store.engine.begin() as connection:
        assert handle.approve("expense", by="ann", session=connection)
        assert not handle.approve("expense", by="bob", session=connection), "the other comes first"
        assert not handle.approve("holiday", by="bob", session=connection)
    bench.sweep()
    assert bench.finish(handle).by == "ann"


@pytest.mark.parametrize(("name", "by", "field"), [("", "ann", "approval"), ("expense", "", "by")])
def test_a_decision_without_a_name_is_refused(bench: Bench, name: str, by: str, field: str) -> None:
    handle = asking(bench).start()
    with pytest.raises(InvalidData) as refused:
        handle.approve(name, by=by)
    assert refused.value.field == field


def test_what_is_no_decision_fails_the_flow_with_a_sentence(bench: Bench) -> None:
    handle = asking(bench).start()
    bench.flows.emit("approval expense", str(handle.id), {"yes": 1})
    with pytest.raises(FlowFailed, match="approval expense: is none"):
        bench.finish(handle)


def test_a_decision_can_be_part_of_the_callers_transaction(bench: Bench) -> None:
    handle = asking(bench).start()
    bench.work()
    with bench.store.engine.connect() as connection:
        with connection.begin() as transaction:
            handle.approve("expense", by="ann", session=connection)
            transaction.rollback()
        bench.sweep()
        bench.work()
        assert not handle.status().is_terminal
        with connection.begin():
            handle.approve("expense", by="bob", session=connection)
    bench.sweep()
    assert bench.finish(handle).by == "bob"


# ---- pausing --------------------------------------------------------------------------------------------------------


def test_a_paused_flow_is_not_driven_until_it_is_unpaused(bench: Bench) -> None:
    @bench.flows.flow("steps")
    def steps(run: Run) -> str:
        run.step(bench.effects.append, "one")
        run.step(bench.flows.handle(run.flow_id).pause)
        run.step(bench.effects.append, "two")
        return "done"

    handle = steps.start()
    bench.work()
    bench.pass_time()
    bench.sweep()
    bench.work()
    assert bench.effects == ["one"]
    assert handle.get().paused_at is not None
    handle.unpause()
    assert bench.finish(handle) == "done"
    assert bench.effects == ["one", "two"]
    with pytest.raises(AlreadyTerminal):
        handle.pause()


@pytest.mark.parametrize("works", [True, False], ids=["at its work", "at rest"])
def test_a_cancel_reaches_a_paused_flow_and_has_it_clean_up(bench: Bench, works: bool) -> None:
    pause = bench.flows.manager.pause

    @bench.flows.flow("paused")
    def paused(run: Run) -> None:
        run.on_failure(bench.effects.append, "undone")
        run.step(bench.effects.append, "one")
        if works:
            run.step(lambda: pause(run.flow_id).revision)
        run.wait_for("go", "on")

    handle = paused.start()
    bench.work()
    if not works:
        pause(handle.id)
    handle.cancel()
    with pytest.raises(FlowCancelled):
        bench.finish(handle)
    assert bench.effects == ["one", "undone"]


def test_a_cancel_comes_before_a_pause_that_comes_later(bench: Bench) -> None:
    @bench.flows.flow("cleans up")
    def cleans_up(run: Run) -> None:
        try:
            run.wait_for("go", "on")
        except FlowCancelled:
            run.step(lambda: bench.flows.manager.pause(run.flow_id).revision)
            run.step(bench.effects.append, "cleaned up")
            raise

    handle = cleans_up.start()
    bench.work()
    handle.cancel()
    handle.pause()
    bench.work()
    assert (handle.status(), bench.effects) == (FlowStatus.CANCELLED, ["cleaned up"])


def test_a_paused_child_does_not_keep_its_parent_from_being_cancelled(bench: Bench) -> None:
    @bench.flows.flow("child")
    def child(run: Run) -> None:
        run.wait_for("go", "on")

    @bench.flows.flow("parent")
    def parent(run: Run) -> None:
        run.flow(child)

    handle = parent.start()
    bench.work()
    [found] = bench.flows.search(definition="child")
    bench.flows.manager.pause(found.id)
    handle.cancel()
    with pytest.raises(FlowCancelled):
        bench.finish(handle)


def test_the_deadline_of_a_paused_flow_waits(bench: Bench) -> None:
    @bench.flows.flow("late", timeout=timedelta(milliseconds=1))
    def late(run: Run) -> None:
        run.step(bench.effects.append, "never")

    handle = late.start()
    bench.flows.manager.pause(handle.id)
    deadline = handle.get().deadline_at
    assert deadline is not None
    until(lambda: bench.store.run(op.now) > deadline, "the deadline passes")
    bench.drive(handle.id)
    assert handle.status() is FlowStatus.CREATED
    handle.unpause()
    with pytest.raises(FlowFailed, match="FlowTimedOut"):
        bench.finish(handle)
    assert bench.effects == []


# ---- progress -------------------------------------------------------------------------------------------------------


def test_progress_is_seen_at_once_and_told_once(bench: Bench) -> None:
    @bench.flows.flow("progresses")
    def progresses(run: Run) -> str:
        run.update(done=1, of=3)
        run.step(lambda: bench.effects.append(bench.flows.handle(run.flow_id).state()))
        run.update(done=2)
        run.wait_for("go", "on")
        return "done"

    handle = progresses.start()
    bench.work()
    assert bench.effects == [{"done": 1, "of": 3}]
    bench.flows.emit("go", "on")
    bench.finish(handle)
    assert handle.state() == {"done": 2, "of": 3}
    assert bench.kinds(handle.id).count("state_updated") == 2


def test_progress_from_outside_is_kept(bench: Bench) -> None:
    def outside(flow_id: str) -> None:
        bench.flows.manager.update_state(UUID(flow_id), {"outside": 1})

    @bench.flows.flow("progresses")
    def progresses(run: Run) -> None:
        run.step(outside, str(run.flow_id))
        run.update(inside=1)

    handle = progresses.start()
    bench.finish(handle)
    assert handle.state() == {"outside": 1, "inside": 1}


def test_progress_that_cannot_be_json_is_refused(bench: Bench) -> None:
    @bench.flows.flow("progresses")
    def progresses(run: Run) -> None:
        run.update(done=object())

    with pytest.raises(FlowFailed, match="InvalidData: state"):
        bench.finish(progresses.start())


# ---- clock and chance -----------------------------------------------------------------------------------------------


def test_time_ids_and_chance_are_the_same_when_replayed(bench: Bench) -> None:
    seen: list[Any] = []

    @bench.flows.flow("asks")
    def asks(run: Run) -> bool:
        seen.append([run.now(), run.now(), run.uuid(), run.uuid(), run.random(), run.random()])
        run.wait_for("go", "on")
        return True

    handle = asks.start()
    bench.work()
    bench.flows.emit("go", "on")
    bench.finish(handle)
    first, second = seen
    assert first == second
    assert first[0].tzinfo is not None
    assert len(set(first)) == 6
    assert all(0 <= chance < 1 for chance in first[4:])
    assert bench.kinds(handle.id).count("step_succeeded") == 2  # ids and chance cost no record


def test_two_flows_have_their_own_chance(bench: Bench) -> None:
    @bench.flows.flow("asks")
    def asks(run: Run) -> list[str]:
        return [str(run.uuid()), str(run.random())]

    one, other = bench.finish(asks.start()), bench.finish(asks.start())
    assert set(one).isdisjoint(other)
