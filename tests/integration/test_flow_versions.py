"""A flow goes on with the function it began with; where that is not here, it is left alone."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import pytest

from celery_flows import FlowHandle, FlowStatus, FlowStepStatus, HistoryMismatch, InvalidData, Run
from celery_flows.store import dispatch
from celery_flows.store.changes import Completion
from tests.integration.conftest import MakeBench
from tests.support.bench import Bench


def first_version(run: Run) -> str:
    run.step(str.lower, "ONE")
    run.wait_for("go", "on")
    return run.step(str.lower, "END")


def second_version(run: Run) -> str:
    run.step(str.upper, "one")
    run.step(str.title, "two")
    run.wait_for("go", "on")
    return run.step(str.upper, "end")


def test_a_flow_goes_on_with_the_version_it_began_with(make_bench: MakeBench) -> None:
    before = make_bench()
    old = before.flows.flow("grows")(first_version).start()
    before.work()

    after = make_bench()
    after.flows.flow("grows")(first_version)
    grown = after.flows.flow("grows", version=2)(second_version)
    new = grown.start()
    after.work()
    for _ in "old", "new":
        after.flows.emit("go", "on")
    assert (after.finish(after.flows.handle(old.id)), after.finish(new)) == ("end", "END")
    assert (old.get().definition_version, new.get().definition_version) == (1, 2)


def test_a_flow_of_a_version_that_is_not_here_waits(make_bench: MakeBench, caplog: pytest.LogCaptureFixture) -> None:
    before, after = make_bench(), make_bench()
    handle = before.flows.flow("grows")(first_version).start()
    after.flows.flow("grows", version=2)(second_version)
    after.drive(handle.id)
    assert "no flow definition 'grows', version 1, here" in caplog.text
    [row] = before.rows(handle.id)
    assert (row.worker, row.crash_count) == (None, 0)
    assert before.claimable() == []


def test_a_child_begins_with_the_latest_version(bench: Bench) -> None:
    bench.flows.flow("child")(lambda run: "old")
    child = bench.flows.flow("child", version=3)(lambda run: "new")

    @bench.flows.flow("parent")
    def parent(run: Run) -> Any:
        return run.flow(child)

    assert bench.finish(parent.start()) == "new"


def test_a_function_that_comes_to_another_step_is_refused_and_harms_nothing(
    make_bench: MakeBench, caplog: pytest.LogCaptureFixture
) -> None:
    before = make_bench()
    old = before.flows.flow("grows")(first_version)
    handle = old.start()
    before.work()

    changed = make_bench()
    changed.flows.flow("grows")(second_version)
    changed.call_driver(handle.id)
    changed.work()
    assert str(HistoryMismatch("lower", "upper", 1)) in caplog.text
    flow = handle.get()
    assert (flow.status, flow.error_json and flow.error_json["type"]) == (FlowStatus.RUNNING, "HistoryMismatch")
    revision = flow.revision
    changed.pass_time()
    changed.work()
    assert handle.get().revision == revision + 1  # the claim alone: what is known is not told again

    before.pass_time()
    before.flows.emit("go", "on")
    assert before.finish(handle) == "end"
    assert handle.get().error_json is None
    assert before.kinds(handle.id).count("history_refused") == 1


def test_so_is_one_that_ends_before_what_is_recorded(make_bench: MakeBench) -> None:
    before = make_bench()
    handle = before.flows.flow("shrinks")(first_version).start()
    before.work()
    shorter = make_bench()
    shorter.flows.flow("shrinks")(lambda run: "nothing to do")
    shorter.call_driver(handle.id)
    shorter.work()
    error = handle.get().error_json
    assert error is not None
    assert error["message"] == "step 1 of the history is 'lower', but the flow function came to 'the end'"


@pytest.mark.parametrize("is_open", [True, False])
def test_a_wait_for_another_correlation_id_is_not_taken_for_the_recorded_one(bench: Bench, is_open: bool) -> None:
    """The function is not deterministic: taken up again, it would wait for what nobody sends."""
    order = ["order-1"]

    @bench.flows.flow("forgets")
    def forgets(run: Run) -> str:
        return f"{order[0]}: {run.wait_for('paid', order[0])}"

    handle = forgets.start()
    bench.work()
    order[0] = "order-2"
    if is_open:
        bench.call_driver(handle.id)
    else:
        bench.flows.emit("paid", "order-1", "yes")
    bench.work()
    told = handle.get().error_json or {}
    assert told["type"] == "HistoryMismatch"
    assert "'wait_for paid with another correlation id'" in told["message"]
    assert "order-" not in told["message"]
    order[0] = "order-1"
    bench.pass_time()
    if is_open:
        bench.flows.emit("paid", "order-1", "yes")
    assert bench.finish(handle) == "order-1: yes"


def test_a_wait_by_the_flows_own_id_is_taken_over_as_it_is(bench: Bench) -> None:
    fails = [True]

    def charge() -> str:
        if fails:
            raise LookupError("no card")
        return "charged"

    @bench.flows.flow("calls back")
    def calls_back(run: Run) -> str:
        run.approval("order")
        run.wait_for("called back", str(run.flow_id))
        return run.step(charge)

    handle = calls_back.start()
    handle.approve("order", by="ann")
    bench.flows.emit("called back", str(handle.id))
    bench.work()
    assert handle.status() is FlowStatus.FAILED
    fails.clear()
    assert bench.finish(handle.retry()) == "charged"


def test_no_except_of_the_function_hides_it(make_bench: MakeBench) -> None:
    def swallows(run: Run) -> str:
        try:
            run.step(str.upper, "x")
        except Exception:
            return "hidden"
        return ""

    before, changed = make_bench(), make_bench()
    handle = before.flows.flow("hides")(first_version).start()
    before.work()
    changed.flows.flow("hides")(swallows)
    changed.call_driver(handle.id)
    changed.work()
    assert handle.status() is FlowStatus.RUNNING


def test_a_step_that_is_added_after_those_recorded_is_no_mismatch(make_bench: MakeBench) -> None:
    def longer(run: Run) -> str:
        run.step(str.lower, "ONE")
        run.wait_for("go", "on")
        run.step(str.lower, "ADDED")
        return run.step(str.lower, "END")

    before, after = make_bench(), make_bench()
    handle = before.flows.flow("grows")(first_version).start()
    before.work()
    after.flows.flow("grows")(longer)
    after.flows.emit("go", "on")
    assert after.finish(after.flows.handle(handle.id)) == "end"


def undoing(bench: Bench, *steps: str) -> Any:
    """A function that takes these steps, waits, and undoes them."""

    def function(run: Run) -> None:
        run.on_failure(bench.effects.append, "undone")
        for step in steps:
            run.options(name=step).step(bench.effects.append, step)
        run.wait_for("go", "on")

    return function


def refused(before: Bench, changed: Bench) -> FlowHandle[Any]:
    """A flow that waits in one application, and as another has it that has just met it."""
    handle = before.flows.flow("grows")(undoing(before, "one")).start()
    before.work()
    changed.flows.flow("grows")(undoing(changed, "two"))
    changed.call_driver(handle.id)
    changed.work()
    assert handle.get().error_json is not None
    return changed.flows.handle(handle.id)


def test_a_flow_that_is_refused_is_cancelled_without_its_cleanup_and_says_so(
    make_bench: MakeBench, caplog: pytest.LogCaptureFixture
) -> None:
    before, changed = make_bench(), make_bench()
    handle = refused(before, changed)
    handle.cancel()
    changed.work()
    flow = handle.get()
    assert (flow.status, flow.error_json and flow.error_json["type"]) == (FlowStatus.CANCELLED, "HistoryMismatch")
    [told] = [event for event in changed.store.list_events(flow.id) if event.kind == "cancelled"]
    assert told.payload_json["cleaned_up"] is False
    assert "is cancelled without its cleanup" in caplog.text
    assert (before.effects, changed.effects) == (["one"], [])
    changed.audit()


def test_a_cancel_that_meets_the_wrong_worker_first_leaves_the_cleanup_to_the_right_one(make_bench: MakeBench) -> None:
    before, changed = make_bench(), make_bench()
    handle = before.flows.flow("grows")(undoing(before, "one")).start()
    before.work()
    changed.flows.flow("grows")(undoing(changed, "two"))
    handle.cancel()
    changed.work()
    assert handle.status() is FlowStatus.WAITING
    before.pass_time()
    before.work()
    assert (handle.status(), before.effects) == (FlowStatus.CANCELLED, ["one", "undone"])


def test_a_cancel_that_comes_while_a_flow_is_refused_is_not_left_for_ten_minutes(make_bench: MakeBench) -> None:
    before, changed = make_bench(), make_bench()
    handle = before.flows.flow("grows")(undoing(before, "one")).start()
    before.work()

    def comes_late(run: Run) -> None:
        if not handle.get().cancel_requested:
            handle.cancel()
        run.step(str.upper, "two")

    changed.flows.flow("grows")(comes_late)
    changed.call_driver(handle.id)
    changed.drive(handle.id)
    assert handle.status() is FlowStatus.CANCELLED


def test_what_a_refused_flow_has_out_is_waited_for_before_it_is_cancelled(make_bench: MakeBench) -> None:
    """A step that somebody runs is recorded, one that nobody has begun is not run, a child cleans up."""
    before, changed = make_bench(), make_bench()
    for bench in before, changed:
        bench.flows.flow("child")(undoing(bench, "child"))

    @before.task("label")
    def label(number: int) -> None: ...

    def gathers(run: Run) -> None:
        child = before.flows.runtime.registry.require("child")
        run.gather([*(label.s(number) for number in (1, 2)), child.s()])

    handle = before.flows.flow("grows")(gathers).start()
    before.drive(handle.id)
    [running, idle] = [run_id for kind, run_id in before.claimable() if kind == "step"]
    [child] = [run_id for kind, run_id in before.claimable() if kind == "drive"]
    before.drive(UUID(child))
    claim = before.store.run(dispatch.claim_step, running, "somebody", 30.0)
    assert claim is not None
    changed.flows.flow("grows")(undoing(changed, "two"))
    changed.call_driver(handle.id)
    changed.drive(handle.id)
    handle.cancel()
    changed.drive(handle.id)
    assert handle.status() is FlowStatus.RUNNING
    done = Completion(claim.holder, handle.id, FlowStepStatus.SUCCEEDED)
    assert changed.store.run(dispatch.complete_step, done) is not None
    changed.sweep()
    changed.work()
    changed.sweep()
    changed.work()
    steps = {step.run_id: step.status for step in changed.store.list_steps(handle.id)}
    assert (steps[running], steps[idle]) == (FlowStepStatus.SUCCEEDED, FlowStepStatus.CANCELLED)
    assert (handle.status(), changed.flows.handle(UUID(child)).status()) == (FlowStatus.CANCELLED,) * 2
    assert "undone" in changed.effects


def test_a_flow_that_is_refused_can_be_ended_by_hand(make_bench: MakeBench) -> None:
    before, changed = make_bench(), make_bench()
    handle = before.flows.flow("grows")(first_version).start()
    before.work()
    changed.flows.flow("grows")(second_version)
    changed.call_driver(handle.id)
    changed.work()
    changed.flows.manager.cancel(handle.id)
    assert handle.status() is FlowStatus.CANCELLED


@pytest.mark.parametrize("version", [0, -1, True, "2"])
def test_a_version_that_is_no_number_is_refused(bench: Bench, version: Any) -> None:
    with pytest.raises(InvalidData, match="version of flow x: must be a whole number from 1"):
        bench.flows.flow("x", version=version)(lambda run: None)


def test_two_functions_under_one_name_and_version_are_refused(bench: Bench) -> None:
    bench.flows.flow("x", version=2)(first_version)
    bench.flows.flow("x", version=1)(second_version)
    with pytest.raises(InvalidData, match="is taken by"):
        bench.flows.flow("x", version=2)(second_version)
