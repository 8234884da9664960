"""Undoing: what was done is undone in reverse when the flow fails or is cancelled, each undo a recorded step."""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta
from typing import Any

import pytest

from celery_flows import FlowCancelled, FlowFailed, FlowStatus, InvalidData, Retry, Run, StepFailed
from celery_flows.store import FlowStepStatus, dispatch
from celery_flows.store.changes import Completion
from celery_flows.store.engines import make_engine
from celery_flows.worker.cli.story import facts
from tests.integration.conftest import MakeBench
from tests.support.bench import Bench
from tests.support.faults import Died, MortalStore, Strikes

ONCE_MORE = Retry(2, initial=timedelta(milliseconds=1))


def booking(bench: Bench, *, fails: tuple[str, ...] = ()) -> Any:
    """A trip of three parts, of which each is undone; ``fails`` names what does not work."""

    def note(what: str) -> str:
        bench.effects.append(what)
        if what in fails:
            raise RuntimeError(what)
        return what

    @bench.task("cancel flight")
    def cancel_flight(what: str) -> str:
        return note(what)

    @bench.flows.flow("trip")
    def trip(run: Run) -> str:
        run.step(note, "hotel")
        run.on_failure(note, "no hotel")
        run.step(note, "flight")
        run.on_failure(cancel_flight, "no flight")
        run.step(note, "car")
        run.on_failure(note, "no car")
        run.wait_for("paid", str(run.flow_id))
        return "booked"

    return trip


def test_a_failure_undoes_what_was_done_in_reverse(bench: Bench) -> None:
    with pytest.raises(FlowFailed, match="RuntimeError: car"):
        bench.finish(booking(bench, fails=("car",)).start())
    assert bench.effects == ["hotel", "flight", "car", "no flight", "no hotel"]


def test_so_does_a_cancel(bench: Bench) -> None:
    handle = booking(bench).start()
    bench.work()
    handle.cancel()
    bench.work()
    assert handle.status() is FlowStatus.CANCELLED
    assert bench.effects[3:] == ["no car", "no flight", "no hotel"]


def test_a_flow_that_finishes_undoes_nothing(bench: Bench) -> None:
    handle = booking(bench).start()
    bench.flows.emit("paid", str(handle.id))
    assert bench.finish(handle) == "booked"
    assert len(bench.effects) == 3


@pytest.mark.parametrize("bad", ["no flight", "no hotel"])
def test_an_undo_that_fails_is_reported_and_the_others_are_run(bench: Bench, bad: str) -> None:
    handle = booking(bench, fails=("car", bad)).start()
    with pytest.raises(FlowFailed, match="not undone: ") as failed:
        bench.finish(handle)
    assert bench.effects[3:] == ["no flight", "no hotel"]
    assert failed.value.undo_failed == ("cancel flight" if bad == "no flight" else "note",)
    assert handle.get().error_json["undo_failed"] == list(failed.value.undo_failed)


def test_a_cancelled_flow_reports_them_too(bench: Bench) -> None:
    handle = booking(bench, fails=("no car",)).start()
    bench.work()
    handle.cancel()
    bench.work()
    assert handle.status() is FlowStatus.CANCELLED
    assert handle.get().error_json["undo_failed"] == ["note"]
    assert bench.effects[3:] == ["no car", "no flight", "no hotel"]


def test_what_a_cancelled_flow_could_not_undo_is_in_its_history_and_is_shown(
    bench: Bench,
) -> None:
    """Nobody gets a FlowFailed from a flow that was cancelled, so whoever looks at it must see what is left to do."""
    handle = booking(bench, fails=("no car",)).start()
    bench.work()
    handle.cancel()
    bench.work()
    events = bench.store.list_events(handle.id)
    [ended] = [event for event in events if event.kind == "cancelled"]
    assert ended.payload_json["undo_failed"] == ["note"]
    assert ("not undone", "note") in facts(handle.get(), None, payloads=False)


def test_an_undo_is_tried_again_as_steps_are(bench: Bench) -> None:
    tries: list[str] = []

    def undo() -> None:
        tries.append("undo")
        if len(tries) == 1:
            raise ConnectionError

    @bench.flows.flow("fails")
    def fails(run: Run) -> None:
        run.options(retry=ONCE_MORE).on_failure(undo)
        raise LookupError

    with pytest.raises(FlowFailed) as failed:
        bench.finish(fails.start())
    assert (len(tries), failed.value.undo_failed) == (2, ())


def test_an_undo_waits_until_nothing_of_the_flow_is_at_work(bench: Bench) -> None:
    @bench.task("work")
    def work(name: str) -> None:
        raise ValueError(name)

    @bench.flows.flow("gathers")
    def gathers(run: Run) -> None:
        run.on_failure(bench.effects.append, "undone")
        run.gather([work.s("a"), work.s("b")])

    handle = gathers.start()
    bench.drive(handle.id)
    slow, fast = sorted(bench.store.list_steps(handle.id), key=lambda step: step.position)
    running = bench.store.run(dispatch.claim_step, slow.run_id, "node/1/slow", 30.0)
    assert running is not None
    bench.run_step(fast.run_id)
    bench.work()
    assert bench.effects == []
    bench.store.run(dispatch.complete_step, Completion(running.holder, handle.id, FlowStepStatus.SUCCEEDED))
    bench.call_driver(handle.id)
    with pytest.raises(FlowFailed):
        bench.finish(handle)
    assert bench.effects == ["undone"]


def test_a_cancel_in_the_last_step_undoes_all_the_same(bench: Bench) -> None:
    @bench.flows.flow("late")
    def late(run: Run) -> str:
        run.on_failure(bench.effects.append, "undone")
        run.step(bench.flows.handle(run.flow_id).cancel)
        return "done"

    handle = late.start()
    with pytest.raises(FlowCancelled):
        bench.finish(handle)
    assert bench.effects == ["undone"]


def test_a_function_may_undo_and_go_on(bench: Bench) -> None:
    @bench.flows.flow("tries another way")
    def another(run: Run) -> str:
        run.on_failure(bench.effects.append, "undone")
        try:
            run.step(int, "x")
        except StepFailed:
            assert run.undo() == []
        return run.step(str, "another way")

    assert bench.finish(another.start()) == "another way"
    assert bench.effects == ["undone"]


def test_what_is_no_step_cannot_undo(bench: Bench) -> None:
    @bench.flows.flow("wrong")
    def wrong(run: Run) -> None:
        run.on_failure("x")  # type: ignore[call-overload]

    with pytest.raises(FlowFailed, match="on_failure: takes a function or a Celery task, not str"):
        bench.finish(wrong.start())


# ---- under faults ---------------------------------------------------------------------------------------------------

MOST_CALLS = 60


def saga(bench: Bench, effects: list[str]) -> Any:
    """Everything new at once: a step that is tried again, a race, progress, and a failure that is undone."""

    def note(what: str) -> str:
        effects.append(what)
        return what

    def flaky(what: str) -> str:
        effects.append(what)
        if effects.count(what) == 1:
            raise ConnectionError(what)
        return what

    @bench.task("noted")
    def noted(what: str) -> str:
        return note(what)

    @bench.flows.flow("saga")
    def flow(run: Run) -> None:
        run.options(retry=Retry(5, initial=timedelta(milliseconds=1))).step(flaky, "flaky")
        run.on_failure(note, "undo here")
        run.update(halfway=True)
        run.first([noted.s("racer")])
        run.on_failure(noted, "undo there")
        raise LookupError("the end")

    return flow


@pytest.mark.parametrize("strikes", list(Strikes))
def test_a_saga_ends_undone_under_a_fault_at_every_call(make_bench: MakeBench, strikes: Strikes) -> None:
    survivor = make_bench()
    survived: list[str] = []
    flow = saga(survivor, survived)
    struck: list[str] = []
    for at in range(1, MOST_CALLS):
        effects: list[str] = []
        store = MortalStore(make_engine(survivor.url))
        bench = make_bench(store=store)
        mortal_flow = saga(bench, effects)
        store.strike(at, strikes)
        survived.clear()
        with suppress(Died, FlowFailed):
            bench.finish(mortal_flow.start(key=str(at)))
        store.close()
        if store.struck is None:
            break
        struck.append(store.struck)
        handle = flow.start(key=str(at))
        survivor.recover()
        with pytest.raises(FlowFailed, match="LookupError: the end") as failed:
            survivor.finish(handle)
        assert failed.value.undo_failed == ()
        ran = effects + survived
        for what in ("racer", "undo there", "undo here"):
            assert 1 <= ran.count(what) <= 2, f"{strikes} at {store.struck}: {ran}"
        assert ran.index("undo there") < ran.index("undo here")
        assert handle.state()["halfway"] is True
    else:
        raise AssertionError(f"the flow makes more than {MOST_CALLS} calls: {struck}")
    assert {"create_flow", "claim_drive", "change_flow", "claim_step", "complete_step", "drain"} <= set(struck)


def test_arguments_beside_a_signature_are_not_dropped_without_a_word(bench: Bench) -> None:
    @bench.task("refund")
    def refund(order: str, cents: int = 100) -> None:
        bench.effects.append((order, cents))

    told: list[str] = []

    @bench.flows.flow("orders")
    def orders(run: Run) -> None:
        untyped: Any = run
        for call in (untyped.step, untyped.on_failure):
            with pytest.raises(InvalidData) as refused:
                call(refund.s("o-1"), 5000)
            told.append(str(refused.value))

    bench.finish(orders.start())
    assert bench.effects == []
    assert [line.split(": ")[0] for line in told] == ["step", "on_failure"]
